"""Places a run's actors and waits, bounded, until every role has started."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import ray

import recipes
from core.cluster.actors import PlacedActors, wait_ready
from core.cluster.placement import RL_REMEDY, ResourcePlan, describe_plan
from core.cluster.ranks import NodeLost, RankLost
from core.inputs import Inputs
from rewards.base import RewardSet, reward_label
from rewards.inputs import code_name
from rewards.worker import RewardWorkerInfo
from rl.learner.learner import LearnerSpec
from rl.learner.worker import LearnerGroup, LearnerWorker
from rl.recipe.placement import plan_title
from rl.recipe.schema import ResourcesConfig, RunConfig
from rl.recipe.shapes import count_shapes
from rl.workers.start import Workers, encoder_spec, replica_spec, start_workers
from rollout.sampler import SamplingSpec

log = logging.getLogger(__name__)


@dataclass
class Cluster:
    """Running actors of all roles; `spec` is what each learner rank is built from, `served` the sha256 of
    the code of served rewards, by the name of their identity."""

    workers: Workers
    learner: LearnerGroup
    spec: LearnerSpec
    resources: ResourcesConfig
    served: dict[str, str]

    def restart_learner(self) -> None:
        """Replace all ranks by fresh ones in the same bundles. Raises RankLost where they do not come up in time.

        Ray knows that a node left only after a while; ranks that it placed there until then are placed once more.
        """
        try:
            self._replace_ranks()
        except NodeLost as error:
            log.warning("the ranks are placed once more: %s", error)
            self._replace_ranks()

    def _replace_ranks(self) -> None:
        placed = self.workers.placed
        placed.stop("learner")
        self.workers.dispatcher.abandon()
        ranks = _place_ranks(placed, self.spec)
        if self.spec.inprocess:
            self.workers.dispatcher.add_pool("rollout", ranks)
        try:
            self.learner = _join(ranks, self.resources)
        except RankLost as error:
            without = [rank for rank in range(len(ranks)) if not placed.on_node("learner", rank)]
            if without and not isinstance(error, NodeLost):
                raise RankLost(f"no node has room for ranks {without} (see `ray status`): {error}") from error
            raise


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


def start_cluster(
    config: RunConfig, plan: ResourcePlan, reward_sets: list[RewardSet], inputs: Inputs
) -> Cluster:
    """Place and start all actors. Raises ClusterError, naming what is short, when it cannot in the stated time, and
    where a node has another base model than this one (`inputs`)."""
    resources = config.resources
    for line in describe_plan(plan, plan_title(resources)):
        log.info(line)
    key = "resources.placement_timeout_s"
    log.info(
        "%d processes start and load their models, within %g s (resources.start_timeout_s)",
        len(plan.actors), resources.start_timeout_s,
    )  # fmt: skip
    with PlacedActors(plan, "the plan", RL_REMEDY, resources.placement_timeout_s, key=key) as placed:
        inprocess, replica = (
            resources.placement == "inprocess",
            replica_spec(config.model, resources, inputs.held, shapes=count_shapes(config)),
        )
        spec = LearnerSpec(
            replica, config.learner, training_spec(config), config.seed, inprocess,
            config.model.gradient_checkpointing, resources.call_timeout_s, resources.start_timeout_s,
            None if config.model.adapter is None else str(recipes.resolve(config.model.adapter)),
        )  # fmt: skip
        ranks = _place_ranks(placed, spec)
        workers = start_workers(
            placed, replica, encoder_spec(config.model, resources, config.rollout.negative_prompt, inputs.held),
            reward_sets, resources, ranks=ranks if inprocess else None,
            floor=1 if inprocess else resources.min_rollout_workers, held=inputs.held,
        )  # fmt: skip
        learner = _join(ranks, resources)
        wait_ready(placed.by_role, resources.start_timeout_s)
        info = ray.get(placed.by_role["reward"][0].ping.remote(), timeout=60)
        return Cluster(workers, learner, spec, resources, _served(reward_sets, info))


def _place_ranks(placed: PlacedActors, spec: LearnerSpec) -> list[Any]:
    size = len(placed.plan.of("learner"))
    return placed.start(
        "learner", LearnerWorker, lambda kind, rank: kind.remote(spec, rank, size), restarts=0
    )


def _join(ranks: list[Any], resources: ResourcesConfig) -> LearnerGroup:
    return LearnerGroup(
        ranks, call_timeout_s=resources.call_timeout_s, start_timeout_s=resources.start_timeout_s
    )


def _served(reward_sets: list[RewardSet], info: RewardWorkerInfo) -> dict[str, str]:
    """What services say of the code of their rewards, where it is a file."""
    found = {}
    for reward_set in reward_sets:
        for spec in reward_set.rewards:
            sha256 = info.sources[reward_set.name][reward_label(spec)].sha256
            if spec.service is not None and sha256 is not None:
                found[code_name(spec)] = sha256
    return found
