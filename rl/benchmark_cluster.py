"""The actors of an evaluation: rollout and encode workers where pictures are generated, reward workers always.

Placed like those of a run (`rl/cluster.py`), without a learner: one bundle per actor, every wait bounded.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from models.lora import LoraSettings
from rewards.base import RewardSet
from rewards.worker import RewardWorker
from rl.benchmark_plan import Plan
from rl.benchmark_workers import SizedEncodeWorker, SizedRolloutWorker
from rl.cluster import ClusterError
from rl.dispatch import Dispatcher
from rollout.engine import ReplicaSpec
from rollout.worker import EncoderSpec

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


def bundles(plan: Plan, *, generate: bool, score: bool) -> dict[str, list[dict[str, float]]]:
    """What each actor asks for, by role."""
    r = plan.resources
    gpu = 1.0 if r.device == "cuda" else 0.0
    wanted = {"reward": [(r.reward_cpus, r.reward_gpus)] * r.reward_workers} if score else {}
    if generate:
        wanted["rollout"] = [(r.rollout_cpus, gpu)] * plan.workers
        wanted["encode"] = [(r.encode_cpus, r.encode_gpus)]
    return {role: [{"CPU": cpus, "GPU": gpus} for cpus, gpus in amounts] for role, amounts in wanted.items()}


def start_cluster(plan: Plan, reward_sets: list[RewardSet], adapter: LoraSettings | None) -> BenchmarkCluster:
    """Place and start the actors: rollout and encode workers with an `adapter`, reward workers with `reward_sets`.

    Raises ClusterError, naming what is short, when it cannot in the stated time.
    """
    roles = bundles(plan, generate=adapter is not None, score=bool(reward_sets))
    flat = [{k: v for k, v in bundle.items() if v} for found in roles.values() for bundle in found]
    for name in ("CPU", "GPU"):
        wanted, have = (
            sum(bundle.get(name, 0.0) for bundle in flat),
            ray.cluster_resources().get(name, 0.0),
        )
        log.info("%s: %g of the cluster's %g", name, wanted, have)
        if wanted > have + 1e-6:
            raise ClusterError(
                f"the evaluation needs {wanted:g} {name}s, the cluster has {have:g}; add nodes (ray start "
                f"--address=...), or lower --workers or the {name.lower()}s of --resources"
            )
    group = placement_group(flat, strategy="PACK")
    try:
        if not group.wait(timeout_seconds=plan.resources.placement_timeout_s):
            raise ClusterError(
                f"no room after placement_timeout_s={plan.resources.placement_timeout_s:g} s: the cluster is large "
                f"enough but busy ({ray.available_resources()} free); see `ray status`"
            )
        return _start_actors(plan, roles, reward_sets, adapter, group)
    except BaseException:
        remove_placement_group(group)
        raise


def _start_actors(
    plan: Plan,
    roles: dict[str, list[dict[str, float]]],
    reward_sets: list[RewardSet],
    adapter: LoraSettings | None,
    group: Any,
) -> BenchmarkCluster:
    resources = plan.resources
    places = iter(range(sum(len(found) for found in roles.values())))
    options = {
        role: [_options(bundle, group, next(places), resources.max_restarts) for bundle in found]
        for role, found in roles.items()
    }
    actors = {
        "reward": [
            RewardWorker.options(**one, max_concurrency=resources.reward_concurrency).remote(
                reward_sets, threads=resources.threads
            )
            for one in options.get("reward", ())
        ]
    }
    if adapter is not None:
        actors["rollout"] = [
            SizedRolloutWorker.options(**one).remote(_replica(plan, adapter)) for one in options["rollout"]
        ]
        actors["encode"] = [
            SizedEncodeWorker.options(**one, max_task_retries=resources.max_restarts).remote(_encoder(plan))
            for one in options["encode"]
        ]
    started = time.monotonic()
    _wait_ready(actors, resources.start_timeout_s)
    log.info("all workers answered after %.1f s", time.monotonic() - started)
    dispatcher = Dispatcher(
        call_timeout_s=resources.call_timeout_s, start_timeout_s=resources.start_timeout_s
    )
    if actors["reward"]:
        dispatcher.add_pool("reward", actors["reward"], max_in_flight=resources.reward_concurrency)
    if "rollout" in actors:
        dispatcher.add_pool("rollout", actors["rollout"])
    everyone = [actor for found in actors.values() for actor in found]
    return BenchmarkCluster(dispatcher, actors.get("encode", [None])[0], group, everyone)


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
    )


def _options(bundle: dict[str, float], group: Any, place: int, restarts: int) -> dict[str, Any]:
    return {
        "num_cpus": bundle["CPU"],
        "num_gpus": bundle["GPU"],
        "max_restarts": restarts,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=place
        ),
    }


def _wait_ready(roles: dict[str, list[Any]], timeout_s: float) -> None:
    """Every actor must answer `ready` within the limit; the first failure names its role and cause."""
    owners = {
        actor.ready.remote(): f"{role} worker {number}"
        for role, found in roles.items()
        for number, actor in enumerate(found)
    }
    pending, deadline = list(owners), time.monotonic() + timeout_s
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            late = ", ".join(owners[ref] for ref in pending)
            raise ClusterError(f"{late} did not start within start_timeout_s={timeout_s:g} s")
        try:
            ray.get(done[0], timeout=60)
        except Exception as error:
            raise ClusterError(f"{owners[done[0]]} could not start: {error}") from error
