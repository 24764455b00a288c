"""Places a run's actors and waits, bounded, until every role has started."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from core.cluster.actors import PlacedActors, wait_ready
from core.cluster.placement import RL_REMEDY, ResourcePlan, describe_plan
from rewards.base import RewardSet
from rl.learner.learner import LearnerSpec
from rl.learner.worker import LearnerGroup, LearnerWorker
from rl.recipe.placement import plan_title
from rl.recipe.schema import ResourcesConfig, RunConfig
from rl.workers.start import Workers, encoder_spec, replica_spec, start_workers
from rollout.sampler import SamplingSpec

log = logging.getLogger(__name__)


@dataclass
class Cluster:
    """Running actors of all roles; `spec` is what each learner rank is built from."""

    workers: Workers
    learner: LearnerGroup
    spec: LearnerSpec
    resources: ResourcesConfig

    def restart_learner(self) -> None:
        """Replace all ranks by fresh ones in the same bundles. Raises RankLost where they do not come up in time."""
        placed = self.workers.placed
        placed.stop("learner")
        self.workers.dispatcher.abandon()
        ranks = _place_ranks(placed, self.spec)
        if self.spec.inprocess:
            self.workers.dispatcher.add_pool("rollout", ranks)
        self.learner = _join(ranks, self.resources)


def training_spec(config: RunConfig) -> SamplingSpec:
    """How training trajectories are drawn and replayed."""
    r = config.rollout
    return SamplingSpec(
        r.num_steps,
        r.noise_level,
        r.guidance_scale,
        r.variant,
        r.window_size,
        r.window_first,
        r.window_last,
        r.branch,
    )


def start_cluster(config: RunConfig, plan: ResourcePlan, reward_sets: list[RewardSet]) -> Cluster:
    """Place and start all actors. Raises ClusterError, naming what is short, when it cannot in the stated time."""
    resources = config.resources
    for line in describe_plan(plan, plan_title(resources)):
        log.info(line)
    key = "resources.placement_timeout_s"
    with PlacedActors(plan, "the plan", RL_REMEDY, resources.placement_timeout_s, key=key) as placed:
        inprocess, replica = resources.placement == "inprocess", replica_spec(config.model, resources)
        spec = LearnerSpec(
            replica, config.learner, training_spec(config), config.seed, inprocess,
            config.model.gradient_checkpointing, collective_timeout_s=resources.call_timeout_s,
        )  # fmt: skip
        ranks = _place_ranks(placed, spec)
        workers = start_workers(
            placed, replica, encoder_spec(config.model, resources, config.rollout.negative_prompt), reward_sets,
            resources, ranks=ranks if inprocess else None, floor=1 if inprocess else resources.min_rollout_workers,
        )  # fmt: skip
        learner = _join(ranks, resources)
        wait_ready(placed.by_role, resources.start_timeout_s)
        return Cluster(workers, learner, spec, resources)


def _place_ranks(placed: PlacedActors, spec: LearnerSpec) -> list[Any]:
    size = len(placed.plan.of("learner"))
    return placed.start(
        "learner", LearnerWorker, lambda kind, rank: kind.remote(spec, rank, size), restarts=0
    )


def _join(ranks: list[Any], resources: ResourcesConfig) -> LearnerGroup:
    return LearnerGroup(
        ranks, call_timeout_s=resources.call_timeout_s, start_timeout_s=resources.start_timeout_s
    )
