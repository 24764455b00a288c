"""The rollout and encode workers of RL, started for generation: the same actors, without learner and rewards."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import torch

import recipes
from core.cluster.actors import PlacedActors, connect, wait_ready
from core.cluster.dispatch import Dispatcher
from core.cluster.placement import ActorPlan, ResourcePlan, bundle_of, uniform_plan
from core.cluster.workers import Call
from core.recipe import ConfigError
from models.lora.attach import Adapter, LoraSettings, State, hash_state
from models.lora.load import load_adapter
from models.lora.targets import DEFAULT_TARGETS
from rewards.editreward.data.generate_config import BASE, GenerateSection
from rollout.encoder import EncoderSpec, EncodeWorker
from rollout.engine import ReplicaSpec
from rollout.worker import Policy, RolloutWorker

UNTOUCHED = LoraSettings(rank=1, alpha=1.0, targets=tuple(DEFAULT_TARGETS))
"""What workers attach where no adapter is named; its B is 0, so it adds exactly nothing."""


@dataclass(frozen=True)
class LoadedAdapters:
    """All adapters of a recipe, in its order. sha256: None for the base. states: None while there is only the base."""

    settings: LoraSettings
    sha256: tuple[str | None, ...]
    states: tuple[State, ...] | None

    def policies(self) -> list[Policy]:
        """What workers are asked to sample with, by the adapter's number; puts the adapters into the object store."""
        if self.states is None:
            # A worker that never got an adapter answers with no version and no hash.
            return [Policy(-1, "", ())] * len(self.sha256)
        hashed = [(version, hash_state(state), state) for version, state in enumerate(self.states)]
        return [Policy(v, sha256, (ray.put(Adapter(v, sha256, state)),)) for v, sha256, state in hashed]


def load_adapters(section: GenerateSection) -> LoadedAdapters:
    """Read every adapter once, in the workers' type: a hash has to be of what they then hold.

    The base beside adapters is one more adapter of zeros, since a worker goes from one to the next in place.
    Raises ConfigError for an adapter that is unreadable or not this model's, and for adapters of unlike rank, alpha or
    targets.
    """
    read: dict[str, tuple[State, LoraSettings]] = {}
    problems: list[str] = []
    for name in dict.fromkeys(section.adapters):
        if name != BASE:
            try:
                found = load_adapter(recipes.resolve(section.model), recipes.resolve(name), section.dtype)
                read[name] = (found[1].tensors, found[0])
            except (OSError, ValueError) as error:
                problems.append(f"generate.adapters {name}: {error}")
    if problems:
        raise ConfigError(problems)
    if not read:
        return LoadedAdapters(UNTOUCHED, (None,) * len(section.adapters), None)
    kinds = {name: settings for name, (_, settings) in read.items()}
    if len(set(kinds.values())) > 1:
        listed = "; ".join(f"{name}: rank {s.rank}, alpha {s.alpha:g}" for name, s in kinds.items())
        raise ConfigError(
            [f"generate.adapters differ in rank, alpha or targets, and workers hold one kind: {listed}"]
        )
    (first, settings), *_ = read.values()
    nothing = {name: torch.zeros_like(tensor) for name, tensor in first.items()}
    return LoadedAdapters(
        settings,
        tuple(None if name == BASE else hash_state(read[name][0]) for name in section.adapters),
        tuple(nothing if name == BASE else read[name][0] for name in section.adapters),
    )


class Studio:
    """Running workers. policies: by the adapter's number. negative: reference to the encoded negative prompt."""

    def __init__(self, section: GenerateSection, adapters: LoadedAdapters) -> None:
        """Place and start the workers. Raises ClusterError, naming what is short or late."""
        connect()
        with PlacedActors(
            resource_plan(section),
            "generation",
            "lower generate.workers, generate.worker_cpus or generate.encode_workers, _cpus or _gpus",
            section.placement_timeout_s,
            key="generate.placement_timeout_s",
        ) as self._placed:
            self._start(section, adapters)
        self.policies = adapters.policies()
        self.dispatcher.submit(Call("encode", "negative", "encode_text", (section.negative_prompt,)))
        self.negative = ray.put(self.dispatcher.wait("encode").result)

    def _start(self, section: GenerateSection, adapters: LoadedAdapters) -> None:
        replica, encoder = replica_spec(section, adapters.settings), encoder_spec(section)
        start, restarts = self._placed.start, section.max_restarts
        rollouts = start("rollout", RolloutWorker, lambda kind, _: kind.remote(replica), restarts=restarts)
        encoders = start("encode", EncodeWorker, lambda kind, _: kind.remote(encoder), restarts=restarts)
        wait_ready(self._placed.by_role, section.start_timeout_s)
        self.dispatcher = Dispatcher(
            call_timeout_s=section.call_timeout_s,
            start_timeout_s=section.start_timeout_s,
            on_node=self._placed.on_node,
        )
        self.dispatcher.add_pool("rollout", rollouts)
        self.dispatcher.add_pool("encode", encoders)

    def close(self) -> None:
        """Stop every worker and give the room back."""
        self._placed.close()


def resource_plan(section: GenerateSection) -> ResourcePlan:
    """One bundle for each rollout worker, then one for each encoder."""
    gpus = 1.0 if section.device == "cuda" else 0.0
    rollouts = uniform_plan("rollout", section.workers, section.worker_cpus, gpus)
    encoders = [
        ActorPlan("encode", i, section.workers + i, section.encode_cpus, section.encode_gpus)
        for i in range(section.encode_workers)
    ]
    rooms = [bundle_of([(encoder.cpus, encoder.gpus)]) for encoder in encoders]
    return ResourcePlan((*rollouts.bundles, *rooms), (*rollouts.actors, *encoders))


def replica_spec(section: GenerateSection, lora: LoraSettings) -> ReplicaSpec:
    """What a rollout worker is built from."""
    return ReplicaSpec(
        model_path=str(recipes.resolve(section.model)),
        dtype=section.dtype,
        device=section.device,
        height=section.height,
        width=section.width,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        lora_targets=lora.targets,
        threads=section.threads,
    )


def encoder_spec(section: GenerateSection) -> EncoderSpec:
    """What the encode worker is built from."""
    return EncoderSpec(
        model_path=str(recipes.resolve(section.model)),
        dtype=section.dtype,
        device=section.device if section.encode_gpus else "cpu",
        height=section.height,
        width=section.width,
        max_sequence_length=section.max_sequence_length,
        cache_bytes=int(section.embedding_cache_gib * 2**30),
        threads=section.threads,
    )
