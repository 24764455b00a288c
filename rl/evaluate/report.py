"""What an evaluation came to: `results.json` for programs, `results.md` and `gallery.png` for people.

The same scores give the same files, byte for byte: neither holds a time or a count of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core import __version__
from core.files import atomic_write_json, atomic_write_text
from core.prompts import load_references
from core.statistics import strata_bootstrap
from rewards.benchmarks.figures import Figure
from rewards.benchmarks.items import ScoredItem, detectors, snapshots
from rl.evaluate.images import ImageStore
from rl.evaluate.plan import Plan, Scorer
from rl.record.gallery import GallerySample, save_grid

RESULTS, TABLE, GALLERY = "results.json", "results.md", "gallery.png"


@dataclass(frozen=True)
class Row:
    """A figure with its 95 % interval over prompts; None where there is nothing to measure."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    prompts: int
    expected: int
    missing: int


def table_rows(figures: Sequence[Figure]) -> list[Row]:
    """The figures with their intervals."""
    return [
        Row(f.name, f.value, *strata_bootstrap(f.strata.values()), f.prompts, f.expected, f.missing)
        for f in figures
    ]


def write_results(
    plan: Plan,
    scored: Sequence[ScoredItem],
    images: ImageStore,
    record: Mapping[str, Any],
    scorers: Sequence[Scorer],
    scores_file: Path,
) -> dict[str, Any]:
    """Write all three files to the output folder; the document of `results.json`.

    record: what was generated, and from what (`rl/evaluate/plan.py`).
    """
    rows = table_rows(plan.benchmark.figures(scored, compat=plan.compat))
    present = sum(picture is not None for item in plan.items for picture in images.pictures(item))
    document = {
        "benchmark": plan.benchmark.name,
        "scoring": "compat" if plan.compat else "published",
        "version": __version__,
        "table": [asdict(row) for row in rows],
        "images": {
            "expected": len(plan.items) * plan.count,
            "present": present,
            "scored": sum(image is not None and "score" in image for item in scored for image in item.images),
        },
        "generation": dict(record),
        "scorers": [asdict(scorer) for scorer in scorers],
        "detectors": detectors(scored),
        "judge_snapshots": snapshots(scored),
        "scores": scores_file.name,
        "prompts": [_prompt(plan, item) for item in scored],
    }
    atomic_write_json(plan.output / RESULTS, document)
    atomic_write_text(plan.output / TABLE, markdown(document, plan.benchmark.decimals))
    _write_gallery(plan, scored, images)
    return document


def markdown(document: Mapping[str, Any], decimals: int) -> str:
    """The table and what it rests on, as Markdown."""
    counts = document["images"]
    lines = [
        f"# {document['benchmark']}"
        + (", scored as the public scripts do" * (document["scoring"] == "compat"))
    ]
    if counts["scored"] < counts["expected"]:
        lines += [
            "",
            f"**Incomplete: of {counts['expected']} pictures {counts['present']} are there and {counts['scored']} are "
            "scored.** A figure is the mean of what is scored; where a whole group is missing there is none.",
        ]
    lines += ["", "| figure | value | 95 % interval | prompts | missing |", "|---|---|---|---|---|"]
    lines += [_line(row, decimals) for row in document["table"]]
    lines += ["", "Intervals: bootstrap over prompts within their groups.", ""]
    lines += [f"- {name}: {value}" for name, value in _facts(document)]
    return "\n".join(lines) + "\n"


def _facts(document: Mapping[str, Any]) -> list[tuple[str, Any]]:
    facts = [(name.replace("_", " "), value) for name, value in document["generation"].items()]
    for scorer in document["scorers"]:
        params = ", ".join(f"{key}={value}" for key, value in scorer["params"].items())
        facts.append(("scorer", f"{scorer['name']}({params})"))
        facts += [(f"sha256 of {name}", value) for name, value in scorer["files"].items()]
    facts += [("detector", name) for name in document["detectors"]]
    facts += [("judge snapshot", name) for name in document["judge_snapshots"]]
    return [*facts, ("version", document["version"])]


def _line(row: Mapping[str, Any], decimals: int) -> str:
    def text(value: float | None) -> str:
        return "–" if value is None else f"{value:.{decimals}f}"

    interval = "–" if row["low"] is None else f"[{text(row['low'])}, {text(row['high'])}]"
    missing = f"{row['missing']} of {row['expected']}" if row["missing"] else "0"
    return f"| {row['name']} | {text(row['value'])} | {interval} | {row['prompts']} | {missing} |"


def _prompt(plan: Plan, item: ScoredItem) -> dict[str, Any]:
    """Per prompt what a paired comparison of two evaluations needs."""
    seeds = plan.seeds(item.item) if plan.model is not None else [None] * plan.count
    return {
        "key": item.item.key,
        "group": item.item.group,
        "task": item.item.prompt.task,
        "prompt": item.item.prompt.prompt,
        "seeds": list(seeds),
        "scores": [None if image is None else image.get("score") for image in item.images],
    }


def _write_gallery(plan: Plan, scored: Sequence[ScoredItem], images: ImageStore) -> None:
    """The first picture of some prompts, spread over the whole list; one file per task, since edits are pairs."""
    for part in plan.parts:
        mine = {item.key for item in part.items}
        shown = [s for s in scored if s.item.key in mine and images.pictures(s.item)[0] is not None]
        step = max(1, len(shown) // plan.gallery) if plan.gallery else 1
        samples = [_sample(plan, item, images) for item in shown[::step][: plan.gallery]]
        if samples:
            name = GALLERY if len(plan.parts) == 1 else f"gallery_{part.task}.png"
            save_grid(samples, plan.output / name, step=0, stage=plan.benchmark.name)


def _sample(plan: Plan, item: ScoredItem, images: ImageStore) -> GallerySample:
    picture, prompt = images.pictures(item.item)[0], item.item.prompt
    assert picture is not None
    first = item.images[0]
    return GallerySample(
        prompt.prompt,
        plan.seeds(item.item)[0],
        np.asarray(picture.load()),
        None if first is None else first.get("score"),
        np.asarray(load_references(prompt)[0]) if prompt.references else None,
    )
