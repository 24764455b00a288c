"""The actors of an evaluation: rollout and encode workers where pictures are generated, reward workers always.

Placed like those of a run (`rl/loop/cluster.py`), without a learner; every wait is bounded.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from core.cluster.actors import actor_options, reserve, wait_ready
from core.cluster.dispatch import Dispatcher
from core.cluster.placement import ActorPlan, ResourcePlan
from models.lora.attach import LoraSettings
from rewards.base import RewardSet
from rewards.worker import RewardWorker
from rl.evaluate.plan import Plan
from rollout.encoder import EncoderSpec, EncodeWorker
from rollout.engine import ReplicaSpec
from rollout.worker import RolloutWorker

log = logging.getLogger(__name__)


@dataclass
class BenchmarkCluster:
    """Running actors. `encoder` None: nothing is generated."""

    dispatcher: Dispatcher
    encoder: Any
    group: Any
    actors: list[Any]

    def close(self) -> None:
        """Stop every actor and give the resources back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)


def make_placement(plan: Plan, *, generate: bool, score: bool) -> ResourcePlan:
    """One bundle per actor; an encode worker that wants a part of a GPU shares the first rollout worker's."""
    r = plan.resources
    gpu = 1.0 if r.device == "cuda" else 0.0
    bundles: list[dict[str, float]] = []
    actors: list[ActorPlan] = []

    def add(*members: tuple[str, int, float, float]) -> None:
        actors.extend(ActorPlan(role, index, len(bundles), cpus, gpus) for role, index, cpus, gpus in members)
        total = {"CPU": sum(member[2] for member in members), "GPU": sum(member[3] for member in members)}
        bundles.append({name: amount for name, amount in total.items() if amount})

    if generate:
        encode = ("encode", 0, r.encode_cpus, r.encode_gpus)
        joins = 0 < r.encode_gpus < gpu
        first = ("rollout", 0, r.rollout_cpus, gpu - r.encode_gpus if joins else gpu)
        if joins:
            add(first, encode)
        else:
            add(first)
            add(encode)
        for index in range(1, plan.workers):
            add(("rollout", index, r.rollout_cpus, gpu))
    for index in range(r.reward_workers if score else 0):
        add(("reward", index, r.reward_cpus, r.reward_gpus))
    return ResourcePlan(tuple(bundles), tuple(actors))


def start_cluster(plan: Plan, reward_sets: list[RewardSet], adapter: LoraSettings | None) -> BenchmarkCluster:
    """Place and start the actors: rollout and encode workers with an `adapter`, reward workers with `reward_sets`.

    Raises ClusterError, naming what is short, when it cannot in the stated time.
    """
    placement = make_placement(plan, generate=adapter is not None, score=bool(reward_sets))
    log.info("%d actors on %g CPU, %g GPU", len(placement.actors), placement.cpus, placement.gpus)
    way_out = "lower --workers or the {}s of --resources"
    group = reserve(placement, "the evaluation", way_out, plan.resources.placement_timeout_s)
    try:
        return _start_actors(plan, placement, reward_sets, adapter, group)
    except BaseException:
        remove_placement_group(group)
        raise


def _start_actors(
    plan: Plan,
    placement: ResourcePlan,
    reward_sets: list[RewardSet],
    adapter: LoraSettings | None,
    group: Any,
) -> BenchmarkCluster:
    resources = plan.resources
    actors: dict[str, list[Any]] = {"reward": [], "rollout": [], "encode": []}
    for place in placement.actors:
        options = actor_options(place, group, restarts=resources.max_restarts)
        if place.role == "reward":
            worker = RewardWorker.options(**options, max_concurrency=resources.reward_concurrency)
            actors["reward"].append(worker.remote(reward_sets, threads=resources.threads))
        elif place.role == "encode":
            encoder = EncodeWorker.options(**options, max_task_retries=resources.max_restarts)
            actors["encode"].append(encoder.remote(_encoder(plan)))
        elif adapter is not None:
            actors["rollout"].append(RolloutWorker.options(**options).remote(_replica(plan, adapter)))
    started = time.monotonic()
    wait_ready(actors, resources.start_timeout_s)
    log.info("all workers answered after %.1f s", time.monotonic() - started)
    dispatcher = Dispatcher(
        call_timeout_s=resources.call_timeout_s, start_timeout_s=resources.start_timeout_s
    )
    if actors["reward"]:
        dispatcher.add_pool("reward", actors["reward"], max_in_flight=resources.reward_concurrency)
    if actors["rollout"]:
        dispatcher.add_pool("rollout", actors["rollout"])
    everyone = [actor for found in actors.values() for actor in found]
    return BenchmarkCluster(dispatcher, next(iter(actors["encode"]), None), group, everyone)


def _replica(plan: Plan, adapter: LoraSettings) -> ReplicaSpec:
    return ReplicaSpec(
        model_path=str(plan.model),
        dtype=plan.sampling.dtype,
        device=plan.resources.device,
        height=plan.sampling.size,
        width=plan.sampling.size,
        lora_rank=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_targets=adapter.targets,
        threads=plan.resources.threads,
    )


def _encoder(plan: Plan) -> EncoderSpec:
    return EncoderSpec(
        model_path=str(plan.model),
        dtype=plan.sampling.dtype,
        device=plan.resources.device if plan.resources.encode_gpus else "cpu",
        height=plan.sampling.size,
        width=plan.sampling.size,
        max_sequence_length=plan.sampling.max_sequence_length,
        cache_bytes=2**28,
        threads=plan.resources.threads,
        vlm_path=None if plan.vlm is None else str(plan.vlm),
        position_mode=plan.position_mode,  # type: ignore[arg-type]
        negative_prompt=plan.sampling.negative_prompt,
    )
