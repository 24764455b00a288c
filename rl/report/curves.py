"""Training metrics as columns over steps, and which of them are drawn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl.record.metric_table import RECORD_KEYS, find_metric
from rl.report.reading import Record, number, thinned

FROM_ZERO = ("share", "s", "groups", "images/s", "samples/s", "actors", "chunks", "nat/element", "L2 norm")
"""Units whose axis starts at zero."""


@dataclass(frozen=True)
class Panel:
    """Metrics drawn on one axis. `metrics` are names, or families of names as in `rl.record.metric_table`.

    `band` names two metrics between which the area is filled. With `by_stage` there is one such panel a stage, and
    one a part of a joint stage, since the rewards of two tasks do not share a curve.
    """

    section: str
    title: str
    metrics: tuple[str, ...]
    band: tuple[str, str] | None = None
    by_stage: bool = False


PANELS: tuple[Panel, ...] = (
    Panel("reward", "Training reward", ("reward/mean", "reward/{label}/mean"), by_stage=True),
    Panel("reward", "Parts of the reward", ("reward/{label}/component/{component}",), by_stage=True),
    Panel("reward", "Spread of the reward", ("reward/std",)),
    Panel("reward", "Groups without spread", ("reward/zero_spread_share",)),
    Panel("reward", "Samples not scored", ("reward/missing_share", "reward/{label}/missing_share")),
    Panel("reward", "Groups dropped", ("reward/groups_dropped",)),
    Panel("policy", "Ratio", ("policy/ratio_mean",), band=("policy/ratio_min", "policy/ratio_max")),
    Panel("policy", "Clipped ratios", ("policy/clip_fraction_low", "policy/clip_fraction_high")),
    Panel("policy", "KL to the reference", ("policy/kl",)),
    Panel("policy", "KL since the rollout (approximate)", ("policy/approx_kl",)),
    Panel("policy", "Log-probability gap, rollout to replay", ("gate/log_prob_gap_mean", "gate/log_prob_gap_max")),
    Panel("policy", "Log-probability gap by denoising step", ("gate/log_prob_gap/{timestep}",)),
    Panel("policy", "Loss", ("loss/policy", "loss/total")),
    Panel("policy", "Gradient norm", ("optimizer/grad_norm",)),
    Panel("policy", "Advantage", ("advantage/abs_mean",)),
    Panel("policy", "Advantages at the clamp", ("advantage/clamped_share",)),
    Panel("time", "Seconds of a step", ("time/step", "time/rollout", "time/reward", "time/update", "time/publish")),
    Panel("time", "Speed of the rollout", ("throughput/images_per_second",)),
    Panel("time", "Speed of the step", ("throughput/samples_per_second",)),
    Panel("time", "Workers restarted", ("workers/restarts",)),
)  # fmt: skip


def training_table(records: Sequence[Record], notes: list[str], most_steps: int) -> dict[str, Any]:
    """Columns of the training records: `steps`, `stages`, `parts` and `stageSteps` [n], and `columns` of n numbers or
    None. A part is named `<stage>.<part>`, and as its stage where that is not joint.

    Where steps have no record one row without numbers stands in their place, so that curves break there. Of more than
    `most_steps` rows an even choice is kept, with a note.
    """
    rows: dict[int, Record] = {}
    for record in records:
        if "time/evaluate" not in record and record["step"] > 0:
            rows.setdefault(record["step"], {}).update(record)
    for step in sorted(rows)[:-1]:
        if step + 1 not in rows:
            rows[step + 1] = {"stage": rows[step].get("stage")}
    steps = sorted(rows)
    kept = thinned(steps, most_steps)
    if len(kept) < len(steps):
        notes.append(f"curves show {len(kept)} of {len(steps)} steps; metrics.jsonl has all")
    found = [rows[step] for step in kept]
    names = sorted({name for row in found for name in row} - set(RECORD_KEYS))
    return {
        "steps": kept,
        "stages": [row.get("stage") for row in found],
        "parts": [
            f"{row.get('stage')}.{row['part']}" if "part" in row else row.get("stage") for row in found
        ],
        "stageSteps": [number(row.get("stage_step")) for row in found],
        "columns": {name: [number(row.get(name)) for row in found] for name in names},
    }


def drawn_panels(tables: Sequence[dict[str, Any]], stages: Sequence[str]) -> list[dict[str, Any]]:
    """The panels for which some table has a number, with their metrics by full name."""
    panels = []
    for panel in PANELS:
        for stage in stages if panel.by_stage else [None]:
            names = _present(tables, panel.metrics, stage)
            if names[:1] == ["reward/mean"]:  # a single reward of weight 1 would be drawn twice
                names = names[:1] + [name for name in names[1:] if not _equal(tables, names[0], name, stage)]
            if not names:
                continue
            unit = find_metric(names[0]).unit
            panels.append(
                {
                    "section": panel.section,
                    "title": panel.title if stage is None else f"{panel.title}, stage {stage}",
                    "stage": stage,
                    "unit": unit,
                    "zero": unit in FROM_ZERO,
                    "metrics": [{"name": name, "label": _label(name, names)} for name in names],
                    "band": panel.band,
                    "meaning": _meaning(names, panel),
                }
            )
    return panels


def _present(tables: Sequence[dict[str, Any]], families: Sequence[str], stage: str | None) -> list[str]:
    """Names of the families that have a number in some table (within `stage`), in the order of the families."""
    present: list[str] = []
    for family in families:
        found = set()
        for table in tables:
            for name, column in table["columns"].items():
                if _matches(name, family) and any(
                    value is not None and stage in (None, where)
                    for value, where in zip(column, table["parts"], strict=True)
                ):
                    found.add(name)
        present += [name for name in sorted(found, key=_natural) if name not in present]
    return present


def _equal(tables: Sequence[dict[str, Any]], first: str, second: str, stage: str | None) -> bool:
    """Whether two metrics are the same in every table, within the stage."""
    return all(
        a == b
        for table in tables
        for a, b, where in zip(
            table["columns"].get(first, []), table["columns"].get(second, []), table["parts"], strict=False
        )
        if stage in (None, where)
    )


def _matches(name: str, family: str) -> bool:
    try:
        return find_metric(name).name == family
    except ValueError:  # a metric of another version of the package
        return False


def _label(name: str, names: Sequence[str]) -> str:
    """The part of a name that tells it from the others of its panel."""
    if len(names) == 1:
        return name.split("/", 1)[1]
    split = [other.split("/") for other in names]
    parts = [
        part
        for i, part in enumerate(name.split("/"))
        if any(len(other) <= i or other[i] != part for other in split)
    ]
    return "/".join(parts) or name


def _meaning(names: Sequence[str], panel: Panel) -> str:
    sentences = list(dict.fromkeys(find_metric(name).meaning for name in names))
    if panel.band:
        sentences.append("The band reaches from the smallest to the largest.")
    return " ".join(sentences)


def _natural(name: str) -> tuple[int, int, str]:
    last = name.rpartition("/")[2]
    return (name.count("/"), int(last) if last.isdigit() else -1, name)
