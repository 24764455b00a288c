"""The resource plan: which roles need which CPUs and GPUs. Pure functions; nothing here touches Ray.

`shared`: one bundle per learner rank holds the rank and its rollout workers, which take turns on one GPU; encode
workers that want a GPU and reward workers that want a part of one join them in turn.
`separate`: one bundle per worker and per rank. `inprocess`: one bundle per rank, which also samples.
Otherwise reward and encode workers have bundles of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

from core.cluster.placement import ActorPlan, ResourcePlan
from rl.recipe.schema import ResourcesConfig, RunConfig


def make_plan(config: RunConfig) -> ResourcePlan:
    """The plan of a recipe. Expects a validated config (see `rl/recipe/validate.py`)."""
    resources, ranks, workers = config.resources, config.learner.ranks, config.rollout.workers
    gpu = 1.0 if resources.device == "cuda" else 0.0
    bundles: list[dict[str, float]] = []
    actors: list[ActorPlan] = []

    def add(members: Sequence[tuple[str, int, float, float]]) -> None:
        for role, index, cpus, gpus in members:
            actors.append(ActorPlan(role, index, len(bundles), cpus, gpus))
        total = {"CPU": round(sum(m[2] for m in members), 4), "GPU": round(sum(m[3] for m in members), 4)}
        bundles.append({name: amount for name, amount in total.items() if amount})

    encoders = [("encode", worker, resources.encode_cpus) for worker in range(resources.encode_workers)]
    shared = resources.placement == "shared"
    encode_joins = shared and resources.encode_gpus > 0
    rewards_join = shared and 0 < resources.reward_gpus < gpu
    rewards = [("reward", worker, resources.reward_cpus) for worker in range(resources.reward_workers)]
    if shared:
        for rank in range(ranks):
            mine: list[tuple[str, int, float]] = [("learner", rank, resources.learner_cpus)]
            mine += [("rollout", w, resources.rollout_cpus) for w in range(workers) if w % ranks == rank]
            mine += [encoder for encoder in encoders if encode_joins and encoder[1] % ranks == rank]
            mine += [reward for reward in rewards if rewards_join and reward[1] % ranks == rank]
            add([(*member, gpu / len(mine)) for member in mine])
    else:
        for rank in range(ranks):
            add([("learner", rank, resources.learner_cpus, gpu)])
        if resources.placement == "separate":
            for worker in range(workers):
                add([("rollout", worker, resources.rollout_cpus, gpu)])
    for reward in [] if rewards_join else rewards:
        add([(*reward, resources.reward_gpus)])
    for encoder in [] if encode_joins else encoders:
        add([(*encoder, resources.encode_gpus)])
    return ResourcePlan(tuple(bundles), tuple(actors))


def plan_title(resources: ResourcesConfig) -> str:
    """How the printed plan begins."""
    return f"placement {resources.placement} on {resources.device}"
