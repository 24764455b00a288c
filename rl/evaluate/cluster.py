"""The actors of an evaluation: rollout and encode workers where pictures are generated, reward workers always.

Placed like those of a run (`rl/loop/cluster.py`), without a learner; every wait is bounded.
"""

from __future__ import annotations

import logging

from core.cluster.actors import PlacedActors, wait_ready
from core.cluster.placement import ActorPlan, ResourcePlan, bundle_of
from models.lora.attach import LoraSettings
from rewards.base import RewardSet
from rl.evaluate.plan import Plan
from rl.recipe.schema import LoraConfig, ModelConfig
from rl.workers.start import Workers, encoder_spec, replica_spec, start_workers

log = logging.getLogger(__name__)


def make_placement(plan: Plan, *, generate: bool, score: bool) -> ResourcePlan:
    """One bundle per actor; encode workers that want a part of a GPU share a rollout worker's, in turn."""
    r = plan.resources
    gpu = 1.0 if r.device == "cuda" else 0.0
    bundles: list[dict[str, float]] = []
    actors: list[ActorPlan] = []

    def add(*members: tuple[str, int, float, float]) -> None:
        actors.extend(ActorPlan(role, index, len(bundles), cpus, gpus) for role, index, cpus, gpus in members)
        bundles.append(bundle_of([member[2:] for member in members]))

    if generate:
        encoders = [("encode", i, r.encode_cpus, r.encode_gpus) for i in range(r.encode_workers)]
        joins = 0 < r.encode_gpus < gpu
        for index in range(plan.workers):
            mine = [encoder for encoder in encoders if joins and encoder[1] % plan.workers == index]
            left = max(0.0, gpu - len(mine) * r.encode_gpus)
            add(("rollout", index, r.rollout_cpus, left), *mine)
            for encoder in [] if joins or index else encoders:
                add(encoder)
    for index in range(r.reward_workers if score else 0):
        add(("reward", index, r.reward_cpus, r.reward_gpus))
    return ResourcePlan(tuple(bundles), tuple(actors))


def start_cluster(plan: Plan, reward_sets: list[RewardSet], adapter: LoraSettings | None) -> Workers:
    """Place and start the actors: rollout and encode workers with an `adapter`, reward workers with `reward_sets`.

    Raises ClusterError, naming what is short, when it cannot in the stated time.
    """
    placement = make_placement(plan, generate=adapter is not None, score=bool(reward_sets))
    resources, sampling = plan.resources, plan.sampling
    log.info("%d actors on %g CPU, %g GPU", len(placement.actors), placement.cpus, placement.gpus)
    replica = encoder = None
    if adapter is not None:
        lora = LoraConfig(adapter.rank, adapter.alpha, list(adapter.targets))
        model = ModelConfig(
            str(plan.model), None if plan.vlm is None else str(plan.vlm), plan.position_mode, dtype=sampling.dtype,
            height=sampling.size, width=sampling.size, max_sequence_length=sampling.max_sequence_length,
            embedding_cache_gib=0.25, lora=lora,
        )  # fmt: skip
        replica = replica_spec(model, resources)
        encoder = encoder_spec(model, resources, sampling.negative_prompt)
    with PlacedActors(
        placement,
        "the evaluation",
        "lower --workers or the {}s of --resources",
        resources.placement_timeout_s,
        key="--resources placement_timeout_s",
    ) as placed:
        workers = start_workers(placed, replica, encoder, reward_sets, resources)
        wait_ready(placed.by_role, resources.start_timeout_s)
        return workers
