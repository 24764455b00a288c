"""Who sits in which bundle of a placement group, and whether a cluster can hold it. Pure; nothing here touches Ray."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ActorPlan:
    """One actor: its role and number, the bundle it sits in, and what it asks for of that bundle."""

    role: str
    index: int
    bundle: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class ResourcePlan:
    """bundles: the placement group's resources; actors: who sits where."""

    bundles: tuple[dict[str, float], ...]
    actors: tuple[ActorPlan, ...]

    @property
    def cpus(self) -> float:
        return sum(bundle.get("CPU", 0.0) for bundle in self.bundles)

    @property
    def gpus(self) -> float:
        return sum(bundle.get("GPU", 0.0) for bundle in self.bundles)

    def of(self, role: str) -> list[ActorPlan]:
        return [actor for actor in self.actors if actor.role == role]


RL_REMEDY = "lower learner.ranks, rollout.workers or resources.*_{key}"


def shortage(
    plan: ResourcePlan,
    available: dict[str, float],
    *,
    what: str = "the plan",
    remedy: str = RL_REMEDY,
) -> list[str]:
    """What the cluster lacks, one line per resource; empty when the plan fits in total.

    Args:
        what: who asks, as messages begin.
        remedy: how to ask for less; `{}` becomes CPU or GPU, `{key}` cpus or gpus.
    """
    lines = []
    for name, wanted in (("CPU", plan.cpus), ("GPU", plan.gpus)):
        have = available.get(name, 0.0)
        if wanted > have + 1e-6:
            lines.append(
                f"{what} needs {wanted:g} {name}s, the cluster has {have:g}; add nodes (ray start --address=...) or "
                + remedy.format(name, key=f"{name.lower()}s")
            )
    return lines


def bundle_of(members: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The bundle that holds actors of these CPUs and GPUs."""
    total = {
        "CPU": round(sum(cpus for cpus, _ in members), 4),
        "GPU": round(sum(gpus for _, gpus in members), 4),
    }
    return {name: amount for name, amount in total.items() if amount}


def uniform_plan(role: str, count: int, cpus: float, gpus: float) -> ResourcePlan:
    """`count` actors of one role, each in a bundle of its own."""
    actors = tuple(ActorPlan(role, index, index, cpus, gpus) for index in range(count))
    return ResourcePlan((bundle_of([(cpus, gpus)]),) * count, actors)


def describe_plan(plan: ResourcePlan, title: str) -> list[str]:
    """The plan as lines for the log: `title`, one line per role, then the total."""
    lines = [f"{title}: {len(plan.bundles)} bundles"]
    for role in ("learner", "rollout", "reward", "encode"):
        actors = plan.of(role)
        if actors:
            first = actors[0]
            lines.append(f"  {role:8} {len(actors)} x ({first.cpus:g} CPU, {first.gpus:g} GPU)")
    lines.append(f"  total    {plan.cpus:g} CPU, {plan.gpus:g} GPU")
    return lines
