"""From scored groups to a train batch and its metrics: the arithmetic of one step, without processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rl.learner.batching import SampleRef, TrainBatch, make_train_batch, trained_positions
from rl.learner.stats import UpdateStats
from rl.loop.advantages import Advantages, group_advantages
from rl.loop.collect import SampledGroup
from rl.recipe.schema import LearnerConfig, RunConfig


def make_batch(groups: Sequence[SampledGroup], config: RunConfig) -> tuple[TrainBatch, Advantages]:
    """Advantages over the scored samples of all groups, and the used samples as equal shares."""
    learner, rollout = config.learner, config.rollout
    ordered = sorted((g for g in groups if g.score is not None), key=lambda g: g.group.id)
    rows = [(g, k) for g in ordered for k in range(len(g.group.seeds))]
    advantages = group_advantages(
        [g.score.rewards[k] for g, k in rows if g.score],
        [g.group.id for g, _ in rows],
        std=learner.advantage_std,  # type: ignore[arg-type]
        eps=learner.advantage_eps,
        clip=learner.advantage_clip,
        mask=[g.score.mask[k] for g, k in rows if g.score],
    )
    samples = []
    for (group, k), value, used in zip(rows, advantages.values, advantages.used, strict=True):
        if not used:
            continue
        chunk = next(c for c in group.chunks if c.first <= k < c.first + c.size)
        positions = trained_positions(
            group.steps, rollout.num_steps, learner.drop_last_steps, learner.train_steps, group.group.seeds[0]
        )
        samples.append(
            SampleRef(
                group.group.id,
                k,
                chunk.trajectory,
                k - chunk.first,
                group.conditioning,
                positions,
                float(value),
            )
        )
    batch = make_train_batch(samples, learner.updates_per_rollout, learner.ranks, learner.micro_batch_size)
    return batch, advantages


def stage_learning_rate(config: LearnerConfig, done: int, steps: int) -> float:
    """The rate of a stage's step after `done` of its `steps`: a function of these alone, so resuming needs no more."""
    if config.final_learning_rate is None:
        return config.learning_rate
    return config.learning_rate + (config.final_learning_rate - config.learning_rate) * done / steps


def reward_metrics(groups: Sequence[SampledGroup], advantages: Advantages, clip: float) -> dict[str, Any]:
    """Rewards, what is missing, and the advantages of one step."""
    scores = [g.score for g in groups if g.score is not None]
    rewards = [r for score in scores for r in score.rewards]
    present = [r for r in rewards if r is not None]
    total = sum(len(g.group.seeds) for g in groups)
    values: dict[str, Any] = {
        "reward/mean": _mean(present),
        "reward/std": float(np.std(present)) if present else None,
        "reward/missing_share": 1 - len(present) / total,
        "reward/zero_spread_share": advantages.zero_spread_share,
        "reward/groups_dropped": sum(g.score is None or g.score.dropped for g in groups),
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
        "optimizer/grad_norm": _mean([s.grad_norm for s in stats if not math.isnan(s.grad_norm)]),
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
