"""The rollout and encode workers of RL, started for generation: the same actors, without learner and rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import recipes
from core.cluster.actors import ClusterError, connect
from core.cluster.dispatch import Dispatcher
from core.recipe import ConfigError
from models.components import torch_dtype
from models.lora.attach import Adapter, LoraSettings, State, hash_state
from models.lora.files import read_adapter
from models.lora.targets import DEFAULT_TARGETS
from rewards.editreward.data.generate_config import BASE, GenerateSection
from rollout.encoder import EncoderSpec, EncodeWorker
from rollout.engine import ReplicaSpec
from rollout.worker import Policy, RolloutWorker

log = logging.getLogger(__name__)
UNTOUCHED = LoraSettings(rank=1, alpha=1.0, targets=tuple(DEFAULT_TARGETS))
"""What workers attach where no adapter is named; its B is 0, so it adds exactly nothing."""


@dataclass(frozen=True)
class LoadedAdapters:
    """All adapters of a recipe, in its order. sha256: None for the base. states: None while there is only the base."""

    settings: LoraSettings
    sha256: tuple[str | None, ...]
    states: tuple[State, ...] | None


@dataclass
class Studio:
    """Running workers. policies: by the adapter's number. negative: reference to the encoded negative prompt."""

    dispatcher: Dispatcher
    encoder: Any
    policies: list[Policy]
    negative: Any
    actors: list[Any]
    group: Any

    def close(self) -> None:
        """Stop every worker and give the room back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)


def load_adapters(section: GenerateSection) -> LoadedAdapters:
    """Read every adapter once, in the workers' type.

    The base beside adapters is one more adapter of zeros, since a worker goes from one to the next in place.
    Raises ConfigError for an unreadable adapter, and for adapters of unlike rank, alpha or targets.
    """
    read: dict[str, tuple[State, LoraSettings]] = {}
    problems: list[str] = []
    for name in dict.fromkeys(section.adapters):
        if name != BASE:
            try:
                state, settings = read_adapter(Path(recipes.resolve(name)))
                read[name] = (_cast(state, section.dtype), settings)
            except (OSError, ValueError) as error:
                problems.append(f"generate.adapters: {error}")
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


def start_studio(section: GenerateSection, adapters: LoadedAdapters) -> Studio:
    """Place and start the workers. Raises ClusterError, naming what is short or late."""
    connect()
    gpu = 1.0 if section.device == "cuda" else 0.0
    bundles = [_bundle(section.worker_cpus, gpu)] * section.workers
    bundles.append(_bundle(section.encode_cpus, section.encode_gpus))
    _check_room(bundles)
    group = placement_group(bundles, strategy="PACK")
    actors: list[Any] = []
    try:
        if not group.wait(timeout_seconds=section.placement_timeout_s):
            raise ClusterError(
                f"no room for {section.workers} workers after generate.placement_timeout_s="
                f"{section.placement_timeout_s:g} s: the cluster is large enough but busy "
                f"({ray.available_resources()} free); see `ray status`"
            )
        replica = _replica_spec(section, adapters.settings)
        for number in range(section.workers):
            options = _options(group, number, section.worker_cpus, gpu, section.max_restarts)
            actors.append(RolloutWorker.options(**options).remote(replica))
        options = _options(
            group, section.workers, section.encode_cpus, section.encode_gpus, section.max_restarts
        )
        encoder: Any = EncodeWorker.options(**options, max_task_retries=section.max_restarts).remote(
            _encoder_spec(section)
        )
        actors.append(encoder)
        _wait_ready(actors, section.start_timeout_s)
    except BaseException:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)
        raise
    dispatcher = Dispatcher(call_timeout_s=section.call_timeout_s, start_timeout_s=section.start_timeout_s)
    dispatcher.add_pool("rollout", actors[:-1])
    negative = encoder.encode_text.remote(section.negative_prompt)
    return Studio(dispatcher, encoder, _policies(adapters), negative, actors, group)


def _policies(adapters: LoadedAdapters) -> list[Policy]:
    if adapters.states is None:
        # A worker that never got an adapter answers with no version and no hash.
        return [Policy(-1, "", ())] * len(adapters.sha256)
    policies = []
    for version, state in enumerate(adapters.states):
        sha256 = hash_state(state)
        policies.append(Policy(version, sha256, (ray.put(Adapter(version, sha256, state)),)))
    return policies


def _check_room(bundles: Sequence[Mapping[str, float]]) -> None:
    there = ray.cluster_resources()
    short = [
        f"generation needs {wanted:g} {name}s, the cluster has {there.get(name, 0.0):g}; lower generate.workers or "
        f"generate.{'worker_cpus' if name == 'CPU' else 'encode_gpus'}, or add nodes"
        for name in ("CPU", "GPU")
        if (wanted := sum(bundle.get(name, 0.0) for bundle in bundles)) > there.get(name, 0.0) + 1e-6
    ]
    if short:
        raise ClusterError("; ".join(short))


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _options(group: Any, bundle: int, cpus: float, gpus: float, restarts: int) -> dict[str, Any]:
    return {
        "num_cpus": cpus,
        "num_gpus": gpus,
        "max_restarts": restarts,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=bundle
        ),
    }


def _wait_ready(actors: Sequence[Any], timeout_s: float) -> None:
    try:
        ray.get([actor.ready.remote() for actor in actors], timeout=timeout_s)
    except GetTimeoutError as error:
        raise ClusterError(
            f"the workers did not all start within generate.start_timeout_s={timeout_s:g} s"
        ) from error
    except RayError as error:
        raise ClusterError(f"a worker could not start: {getattr(error, 'cause', None) or error}") from error


def _replica_spec(section: GenerateSection, lora: LoraSettings) -> ReplicaSpec:
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


def _encoder_spec(section: GenerateSection) -> EncoderSpec:
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


def _cast(state: State, dtype: str) -> State:
    """Workers hold adapters in the model's type; a hash has to be of what they then hold."""
    return {name: tensor.to(torch_dtype(dtype)) for name, tensor in state.items()}
