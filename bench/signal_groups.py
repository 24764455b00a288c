"""Gradients of a recipe's groups, one group at a time: what `python -m bench signal` summarises."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.signal_share import Share, common_share
from core.seeds import derive_seed
from models.components import torch_dtype
from models.lora.attach import Adapter, adapter_parameters, hash_state, use_adapter
from models.lora.files import read_adapter
from rewards.worker import RewardScorer
from rl.loop.advantages import group_advantages
from rl.loop.cluster import training_spec
from rl.loop.schedule import StageSchedule
from rl.recipe.reward_sets import part_reward_set
from rl.recipe.schema import RunConfig
from rl.recipe.shapes import shape_rule
from rl.recipe.stage_parts import stage_parts
from rl.workers.start import encoder_spec, replica_spec
from rollout.encoder import Encoder
from rollout.engine import ROLLOUT_ADAPTER, RolloutEngine, SampleRequest
from rollout.prompts import PromptGroup
from rollout.sampler import Conditioning, ConditioningBatch, SamplingSpec, Trajectory, replay_step


@dataclass(frozen=True)
class Row:
    """One line of the table. Means over the groups; a group without spread counts as a gradient of zero."""

    step: str
    groups: int
    share: Share
    norm: float
    zero_spread: float
    reward_mean: float
    reward_std: float
    seconds: float


@dataclass(frozen=True)
class _Group:
    gradient: Tensor
    rewards: np.ndarray
    seconds: float


def summarise(step: str, groups: Sequence[_Group]) -> Row:
    """One row from the groups of a step, or of several."""
    gradients = torch.stack([group.gradient for group in groups])
    return Row(
        step,
        len(groups),
        common_share(gradients),
        float(gradients.square().sum(1).mean().sqrt()),
        float(np.mean([np.ptp(g.rewards) <= 1e-12 for g in groups])),
        float(np.mean([g.rewards.mean() for g in groups])),
        float(np.mean([g.rewards.std() for g in groups])),
        float(np.mean([g.seconds for g in groups])),
    )


class SignalBench:
    """A recipe's model, encoder and rewards in this process, and one adapter as the policy."""

    def __init__(self, config: RunConfig, stage: str | None, adapter: str | None, coordinates: int):
        names = [s.name for s in config.stages]
        if stage is not None and stage not in names:
            raise SystemExit(f"--stage {stage}: the recipe has {', '.join(names)}")
        self.config, self.stage = config, config.stages[names.index(stage) if stage else 0]
        self.schedule = StageSchedule(self.stage, config)
        self.engine = RolloutEngine(replica_spec(config.model, config.resources))
        if adapter is not None:
            state, settings = read_adapter(adapter)
            lora = config.model.lora
            if (settings.rank, settings.alpha) != (lora.rank, lora.alpha):
                raise SystemExit(
                    f"--adapter {adapter}: rank {settings.rank}, alpha {settings.alpha:g}; the recipe's model.lora has "
                    f"rank {lora.rank}, alpha {lora.alpha:g}"
                )
            self.engine.load_adapter(Adapter(0, hash_state(state), state))
        self.encoder = Encoder(encoder_spec(config.model, config.resources, config.rollout.negative_prompt))
        self.negative = self.encoder.encode_text(config.rollout.negative_prompt)
        self.scorer = RewardScorer(
            [part_reward_set(part, [], config) for part in stage_parts(self.stage)],
            threads=config.resources.threads,
        )
        self.parameters = list(adapter_parameters(self.engine.transformer, ROLLOUT_ADAPTER).values())
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        total = sum(parameter.numel() for parameter in self.parameters)
        generator = torch.Generator().manual_seed(derive_seed("signal-coordinates"))
        self.size = min(total, coordinates)
        self.chosen = torch.randperm(total, generator=generator)[: self.size].sort().values

    def groups(self, step: int, count: int) -> list[_Group]:
        """Gradients of the stage's first `count` groups, all parting at `step`."""
        spec = dataclasses.replace(
            training_spec(self.config), window_size=1, window_first=step, window_last=step + 1, branch=True
        )
        found: list[_Group] = []
        while len(found) < count:
            rollout = len(found) // self.config.rollout.prompts_per_rollout
            label = self.schedule.part(rollout).reward_set
            for group in self.schedule.groups(rollout)[: count - len(found)]:
                found.append(self._group(group, label, spec, step))
        return found

    def _group(self, group: PromptGroup, label: str, spec: SamplingSpec, step: int) -> _Group:
        began = time.perf_counter()
        drawn = shape_rule(self.config.model).of(group.prompt, group.seeds[0]).size
        conditioning = self.encoder.encode_one(group.prompt, drawn)
        trunk, size = derive_seed("trunk", group.seeds[0]), self.config.rollout.chunk_size
        parts = [
            self.engine.sample(
                SampleRequest(group.id, first, group.seeds[first : first + size], (step,), trunk, drawn),
                spec, self.negative, [conditioning],
            )
            for first in range(0, len(group.seeds), size)
        ]  # fmt: skip
        score = asyncio.run(
            self.scorer.score(group.id, label, [group.prompt] * len(group.seeds), *(p[2] for p in parts))
        )
        advantages = group_advantages(score.rewards, [0] * len(group.seeds), mask=score.mask)
        rewards = np.array([np.nan if r is None else r for r in score.rewards])
        rewards = rewards[np.isfinite(rewards)]
        if score.dropped or not len(rewards):
            raise RuntimeError(
                f"group {group.id} ({group.prompt.prompt!r}) was not scored ({score.reason or score.failures}); a "
                "missing reward is not a gradient of zero: mend the reward and run again"
            )
        if not advantages.used.any():
            return _Group(torch.zeros(self.size), rewards, time.perf_counter() - began)
        scale = rewards.std() if self.config.learner.advantage_std == "batch" else 1.0
        weights = torch.tensor(advantages.values * scale / advantages.used.sum(), dtype=torch.float32)
        gradient = self._gradient([p[1] for p in parts], conditioning, weights, spec)
        return _Group(gradient, rewards, time.perf_counter() - began)

    def _gradient(
        self, sampled: Sequence[Trajectory], conditioning: Conditioning, weights: Tensor, spec: SamplingSpec
    ) -> Tensor:
        """Gradient [P] of `sum_k weights_k log p_k` at the step where the samples part."""
        latents = torch.cat([trajectory.latents for trajectory in sampled])
        device, size = self.engine.spec.device, len(latents)
        batch = ConditioningBatch.stack(
            [conditioning] * size, device=device, dtype=torch_dtype(self.engine.spec.dtype)
        )
        with use_adapter(self.engine.transformer, ROLLOUT_ADAPTER):
            taken = replay_step(
                self.engine.transformer,
                latents[:, 0].to(device),
                latents[:, 1].to(device),
                torch.full((size,), sampled[0].steps[0], device=device),
                sampled[0].sigmas,
                batch,
                self.negative,
                spec,
                cfg_gradient=self.config.learner.cfg_gradient,  # type: ignore[arg-type]
                trunks=torch.zeros(size, dtype=torch.long),
            )
        assert taken.log_prob is not None
        gradients = torch.autograd.grad((weights.to(device) * taken.log_prob).sum(), self.parameters)
        return torch.cat([g.flatten().float().cpu() for g in gradients])[self.chosen]
