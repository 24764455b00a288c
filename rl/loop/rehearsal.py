"""Draws the pictures that a stage rehearses (`rl/learner/rehearsal.py`), on the rollout workers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import ray
import torch

import recipes
from core.failures import ObjectsLost
from core.prompts import Prompt, load_prompts
from core.seeds import derive_seed
from rl.learner.rehearsal import SampledPicture
from rl.learner.worker import LearnerGroup
from rl.recipe.schema import RunConfig
from rl.recipe.shapes import shape_rule
from rl.recipe.stage_parts import rehearsed_parts
from rl.record.state import RunState
from rl.workers.collect import Collector
from rl.workers.requests import batch_requests
from rollout.sampler import SamplingSpec
from rollout.worker import Policy

log = logging.getLogger(__name__)
_DRAWS = 3


def rehearsal_prompts(sets: Sequence[Sequence[Prompt]], count: int, seed: int) -> list[Prompt]:
    """`count` prompts, in equal numbers from each set as far as it reaches, drawn without repetition."""
    chosen: list[Prompt] = []
    for i, prompts in enumerate(sets):
        generator = torch.Generator().manual_seed(derive_seed(seed, "rehearsal", i))
        wanted = (count - len(chosen)) // (len(sets) - i)
        chosen += [prompts[k] for k in torch.randperm(len(prompts), generator=generator)[:wanted].tolist()]
    return chosen


def prepare_rehearsal(
    learner: LearnerGroup, collector: Collector, config: RunConfig, state: RunState
) -> None:
    """Draw with a stage's first policy what its updates rehearse; a run resumed within it draws the same."""
    began = time.monotonic()
    adapter = learner.reference_adapter(state.version)
    policy = Policy(adapter.version, adapter.sha256, (ray.put(adapter),))
    rehearsal = config.stages[state.stage].rehearsal
    assert rehearsal is not None
    for draw in range(_DRAWS):
        try:
            learner.rehearse(rehearsal, draw_pictures(collector, config, state.stage, policy, state.step))
            break
        except ObjectsLost:
            if draw == _DRAWS - 1:
                raise
    state.seconds += time.monotonic() - began


def draw_pictures(
    collector: Collector, config: RunConfig, index: int, policy: Policy, step: int
) -> list[SampledPicture]:
    """Sample what stage `index` rehearses, with its first policy, on the rollout workers.

    Raises RuntimeError when no prompt could be sampled.
    """
    stage, rollout = config.stages[index], config.rollout
    assert stage.rehearsal is not None
    parts = rehearsed_parts(config.stages, index)
    sets = [load_prompts(recipes.resolve(part.prompts), part.task) for part in parts]  # type: ignore[arg-type]
    prompts = rehearsal_prompts(sets, stage.rehearsal.num_prompts, config.seed)
    seeds = [derive_seed(config.seed, stage.name, "rehearsal", i) for i in range(len(prompts))]
    spec = SamplingSpec(rollout.num_steps, 0.0, rollout.guidance_scale, variant="ode")
    label, pictures = f"rehearsal of {stage.name}", []
    rule = shape_rule(config.model)
    shapes = [rule.of(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
    requests = batch_requests(prompts, seeds, rollout.chunk_size, shapes)
    results = collector.sample(requests, spec, policy, step=step, label=label)
    for result in sorted(results, key=lambda result: result.request.id):
        if result.failure:
            log.error("%s: prompts %s left out: %s", label, result.request.span, result.failure)
            continue
        (chunk,) = result.chunks
        pictures += [
            SampledPicture(chunk.trajectory, k, result.conditioning_of(k), result.request.shape)
            for k in range(chunk.size)
        ]
    if not pictures:
        raise RuntimeError(
            f"stage {stage.name!r}: none of its {len(prompts)} rehearsal prompts could be sampled; the log says why"
        )
    return pictures
