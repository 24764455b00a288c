"""The schema of the section `label`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Le

from core.keys import Count, Positive, Share
from core.recipe import value_problems
from rewards.editreward.config import Header
from rewards.judge.settings import KEYS, JudgeSettings
from rewards.parameters import choice_problems


@dataclass
class LabelSection:
    """Which edits the judge grades, and how."""

    shards: list[str] = field(default_factory=list)
    """Paths or globs; empty: those that `generate` wrote in the run's folder."""
    output: str | None = None
    """Folder of the labelled shards; null: `labelled/` in the run's folder."""
    judge: dict[str, Any] = field(default_factory=dict)
    """Fields of `JudgeSettings` (model, base_url, cache, max_cost_usd ...); its cache is `judge.sqlite` in the run's
    folder unless named, since a continued run takes its answers from there."""
    template: str | None = None
    """File with the question; null: the packaged one."""
    max_asks: Annotated[Count, Le(5)] = 2
    """Times that an edit is asked about, at most, until there is a usable answer."""
    max_tokens: Count = 512
    """Tokens of an answer."""
    second_opinions: Share = 0.02
    """Share of the edits that are asked about twice, to see how far the judge agrees with itself."""
    give_up_after_s: Positive = 600.0
    """Seconds of silence at the endpoint after which the run stops."""


def judge_settings(header: Header, section: LabelSection) -> JudgeSettings:
    """The client's settings; `label_problems` has found them complete."""
    return JudgeSettings(**({"cache": str(header.run_dir / "judge.sqlite")} | section.judge))


def label_problems(header: Header, section: LabelSection) -> list[str]:
    """Every value that is unknown or out of range, one sentence each."""
    problems = choice_problems("key of label.judge", section.judge, KEYS)
    if "model" not in section.judge:
        problems.append("label.judge.model has no value; give the name of the model at the endpoint")
    if not problems:
        problems += [f"label.judge: {problem}" for problem in judge_settings(header, section).problems()]
    return problems + value_problems(section, "label.")
