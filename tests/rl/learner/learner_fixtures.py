"""Builds learners and rollouts at tiny size, without the controller."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from core.seeds import derive_seed
from models.lora.attach import Adapter, hash_state, load_adapter_state
from rl.learner.batching import RankShare, SampleRef, TrainSample, make_train_batch, trained_positions
from rl.learner.learner import Learner, LearnerSpec
from rl.recipe.schema import EmaConfig, LearnerConfig
from rollout.engine import AdapterReceipt, ReplicaSpec, RolloutEngine, SampleRequest
from rollout.sampler import Conditioning, SamplingSpec, Trajectory
from rollout.shapes import Shape

T5_WIDTH, POOLED = 48, 40  # of tests/fakes/tiny_models.py


def replica_spec(folder: Path, **changes: Any) -> ReplicaSpec:
    spec = ReplicaSpec(
        model_path=str(folder), dtype="float32", device="cpu", height=32, width=32, lora_rank=4, lora_alpha=8.0,
        lora_targets=("attn.to_q", "attn.to_v", "attn2.to_q", "attn.add_q_proj"), threads=1,
    )  # fmt: skip
    return replace(spec, **changes)


def learner_config(**changes: Any) -> LearnerConfig:
    defaults: dict[str, Any] = {
        "ranks": 1, "zero_stage": 1, "micro_batch_size": 2, "updates_per_rollout": 1, "learning_rate": 1e-3,
        "max_grad_norm": 1e9, "clip_range": 0.2, "kl_beta": 0.04,
    }  # fmt: skip
    return LearnerConfig(**{**defaults, "ema": EmaConfig(enabled=False), **changes})


def sampling_spec(guidance_scale: float = 1.0, num_steps: int = 4) -> SamplingSpec:
    return SamplingSpec(num_steps, 0.7, guidance_scale)


def conditioning(
    name: str, *, reference: bool | int = False, latents: tuple[int, int] = (8, 8)
) -> Conditioning:
    """`reference`: how many, of `latents` each."""
    generator = torch.Generator().manual_seed(derive_seed("conditioning", name))
    return Conditioning(
        torch.randn((12, T5_WIDTH), generator=generator),
        torch.randn((POOLED,), generator=generator),
        tuple(torch.randn((4, *latents), generator=generator) for _ in range(reference)),
    )


def sample_group(
    engine: RolloutEngine,
    spec: SamplingSpec,
    group: int,
    size: int,
    negative: Conditioning | None = None,
    references: int = 0,
    shape: Shape | None = None,
) -> tuple[Trajectory, Conditioning]:
    seeds = tuple(derive_seed("noise", group, k) for k in range(size))
    steps = spec.stochastic_steps(group)
    pixels = (32, 32) if shape is None else shape.size
    latents = (pixels[0] // 4, pixels[1] // 4)
    condition = conditioning(f"group {group}", reference=references, latents=latents)
    trunk = derive_seed("trunk", group) if spec.branch else None
    _, trajectory, _ = engine.sample(
        SampleRequest(group, 0, seeds, steps, trunk, pixels), spec, negative, [condition]
    )
    return trajectory, condition


def sample_refs(
    groups: list[tuple[int, Trajectory, Conditioning]],
    num_steps: int,
    shapes: Sequence[Shape | None] | None = None,
) -> list[SampleRef]:
    """References whose "object references" are the objects; advantages alternate in sign. `shapes`: one a group."""
    refs = []
    for (group, trajectory, condition), shape in zip(groups, shapes or [None] * len(groups), strict=True):
        positions = trained_positions(trajectory.steps, num_steps, 1, 0, group)
        for k in range(len(trajectory.final_latents)):
            advantage = (-1.0) ** k * (1 + 0.25 * k + 0.1 * group)
            refs.append(SampleRef(group, k, trajectory, k, condition, positions, advantage, shape=shape))
    return refs


def resolve(share: RankShare) -> tuple[list[TrainSample], int]:
    return [TrainSample.of(s, s.trajectory, s.conditioning) for s in share.samples], share.count


def make_learner(
    folder: Path, *, guidance: float = 1.0, adapter: str | None = None, held: Any = None, **changes: Any
) -> Learner:
    """A learner in this process; wants the `process_group` fixture."""
    config, sampling = learner_config(**changes), sampling_spec(guidance)
    replica = replica_spec(folder, held=held or {})
    learner = Learner(LearnerSpec(replica, config, sampling, 0, False, False, 120.0, 120.0, adapter))
    learner.negative = conditioning("negative")
    return learner


def publish(learner: Learner, engine: RolloutEngine, version: int = 1) -> AdapterReceipt:
    state = learner.adapter()
    return engine.load_adapter(Adapter(version, hash_state(state), state))


def rollout(
    engine: RolloutEngine,
    *,
    guidance: float = 1.0,
    groups: int = 2,
    size: int = 4,
    first: int = 0,
    references: int = 0,
) -> list[tuple[int, Trajectory, Conditioning]]:
    spec = sampling_spec(guidance)
    return [
        (g, *sample_group(engine, spec, g, size, conditioning("negative"), references))
        for g in range(first, first + groups)
    ]


def updates(
    groups: list[tuple[int, Trajectory, Conditioning]], num_updates: int = 1, micro: int = 2
) -> list[tuple[list[TrainSample], int]]:
    batch = make_train_batch(sample_refs(groups, 4), num_updates, 1, micro)
    return [resolve(shares[0]) for shares in batch.updates]


def randomise(learner: Learner, scale: float = 0.05) -> None:
    """Give the untrained adapter a B, so that LoRA has an effect."""
    generator = torch.Generator().manual_seed(1)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * scale if "lora_B" in name else tensor
        for name, tensor in learner.adapter().items()
    }
    load_adapter_state(learner.transformer, state, "policy")
