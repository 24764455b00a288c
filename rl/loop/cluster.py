"""Connects to Ray, waits (bounded) for the planned resources, and starts the actors of every role."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group

import recipes
from core.cluster.actors import ClusterError, actor_options, wait_ready
from core.cluster.dispatch import Dispatcher
from core.cluster.placement import ActorPlan, ResourcePlan, describe_plan, shortage
from rewards.base import RewardSet
from rewards.worker import RewardWorker
from rl.learner.worker import LearnerGroup, LearnerSpec, LearnerWorker
from rl.recipe.placement import plan_title
from rl.recipe.schema import RunConfig
from rollout.encoder import EncoderSpec, EncodeWorker
from rollout.engine import ReplicaSpec
from rollout.sampler import SamplingSpec
from rollout.worker import RolloutWorker

log = logging.getLogger(__name__)


@dataclass
class Cluster:
    """Running actors of all roles."""

    dispatcher: Dispatcher
    learner: LearnerGroup
    encoder: Any
    group: Any
    actors: list[Any]

    def close(self) -> None:
        """Stop every actor and give the resources back."""
        for actor in self.actors:
            ray.kill(actor)
        remove_placement_group(self.group)


def replica_spec(config: RunConfig) -> ReplicaSpec:
    """What a DiT replica is built from, on any node."""
    return ReplicaSpec(
        model_path=str(recipes.resolve(config.model.path)),
        dtype=config.model.dtype,
        device=config.resources.device,
        height=config.model.height,
        width=config.model.width,
        lora_rank=config.model.lora.rank,
        lora_alpha=config.model.lora.alpha,
        lora_targets=tuple(config.model.lora.targets),
        threads=config.resources.threads,
        compile=config.model.compile,
    )


def training_spec(config: RunConfig) -> SamplingSpec:
    """How training trajectories are drawn and replayed."""
    r = config.rollout
    return SamplingSpec(
        r.num_steps,
        r.noise_level,
        r.guidance_scale,
        r.variant,  # type: ignore[arg-type]
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
    short = shortage(plan, ray.cluster_resources())
    if short:
        raise ClusterError("; ".join(short))
    group = placement_group(list(plan.bundles), strategy="PACK")
    try:
        if not group.wait(timeout_seconds=resources.placement_timeout_s):
            raise ClusterError(
                f"no room for the plan after resources.placement_timeout_s={resources.placement_timeout_s:g} s: "
                f"the cluster is large enough ({ray.cluster_resources()}) but busy ({ray.available_resources()} "
                "free), or no single node can hold one bundle; see `ray status`"
            )
        return _start_actors(config, plan, reward_sets, group)
    except BaseException:
        remove_placement_group(group)
        raise


def _start_actors(config: RunConfig, plan: ResourcePlan, reward_sets: list[RewardSet], group: Any) -> Cluster:
    resources, replica = config.resources, replica_spec(config)
    inprocess = resources.placement == "inprocess"
    learner_spec = LearnerSpec(
        replica,
        config.learner,
        training_spec(config),
        config.seed,
        inprocess,
        config.model.gradient_checkpointing,
        collective_timeout_s=resources.call_timeout_s,
    )
    ranks = plan.of("learner")
    learners = [
        LearnerWorker.options(**actor_options(actor, group, restarts=0)).remote(
            learner_spec, actor.index, len(ranks)
        )
        for actor in ranks
    ]
    rollouts = (
        learners
        if inprocess
        else [
            RolloutWorker.options(**actor_options(actor, group, restarts=resources.max_restarts)).remote(
                replica
            )
            for actor in plan.of("rollout")
        ]
    )
    rewards = [
        RewardWorker.options(
            **actor_options(actor, group, restarts=resources.max_restarts),
            max_concurrency=resources.reward_concurrency,
        ).remote(reward_sets, threads=resources.threads)
        for actor in plan.of("reward")
    ]
    encoder = _start_encoder(config, plan.of("encode")[0], group)
    dispatcher = Dispatcher(
        call_timeout_s=resources.call_timeout_s, start_timeout_s=resources.start_timeout_s
    )
    started = time.monotonic()
    learner = LearnerGroup(
        learners, call_timeout_s=resources.call_timeout_s, start_timeout_s=resources.start_timeout_s
    )
    wait_ready({"rollout": rollouts, "reward": rewards, "encode": [encoder]}, resources.start_timeout_s)
    log.info("all workers answered after %.1f s", time.monotonic() - started)
    dispatcher.add_pool("rollout", rollouts, floor=1 if inprocess else resources.min_rollout_workers)
    dispatcher.add_pool("reward", rewards, max_in_flight=resources.reward_concurrency)
    actors = [*learners, *([] if inprocess else rollouts), *rewards, encoder]
    return Cluster(dispatcher, learner, encoder, group, actors)


def encoder_spec(config: RunConfig) -> EncoderSpec:
    """What the encode worker is built from."""
    return EncoderSpec(
        model_path=str(recipes.resolve(config.model.path)),
        dtype=config.model.dtype,
        device=config.resources.device if config.resources.encode_gpus else "cpu",
        height=config.model.height,
        width=config.model.width,
        max_sequence_length=config.model.max_sequence_length,
        cache_bytes=int(config.model.embedding_cache_gib * 2**30),
        threads=config.resources.threads,
        vlm_path=None if config.model.vlm is None else str(recipes.resolve(config.model.vlm)),
        position_mode=config.model.position_mode,  # type: ignore[arg-type]
        negative_prompt=config.rollout.negative_prompt,
    )


def _start_encoder(config: RunConfig, actor: ActorPlan, group: Any) -> Any:
    """Encoding is a function of its arguments alone, so Ray itself may restart the worker and repeat the call."""
    options = actor_options(actor, group, restarts=config.resources.max_restarts)
    options |= {"max_task_retries": config.resources.max_restarts}
    return EncodeWorker.options(**options).remote(encoder_spec(config))
