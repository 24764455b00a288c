"""From prompt groups to requests, and from their results to a train batch and metrics: the arithmetic of one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from core.seeds import derive_seed
from rl.learner.batching import SampleRef, TrainBatch, make_train_batch, trained_positions
from rl.learner.stats import UpdateStats
from rl.loop.advantages import NO_SPREAD, Advantages, group_advantages
from rl.recipe.schema import RunConfig
from rl.workers.requests import RolloutRequest, RolloutResult
from rollout.prompts import PromptGroup
from rollout.sampler import SamplingSpec
from rollout.shapes import ShapeRule

USEFUL = "taught"


def group_requests(
    groups: Iterable[PromptGroup], spec: SamplingSpec, shapes: ShapeRule
) -> list[RolloutRequest]:
    """Training groups as requests; a group's seeds decide its stochastic steps, its trunk where it branches, and its
    size where there are several."""
    return [
        RolloutRequest(
            group.id,
            (group.prompt,),
            group.seeds,
            spec.stochastic_steps(derive_seed("group-steps", *group.seeds[:1])),
            derive_seed("trunk", *group.seeds[:1]) if spec.branch else None,
            shapes.of(group.prompt, *group.seeds[:1]),
        )
        for group in groups
    ]


def make_batch(results: Sequence[RolloutResult], config: RunConfig) -> tuple[TrainBatch, Advantages]:
    """Advantages over the scored samples of all groups, and the used samples as equal shares."""
    learner, rollout = config.learner, config.rollout
    rows = [
        (result, score, k)
        for result in sorted(results, key=lambda r: r.request.id)
        if (score := result.score) is not None
        for k in range(len(result.request.seeds))
    ]
    advantages = group_advantages(
        [score.rewards[k] for _, score, k in rows],
        [result.request.id for result, _, _ in rows],
        std=learner.advantage_std,
        eps=learner.advantage_eps,
        clip=learner.advantage_clip,
        mask=[score.mask[k] for _, score, k in rows],
    )
    samples = []
    for (result, _, k), value, used in zip(rows, advantages.values, advantages.used, strict=True):
        if not used:
            continue
        request = result.request
        chunk = next(c for c in result.chunks if c.first <= k < c.first + c.size)
        positions = trained_positions(
            request.steps, rollout.num_steps, learner.drop_last_steps, learner.train_steps, request.seeds[0]
        )
        samples.append(
            SampleRef(
                request.id,
                k,
                chunk.trajectory,
                k - chunk.first,
                result.conditioning_of(k),
                positions,
                float(value),
                shape=request.shape,
            )
        )
    batch = make_train_batch(samples, learner.updates_per_rollout, learner.ranks, learner.micro_batch_size)
    return batch, advantages


def group_fates(results: Sequence[RolloutResult]) -> Counter[str]:
    """How many groups could not be sampled, were not scored, have no spread, or teach something (`USEFUL`)."""
    return Counter(_fate(result) for result in results)


def _fate(result: RolloutResult) -> str:
    if result.failure:
        return "could not be sampled"
    score = result.score
    kept = [] if score is None else [r for r, used in zip(score.rewards, score.mask, strict=True) if used]
    scored = [r for r in kept if r is not None]
    if not scored:
        return "were not scored"
    return USEFUL if max(scored) - min(scored) > NO_SPREAD else "have no spread in their rewards"


def describe_fates(fates: Mapping[str, int]) -> str:
    """`of 8 groups 6 could not be sampled, 2 have no spread in their rewards`."""
    parts = [f"{count} {fate}" for fate, count in sorted(fates.items()) if count]
    return f"of {sum(fates.values())} groups {', '.join(parts) or 'none was drawn'}"


def reward_metrics(results: Sequence[RolloutResult], advantages: Advantages, clip: float) -> dict[str, Any]:
    """Rewards, what is missing, and the advantages of one step."""
    scores = [r.score for r in results if r.score is not None]
    rewards = [r for score in scores for r in score.rewards]
    present = [r for r in rewards if r is not None]
    total = sum(len(r.request.seeds) for r in results)
    values: dict[str, Any] = {
        "reward/mean": _mean(present),
        "reward/std": float(np.std(present)) if present else None,
        "reward/missing_share": 1 - len(present) / total,
        "reward/zero_spread_share": advantages.zero_spread_share,
        "reward/groups_dropped": sum(r.score is None or r.score.dropped for r in results),
    }
    used = np.abs(advantages.values[advantages.used])
    values["advantage/abs_mean"] = float(used.mean()) if len(used) else None
    values["advantage/clamped_share"] = float((used >= clip).mean()) if len(used) else None
    for name in sorted({name for score in scores for name in score.components}):
        column = [v for score in scores for v in score.components.get(name, [])]
        seen = [v for v in column if v is not None]
        label, _, component = name.partition("/")
        if component:
            values[f"reward/{label}/component/{component}"] = _mean(seen)
        else:
            values[f"reward/{label}/mean"] = _mean(seen)
            values[f"reward/{label}/missing_share"] = 1 - len(seen) / len(column) if column else None
    return values


def update_metrics(stats: Sequence[UpdateStats], learning_rate: float, samples: int) -> dict[str, Any]:
    """The step's optimizer updates: means over updates, extremes of the ratio, the gate's gaps."""
    values: dict[str, Any] = {"optimizer/updates": len(stats), "optimizer/samples": samples}
    if not stats:
        return values
    values |= {
        "loss/policy": _mean([s.policy_loss for s in stats]),
        "loss/total": _mean([s.loss for s in stats]),
        "policy/kl": _mean([s.kl for s in stats]),
        "policy/approx_kl": _mean([s.approx_kl for s in stats]),
        "policy/ratio_mean": _mean([s.ratio_mean for s in stats]),
        "policy/ratio_min": min(s.ratio_min for s in stats),
        "policy/ratio_max": max(s.ratio_max for s in stats),
        "policy/clip_fraction_low": _mean([s.clip_fraction_low for s in stats]),
        "policy/clip_fraction_high": _mean([s.clip_fraction_high for s in stats]),
        "optimizer/grad_norm": _mean([s.grad_norm for s in stats if s.grad_norm is not None]),
        "optimizer/skipped": sum(s.skipped for s in stats),
        "optimizer/lr": learning_rate,
    }
    if stats[0].rehearsal is not None:
        values["policy/rehearsal"] = _mean([s.rehearsal for s in stats if s.rehearsal is not None])
    gaps = stats[0].gaps
    if gaps is not None:
        values["gate/log_prob_gap_mean"] = _mean(list(gaps.mean_by_step.values()))
        values["gate/log_prob_gap_max"] = gaps.largest
        values |= {f"gate/log_prob_gap/{t}": gap for t, gap in gaps.mean_by_step.items()}
    return values


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
