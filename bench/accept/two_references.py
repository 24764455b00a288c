"""A task that needs two references, on the shapes world: "add it", where the second picture alone shows what "it" is.

A base that can do it in part is trained from the embedded one; then RL by the exact verifier raises it on held-out
prompts. Resumable: run it again and it goes on where it was.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.accept.commands import one_thread, train_once
from bench.accept.evidence import IMAGES, ROOT, Claim, Clock, above, claims_table, conclude, interval
from bench.accept.learning_pictures import BASE, GUIDANCE, STEPS, draw_sheet
from core.statistics import Difference, bootstrap_mean, paired_bootstrap
from models.components import load_transformer
from worlds.shapes.scenes.edits import INSERT
from worlds.shapes.training.evaluate import TASKS, Base, Question, heldout_questions, score

RUNS = ROOT / "runs" / "two_references"
BASE_RECIPE, RECIPE = "recipes/shapes/two_references_base.yaml", "recipes/shapes/two_references.yaml"
NUM_PROMPTS = 512
PART = (0.3, 0.7)
"""Where the base's score should lie, so that it can do the task in part and RL has room."""
LOST = -0.03
LIMIT_S = 2 * 3600.0
PICTURES, PICTURE_SEED = 8, 25


def main() -> None:
    """Write `docs/evidence/two_references.md`; exits 1 when a part does not hold."""
    torch.set_num_threads(1)
    clock = Clock(RUNS / "seconds.json")
    with clock.part("base"):
        trained = train_base()
    with clock.part("RL"):
        run = train_once(RECIPE, RUNS / "rl", f"model.path={trained}", timeout_s=LIMIT_S)
    before = Base.load(trained)
    after = replace(before, transformer=load_transformer(run, dtype=torch.float32))
    questions = heldout_questions(INSERT, NUM_PROMPTS)
    claims = [*base_claims(before), *reference_claims(before, after, questions), *run_claims(run)]
    some = heldout_questions(INSERT, PICTURES, PICTURE_SEED)
    draw_sheet(INSERT, some, {"base": before, "after RL": after}, IMAGES / "two_references.png")
    write_evidence(claims, clock, run)


def train_base() -> Path:
    """The embedded base trained further, or what is left of it; returns the model's folder."""
    folder = RUNS / "base"
    if not (folder / "export.json").is_file():
        line = [sys.executable, "-m", "worlds.shapes.training.train", BASE_RECIPE, "--resume", "auto"]
        subprocess.run(line, cwd=ROOT, env=one_thread(), check=True, timeout=LIMIT_S)
    return folder / "model"


def base_claims(trained: Base) -> list[Claim]:
    """What the base can do: the new task in part, its old ones as before."""
    claims = []
    embedded = Base.load(BASE)
    for task in TASKS:
        questions = heldout_questions(task, NUM_PROMPTS)
        change = paired_bootstrap(*(scores(task, questions, base) for base in (embedded, trained)))
        claims.append(
            Claim(
                f"base: {task} beside the embedded base's, paired; at least {LOST:g}",
                interval(change, signed=True),
                above(change.mean, LOST),
            )
        )
    return claims


def reference_claims(before: Base, after: Base, questions: list[Question]) -> list[Claim]:
    """That the task is done in part, and from the second picture: with another object there, that one is drawn."""
    low, high = PART
    misled = mislead(questions)
    first = scores(INSERT, questions, before)
    found = bootstrap_mean(first)
    claims = [
        Claim(
            f"base: insertion, between {low:g} and {high:g}",
            interval(found),
            found.mean is not None and low <= found.mean <= high,
        )
    ]
    for name, base, kept in (("base", before, first), ("after RL", after, scores(INSERT, questions, after))):
        change = paired_bootstrap(kept, scores(INSERT, misled, base))
        claims.append(
            Claim(
                f"{name}: the same prompts with an object of another shape and colour in the second picture; interval "
                "below 0",
                interval(change, signed=True),
                change.high is not None and change.high < 0,
            )
        )
    return claims


def mislead(questions: Sequence[Question]) -> list[Question]:
    """Each question with the second picture of the next one whose object has another shape and another colour."""
    found = []
    for place, question in enumerate(questions):
        later = [*questions[place + 1 :], *questions[:place]]
        other = next(item.shown for item in later if differ(item, question))
        found.append(replace(question, shown=other))
    return found


def differ(first: Question, second: Question) -> bool:
    assert first.shown is not None and second.shown is not None
    (one,), (other,) = first.shown.objects, second.shown.objects
    return one.shape != other.shape and one.color != other.color


def scores(task: str, questions: list[Question], base: Base) -> np.ndarray:
    """The verifier's, or GenEval's, of one ODE sample a question."""
    return score(task, questions, base.draw(questions, GUIDANCE, STEPS))


def run_claims(run: Path) -> list[Claim]:
    """What RL changed on held-out prompts, by the run's own evaluations."""
    change, second = changes(run)
    return [
        Claim("RL: the exact verifier's held-out score; interval above 0", told(change), above(change.low)),
        Claim("RL: the same by the second scorer; interval above 0", told(second), above(second.low)),
    ]


def changes(run: Path) -> tuple[Difference, Difference]:
    """Paired changes over the run: the exact verifier, the second scorer."""
    before, after = (
        json.loads((run / "evaluations" / moment / "edit.json").read_text())
        for moment in ("before", "after_insert")
    )
    name = "edit_shapes_template"
    pairs = ((before["rewards"], after["rewards"]), (before["components"][name], after["components"][name]))
    first, second = (paired_bootstrap(*pair) for pair in pairs)
    return first, second


def told(change: Difference) -> str:
    return f"{change.before:.3f} -> {change.after:.3f}, {interval(change, signed=True)}"


def write_evidence(claims: list[Claim], clock: Clock, run: Path) -> None:
    """The table of claims, what the parts took, and the sheet's file."""
    steps = json.loads((RUNS / "base" / "export.json").read_text())["step"]
    lines = [
        f"`{BASE_RECIPE}` ({steps} steps from the embedded base), then `{RECIPE}` on it. The words of a prompt are "
        f'"add it" and a place: what to add is in the second picture alone. {NUM_PROMPTS} held-out prompts a task, '
        f"Euler {STEPS} steps, CFG {GUIDANCE:g}; intervals over prompts at 95 %. One training seed.",
        "",
        *claims_table(claims),
        "",
        f"Minutes: {clock.minutes()}.",
        "",
        "Held-out prompts drawn by the base and after RL, the same noise on both sides: "
        "`docs/images/two_references.png`.",
    ]
    data: dict[str, Any] = {
        "claims": [vars(claim) for claim in claims],
        "seconds": clock.seconds,
        "changes": [asdict(change) for change in changes(run)],
    }
    holds = all(claim.holds for claim in claims)
    conclude("two_references", "A task that needs two references", lines, data, holds=holds)


if __name__ == "__main__":
    main()
