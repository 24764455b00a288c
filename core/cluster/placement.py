"""Who sits in which bundle of a placement group, and whether a cluster can hold it. Pure; nothing here touches Ray."""

from __future__ import annotations

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


def shortage(plan: ResourcePlan, available: dict[str, float]) -> list[str]:
    """What the cluster lacks, one line per resource; empty when the plan fits in total."""
    lines = []
    for name, wanted in (("CPU", plan.cpus), ("GPU", plan.gpus)):
        have = available.get(name, 0.0)
        if wanted > have + 1e-6:
            lines.append(f"the plan needs {wanted:g} {name}s, the cluster has {have:g}; {_way_out(name)}")
    return lines


def _way_out(name: str) -> str:
    keys = "learner.ranks, rollout.workers or resources.*_" + ("cpus" if name == "CPU" else "gpus")
    return f"add nodes (ray start --address=...) or lower {keys}"


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
