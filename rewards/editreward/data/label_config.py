"""The schema of the section `label`."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.editreward.data.generate_config import Header
from rewards.judge.settings import JudgeSettings


@dataclass
class LabelSection:
    """Which edits the judge grades, and how.

    `shards`: paths or globs; empty: those that `generate` wrote in the run's folder. `output: null` is `labelled/`
    in the run's folder. `judge`: the fields of `JudgeSettings` (model, base_url, cache, max_cost_usd ...); its cache
    is `judge.sqlite` in the run's folder unless named, since a continued run takes its answers from there.
    `template: null` is the packaged question. `second_opinions`: share of the edits that are asked about twice, to
    see how far the judge agrees with itself. `give_up_after_s`: of silence at the endpoint, then the run stops.
    """

    shards: list[str] = field(default_factory=list)
    output: str | None = None
    judge: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    max_asks: int = 2
    max_tokens: int = 512
    second_opinions: float = 0.02
    give_up_after_s: float = 600.0


def input_patterns(header: Header, section: LabelSection) -> list[str]:
    """Where the edits are."""
    return section.shards or [str(header.run_dir / "edits" / "*.tar")]


def output_folder(header: Header, section: LabelSection) -> Path:
    """Where the labelled shards go."""
    return Path(section.output).expanduser().absolute() if section.output else header.run_dir / "labelled"


def judge_settings(header: Header, section: LabelSection) -> JudgeSettings:
    """The client's settings; `label_problems` has found them complete."""
    return JudgeSettings(**({"cache": str(header.run_dir / "judge.sqlite")} | section.judge))


def label_problems(header: Header, section: LabelSection) -> list[str]:
    """Every value that is unknown or out of range, one sentence each."""
    known = [f.name for f in dataclasses.fields(JudgeSettings)]
    problems = []
    for key in section.judge:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            problems.append(f"unknown key 'label.judge.{key}': {hint}")
    if "model" not in section.judge:
        problems.append("label.judge.model has no value; give the name of the model at the endpoint")
    if not problems:
        problems += [f"label.judge: {problem}" for problem in judge_settings(header, section).problems()]
    checks = [
        (1 <= section.max_asks <= 5, f"label.max_asks is {section.max_asks}; give 1 (no second ask) to 5"),
        (section.max_tokens >= 1, f"label.max_tokens is {section.max_tokens}; give 1 or more"),
        (
            0 <= section.second_opinions <= 1,
            f"label.second_opinions is {section.second_opinions}; give a share of 0 to 1",
        ),
        (
            section.give_up_after_s > 0,
            f"label.give_up_after_s is {section.give_up_after_s}; give seconds above 0",
        ),
    ]
    return problems + [message for fine, message in checks if not fine]
