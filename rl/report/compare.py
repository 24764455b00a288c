"""Several runs side by side: what each came to, which settings tell them apart, and the rows of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from core.statistics import bootstrap_mean, paired_bootstrap
from rl.report.evaluations import Scores
from rl.report.reading import Record, interval, number
from rl.report.runs import Run

_NOT_A_SETTING = ("name", "output_dir")
SEED = "seed"


@dataclass(frozen=True)
class Ends:
    """One score before training and at the last moment of a run. Values are per prompt, None where not scored."""

    before: Scores
    last: Scores


def ends(scores: Sequence[Scores]) -> dict[str, Ends]:
    """Score name -> its first and last moment, for the names that have a `before`; both are equal before training."""
    found: dict[str, Ends] = {}
    for entry in scores:
        if entry.moment == "before":
            found[entry.name] = Ends(entry, entry)
    for entry in scores:  # by step, so the last one stays
        if entry.name in found and not entry.moment.startswith("before"):
            found[entry.name] = Ends(found[entry.name].before, entry)
    return found


def ablation(runs: Sequence[Run], found: Sequence[Mapping[str, Ends]]) -> list[dict[str, Any]]:
    """One row for each setting; runs that differ by their seed only share a row.

    `{"setting", "runs", "seeds", "scores": {NAME: {"mean", "low", "high", "change": [mean, low, high], "seeds":
    [...]}}}`. Intervals are over prompts: with several seeds each prompt counts with its mean over the seeds.
    `seeds` has the change of each seed, whose spread the intervals do not cover.
    """
    settings = [flat_settings(run.config) for run in runs]
    rows: dict[str, list[int]] = {}
    for i, setting in enumerate(settings):
        key = repr(sorted((k, v) for k, v in setting.items() if k != SEED)) if setting else f"run {i}"
        rows.setdefault(key, []).append(i)
    names = list(dict.fromkeys(name for scores in found for name in scores))
    return [
        {
            "setting": _stage_line(runs[members[0]]),
            "runs": [runs[i].label for i in members],
            "scores": {name: _cell([found[i][name] for i in members if name in found[i]]) for name in names},
        }
        for members in rows.values()
    ]


def differing_settings(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs, as `{"key", "values"}`, values in the order of the runs."""
    settings = [flat_settings(run.config) for run in runs]
    keys = sorted({key for setting in settings for key in setting})
    return [
        {"key": key, "values": [setting.get(key) for setting in settings]}
        for key in keys
        if len({setting.get(key) for setting in settings}) > 1
    ]


def flat_settings(config: Record) -> dict[str, str]:
    """`learner.kl_beta` -> `0.004` and so on, for all that decides what a run does."""
    flat: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else str(key))
        elif isinstance(value, list) and value:
            for i, inner in enumerate(value):
                walk(inner, f"{path}[{i}]")
        else:
            flat[path] = "null" if value is None else str(value)

    walk({key: value for key, value in config.items() if key not in _NOT_A_SETTING}, "")
    return flat


def _stage_line(run: Run) -> str:
    stages = [f"{s.name} {s.steps}: {' + '.join(s.rewards) or 'no reward'}" for s in run.stages]
    return " → ".join(stages) or "no stages"


def _cell(members: Sequence[Ends]) -> dict[str, Any] | None:
    """The score of one row; None when no run of it has been evaluated, or their prompts differ in number."""
    lengths = {len(scores.values) for member in members for scores in (member.before, member.last)}
    if len(lengths) != 1:
        return None
    before = _by_prompt([member.before for member in members])
    last = _by_prompt([member.last for member in members])
    estimate, change = bootstrap_mean(last), paired_bootstrap(before, last)
    seeds = [bootstrap_mean(paired, resamples=1).mean for paired in map(_paired, members)]
    return {
        "mean": number(estimate.mean),
        "low": number(estimate.low),
        "high": number(estimate.high),
        "change": interval(change),
        "seeds": [number(seed) for seed in seeds],
    }


def _by_prompt(scores: Sequence[Scores]) -> list[float | None]:
    """Mean over runs of each prompt's score; None where a run lacks it, so that all prompts weigh the same."""
    columns = zip(*(entry.values for entry in scores), strict=True)
    return [
        None if None in column else sum(v for v in column if v is not None) / len(column)
        for column in columns
    ]


def _paired(member: Ends) -> list[float | None]:
    return [
        None if a is None or b is None else b - a
        for a, b in zip(member.before.values, member.last.values, strict=True)
    ]
