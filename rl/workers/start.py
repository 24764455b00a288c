"""The rollout, encode and reward workers of a run or an evaluation: what they are built from, and their start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import recipes
from core.cluster.actors import PlacedActors
from core.cluster.dispatch import Dispatcher
from rewards.base import RewardSet
from rewards.scoring import longest_score_s
from rewards.worker import RewardWorker
from rl.recipe.schema import ModelConfig, ResourcesConfig
from rollout.encoder import EncoderSpec, EncodeWorker
from rollout.engine import ReplicaSpec
from rollout.worker import RolloutWorker

SILENCE_S = 120.0
"""After so long without a sign of life a reward worker's event loop hangs. Threads leave it running; a library that
holds the interpreter for longer than this in one call does not."""
BESIDE_S = 120.0
"""What a call to a reward worker may take beside its rewards: pictures from the object store, references."""


@dataclass
class Workers:
    """Running workers; `dispatcher` hands them their calls."""

    placed: PlacedActors
    dispatcher: Dispatcher

    def close(self) -> None:
        """Stop every actor and give the resources back."""
        self.placed.close()


def replica_spec(
    model: ModelConfig, resources: ResourcesConfig, held: Mapping[str, str] | None = None, *, shapes: int = 1
) -> ReplicaSpec:
    """What a replica of the transformer is built from, on any node. `held`: what the base's files must be there;
    `shapes`: how many its pictures have."""
    return ReplicaSpec(
        model_path=str(recipes.resolve(model.path)),
        dtype=model.dtype,
        device=resources.device,
        height=model.height,
        width=model.width,
        lora_rank=model.lora.rank,
        lora_alpha=model.lora.alpha,
        lora_targets=tuple(model.lora.targets),
        threads=resources.threads,
        compile=model.compile,
        shapes=shapes,
        held=held or {},
    )


def encoder_spec(
    model: ModelConfig,
    resources: ResourcesConfig,
    negative_prompt: str,
    held: Mapping[str, str] | None = None,
) -> EncoderSpec:
    """What the encode worker is built from; `held` as for a replica."""
    return EncoderSpec(
        model_path=str(recipes.resolve(model.path)),
        dtype=model.dtype,
        device=resources.device if resources.encode_gpus else "cpu",
        height=model.height,
        width=model.width,
        max_sequence_length=model.max_sequence_length,
        cache_bytes=int(model.embedding_cache_gib * 2**30),
        threads=resources.threads,
        vlm_path=None if model.vlm is None else str(recipes.resolve(model.vlm)),
        position_mode=model.position_mode,
        negative_prompt=negative_prompt,
        reference_pixels=model.reference_pixels,
        held=held or {},
    )


def score_limit_s(reward_sets: Sequence[RewardSet], resources: ResourcesConfig) -> float:
    """After how long a reward worker that scores one group is taken to hang: its rewards end by themselves before that,
    also where those of a set share a model and take turns."""
    longest_s = [sum(map(longest_score_s, reward_set.rewards)) for reward_set in reward_sets]
    return max([resources.call_timeout_s, *(limit_s + BESIDE_S for limit_s in longest_s)])


def start_workers(
    placed: PlacedActors,
    replica: ReplicaSpec | None,
    encoder: EncoderSpec | None,
    reward_sets: list[RewardSet],
    resources: ResourcesConfig,
    *,
    ranks: list[Any] | None = None,
    floor: int = 1,
    held: Mapping[str, str] | None = None,
) -> Workers:
    """Start the workers that the plan has room for; they need not have answered yet.

    ranks: actors that sample in place of rollout workers. floor: how many that sample must be left. held: what the
    code of rewards must be.
    """
    restarts = resources.max_restarts
    sampling = placed.start("rollout", RolloutWorker, lambda kind, _: kind.remote(replica), restarts=restarts)
    rewards = placed.start(
        "reward", RewardWorker,
        lambda kind, _: kind.remote(
            reward_sets, threads=resources.threads, workers=resources.reward_workers, held=held
        ),
        restarts=restarts, max_concurrency=resources.reward_concurrency + 1,  # and its sign of life
    )  # fmt: skip
    encoders = placed.start("encode", EncodeWorker, lambda kind, _: kind.remote(encoder), restarts=restarts)
    dispatcher = Dispatcher(
        call_timeout_s=resources.call_timeout_s,
        start_timeout_s=resources.start_timeout_s,
        on_node=placed.on_node,
    )
    dispatcher.add_pool("rollout", ranks or sampling, floor=floor)
    dispatcher.add_pool("reward", rewards, max_in_flight=resources.reward_concurrency)
    dispatcher.add_pool("encode", encoders)
    dispatcher.silence_s["reward"] = SILENCE_S
    dispatcher.limits_s["reward"] = score_limit_s(reward_sets, resources)
    return Workers(placed, dispatcher)
