"""MetaQuery on the shapes world, by the recipes alone: align, unified, the paper's Tables 2 and 3, PDTR and its resume.

Each part is a user's command. Resumable: what is finished is kept, a run that was broken off goes on.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.accept.evidence import IMAGES, Claim, Clock, above, claims_table, conclude, interval
from bench.accept.metaquery_runs import (
    ALIGN,
    BOTH,
    EDIT_ONLY,
    FROZEN_CONNECTOR,
    FROZEN_TRANSFORMER,
    LIMIT_S,
    ONLY_TRANSFORMER,
    ONLY_VLM,
    RUNS,
    UNIFIED,
    VARIANT,
    VARIANTS,
    VLM,
    pdtr,
    pdtr_killed,
    train_all,
    training_records,
)
from core.statistics import Difference, bootstrap_mean, paired_bootstrap
from models.lora.attach import hash_state
from models.lora.files import read_adapter
from worlds.shapes.training.evaluate import READERS, TASKS, Base, heldout_questions, score

NUM_PROMPTS = 1024
GUIDANCES = (1.0, 2.0)
FLOOR = 0.5
GATE = 1e-5
"""Largest gap, nat per element, between a rollout's log-probabilities and the learner's own, in float32."""

Scores = dict[tuple[str, float], np.ndarray]
"""Scores [prompts] by task and guidance."""


@dataclass(frozen=True)
class Direction:
    """A comparison of the paper: which of two variants it has above the other, in what, and by how much."""

    table: int
    task: str
    less: str
    more: str
    paper: str


DIRECTIONS = (
    Direction(2, "edit", ONLY_VLM, BOTH, "5.00 < 6.90 (GEdit-EN)"),
    Direction(2, "edit", ONLY_TRANSFORMER, BOTH, "6.40 < 6.90 (GEdit-EN)"),
    Direction(2, "edit", ONLY_VLM, ONLY_TRANSFORMER, "5.00 < 6.40 (GEdit-EN)"),
    Direction(3, "t2i", FROZEN_CONNECTOR, BOTH, ".84 < .86 (GenEval)"),
    Direction(3, "t2i", FROZEN_TRANSFORMER, BOTH, ".85 < .86 (GenEval)"),
    Direction(3, "edit", FROZEN_CONNECTOR, BOTH, "6.75 < 6.90 (GEdit-EN)"),
    Direction(3, "edit", FROZEN_TRANSFORMER, BOTH, "6.46 < 6.90 (GEdit-EN)"),
)


def main() -> None:
    """Write `docs/evidence/metaquery.md`; exits 1 when a claim does not hold. Tables 2 and 3 are no claims."""
    torch.set_num_threads(1)
    clock = Clock(RUNS / "seconds.json")
    train_all(clock)
    whole = pdtr(clock)
    straight, killed = pdtr_killed(clock)
    with clock.part("evaluation"):
        unified = evaluate(UNIFIED, GUIDANCES)
        variants = {name: evaluate(name, GUIDANCES[:1]) for name in VARIANTS}
    claims = [*unified_claims(unified, clock), mixing_claim(variants), *pdtr_claims(whole, straight, killed)]
    keep_pictures(whole)
    body = document(claims, unified, variants, whole, clock)
    data = {"claims": [vars(claim) for claim in claims], "seconds": clock.seconds}
    holds = all(claim.holds for claim in claims)
    conclude("metaquery", "MetaQuery on the shapes world", body, data, holds=holds)


def evaluate(name: str, guidances: tuple[float, ...]) -> Scores:
    """Held-out scores of a run's model, read as it was trained; kept, so that a continued proof does not draw again."""
    changes = VARIANTS.get(name, ())
    references = [reader for reader in READERS if f"references.{reader}=false" not in changes]
    base, found = Base.load(RUNS / name / "model", VLM, position_mode="mrope", references=references), {}
    for task in TASKS:
        questions = heldout_questions(task, NUM_PROMPTS)
        for guidance in guidances:
            kept = RUNS / name / f"heldout_{task}_{guidance:g}.npy"
            if not kept.is_file():
                np.save(kept, score(task, questions, base.draw(questions, guidance, 10)), allow_pickle=False)
            found[task, guidance] = np.load(kept, allow_pickle=False)
    return found


# ---- the claims -------------------------------------------------------------------------------------------


def unified_claims(scores: Scores, clock: Clock) -> list[Claim]:
    """The times of both stages, and what the unified model scores at guidance 1."""
    times = [
        Claim(
            f"{name}: at most {LIMIT_S / 60:g} minutes",
            f"{clock.seconds[name] / 60:.1f} min",
            clock.seconds[name] <= LIMIT_S,
        )
        for name in (ALIGN, UNIFIED)
    ]
    return times + [
        Claim(
            f"unified, {task} at guidance 1: at least {FLOOR:g}",
            interval(bootstrap_mean(scores[task, 1.0])),
            float(scores[task, 1.0].mean()) >= FLOOR,
        )
        for task in TASKS
    ]


def mixing_claim(variants: dict[str, Scores]) -> Claim:
    """Text-to-image is kept while editing is learned."""
    change = paired_bootstrap(variants[EDIT_ONLY]["t2i", 1.0], variants[BOTH]["t2i", 1.0])
    return Claim(
        "text-to-image: with its batches mixed in, minus editing alone; interval above 0",
        interval(change, signed=True),
        above(change.low),
    )


def pdtr_claims(whole: Path, straight: Path, killed: Path) -> list[Claim]:
    """The gate over every step of both stages, and the adapter of a run that was killed."""
    records = training_records(whole / "metrics.jsonl")
    stages = {str(record["stage"]) for record in records}
    gap = max(record["gate/log_prob_gap_max"] for record in records)
    hashes = [hash_state(read_adapter(folder / "adapter")[0]) for folder in (straight, killed)]
    return [
        Claim(
            f"PDTR: both stages behind the log-probability gate, largest gap at most {GATE:g}",
            f"{len(records)} steps of {', '.join(sorted(stages))}; {gap:.1e}",
            stages == {"edit", "t2i"} and gap <= GATE,
        ),
        Claim(
            "PDTR killed and resumed: the adapter of the straight run, bit for bit",
            " = ".join(one[:16] for one in hashes) if hashes[0] == hashes[1] else " is not ".join(hashes),
            hashes[0] == hashes[1],
        ),
    ]


# ---- the document -----------------------------------------------------------------------------------------


def document(
    claims: list[Claim], unified: Scores, variants: dict[str, Scores], whole: Path, clock: Clock
) -> list[str]:
    """Claims, scores, Tables 2 and 3, PDTR's changes, times, pictures."""
    lines = [
        f"`recipes/shapes/metaquery_align.yaml`, `metaquery_unified.yaml`, `pdtr_metaquery.yaml`; {NUM_PROMPTS} "
        "held-out prompts a task, Euler 10 steps; 95 % intervals over prompts, one training seed.",
        "",
        *claims_table(claims),
        "",
        "| unified | guidance | score |",
        "|---|---|---|",
        *(
            f"| {task} | {guidance:g} | {interval(bootstrap_mean(s))} |"
            for (task, guidance), s in unified.items()
        ),
        "",
        "## Tables 2 and 3 in miniature",
        "",
        f"Each variant is `metaquery_unified.yaml` with {' '.join(VARIANT)} from the aligned connector; guidance 1.",
        "",
        "| variant | changed | text-to-image | editing |",
        "|---|---|---|---|",
    ]
    for name, changes in VARIANTS.items():
        cells = " | ".join(interval(bootstrap_mean(variants[name][task, 1.0])) for task in TASKS)
        lines.append(f"| {name} | {' '.join(f'`{word}`' for word in changes) or 'nothing'} | {cells} |")
    lines += ["", "| table | paper | here: difference | the paper's direction |", "|---|---|---|---|"]
    for one in DIRECTIONS:
        change = paired_bootstrap(variants[one.less][one.task, 1.0], variants[one.more][one.task, 1.0])
        here = f"{one.task} {interval(change, signed=True)}"
        lines.append(f"| {one.table} | {one.less} < {one.more}: {one.paper} | {here} | {verdict(change)} |")
    return [
        *lines,
        "",
        "## PDTR",
        "",
        *pdtr_table(whole),
        "",
        f"Minutes: {clock.minutes()}.",
        "",
        "## Pictures",
        "",
        "Losses; then the last grids of both stages, drawn above the data's own (editing: source, drawn, target); then "
        "held-out prompts before PDTR and after each of its stages.",
        "",
        *(f"![{path.stem}](../images/{path.name})\n" for path in pictures()),
    ]


def pictures() -> list[Path]:
    """The pictures that are kept of the runs, in the order of the page."""
    names = ["metaquery_loss", f"{ALIGN}_t2i", f"{UNIFIED}_t2i", f"{UNIFIED}_edit"]
    names += [f"metaquery_pdtr_{task}" for task in ("edit", "t2i")]
    return [IMAGES / f"{name}.png" for name in names]


def pdtr_table(whole: Path) -> list[str]:
    """Change of each task over each stage."""
    lines = ["| stage | task | before | after | difference |", "|---|---|---|---|---|"]
    for stage in json.loads((whole / "summary.json").read_text())["stages"]:
        for task, e in stage["evaluations"].items():
            change = f"{e['difference']:+.3f} [{e['low']:+.3f}, {e['high']:+.3f}]"
            lines.append(f"| {stage['name']} | {task} | {e['before']:.3f} | {e['after']:.3f} | {change} |")
    return lines


def verdict(change: Difference) -> str:
    if change.low is None or change.high is None or change.low <= 0 <= change.high:
        return "undecided"
    return "holds" if change.low > 0 else "**does not hold**"


def keep_pictures(whole: Path) -> None:
    """Loss curves of both stages, their last grids, and PDTR's pictures before and after."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    plot_losses([RUNS / ALIGN, RUNS / UNIFIED], IMAGES / "metaquery_loss.png")
    for name in (ALIGN, UNIFIED):
        for task in TASKS:
            grids = sorted((RUNS / name / "samples").glob(f"step_*_{task}.png"))
            if grids:
                shutil.copy(grids[-1], IMAGES / f"{name}_{task}.png")
    for task in TASKS:
        shutil.copy(whole / "samples" / f"before_after_{task}.png", IMAGES / f"metaquery_pdtr_{task}.png")


def plot_losses(runs: list[Path], path: Path) -> None:
    """Loss of each task over the steps, a panel for each run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, run in zip(figure.subplots(1, len(runs), sharey=True), runs, strict=True):
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for task in TASKS:
            points = [(r["step"], r[f"loss/{task}"]) for r in records if r.get(f"loss/{task}") is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=task, linewidth=1)
        axes.set_title(run.name)
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
