"""Alarms on held-out prompts: a trained task that gets worse, by itself or while the trained reward rises (hacking);
what an alarm of a run is, and whether it stops the run (`alarms` in a recipe)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from core.statistics import Difference, paired_bootstrap
from core.stopping import StopRun
from rl.recipe.schema import AlarmsConfig
from rl.record.evaluation import TaskScores


@dataclass(frozen=True)
class Alarm:
    """`names`: keys of `alarms` in the recipe that decide what it does; any of them may stop the run."""

    line: str
    names: tuple[str, ...]


def stop_for(alarms: Sequence[Alarm], config: AlarmsConfig) -> None:
    """Raise StopRun where the recipe stops for one of them."""
    for alarm in alarms:
        stopping = [f"alarms.{name}=" for name in alarm.names if getattr(config, name) == "stop"]
        if stopping:
            keys, warn = (" ".join(key + to for key in stopping) for to in ("stop", "warn"))
            raise StopRun(f"{keys}: {alarm.line}; to go on from here all the same add {warn} to the command")


def reward_hacking(stage: str, trained: Sequence[str], before: TaskScores, now: TaskScores) -> list[str]:
    """One line for each label of `trained` (the stage's rewards) whose held-out score rose since `before`, the
    stage's start, while the task's own score fell; each beyond its 95 % interval over prompts.

    A label is looked at where the evaluation lists it with weight 0, so that it is scored on held-out prompts
    without being part of the score it is held against.
    """
    trusted = paired_bootstrap(before.rewards, now.rewards)
    if not _fell(trusted):
        return []
    lines = []
    for label in trained:
        if label not in before.components or label not in now.components:
            continue
        learned = paired_bootstrap(before.components[label], now.components[label])
        if _rose(learned):
            lines.append(
                f"reward hacking: over stage {stage!r}, at step {now.step}, the trained reward {label} rose on "
                f"held-out prompts by {_signed(learned)} while the score that is trusted fell by {_signed(trusted)}; "
                "use an earlier checkpoint's adapter, and train anew with another reward or a higher learner.kl_beta"
            )
    return lines


def trained_task_fell(stage: str, before: TaskScores, now: TaskScores) -> list[str]:
    """A line where the task that a stage trains has fallen since `before`, the stage's start, beyond its 95 % interval
    over prompts."""
    change = paired_bootstrap(before.rewards, now.rewards)
    if not _fell(change):
        return []
    return [
        f"the trained task fell: over stage {stage!r}, at step {now.step}, {now.task} changed by {_signed(change)} on "
        "held-out prompts; use an earlier checkpoint's adapter, or train anew with a lower learner.learning_rate "
        "or a higher learner.kl_beta"
    ]


def _rose(change: Difference) -> bool:
    return change.low is not None and change.low > 0


def _fell(change: Difference) -> bool:
    return change.high is not None and change.high < 0


def _signed(change: Difference) -> str:
    return f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
