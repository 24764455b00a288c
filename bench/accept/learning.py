"""The longer PDTR run on the shapes world with three training seeds named here, on held-out prompts drawn afresh.

Resumable: a finished seed is read from its run folder, an unfinished one continues from its checkpoint. A seed that
the committed evidence holds under the same setting is not run again, so the seeds can be spread over machines and
days: `python -m bench.accept.learning --seeds 3`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.accept.commands import train_once
from bench.accept.evidence import FOLDER as EVIDENCE
from bench.accept.evidence import ROOT, above, interval, write
from bench.accept.learning_pictures import draw_pictures
from core.recipe import to_yaml
from core.statistics import Difference, paired_bootstrap
from rl.loop.checkpoint import check_same_recipe
from rl.recipe.schema import load_config
from rl.record.summary import run_finished
from worlds.shapes.scenes.prompts import edit_lines, t2i_lines

SEEDS = (1, 2, 3)
PROMPT_SEED = 25
NUM_PROMPTS = 3072
LIMIT_S = 3600.0
GAIN, LOST = 0.10, -0.02
FOLDER = ROOT / "runs" / "learning"
RECIPE = ROOT / "recipes" / "shapes" / "pdtr_long.yaml"
TASKS = ("edit", "t2i")
SECOND = {"edit": "edit_shapes_template", "t2i": "geneval_shapes_template"}


@dataclass(frozen=True)
class Check:
    """One part of the claim for one seed: what was measured, and whether it holds."""

    name: str
    change: Difference
    holds: bool


def main() -> None:
    """Write `docs/evidence/learning.md` after every seed; exits 1 when a part fails in any of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="run these only")
    chosen = parser.parse_args().seeds
    prompts = write_prompts()
    made = setting(prompts)
    results = stored(EVIDENCE / "learning.json", made)
    todo = [seed for seed in chosen if seed not in results or (FOLDER / f"seed{seed}").is_dir()]
    if todo:
        # The base at its best guidance is the same for every seed: a run of a step a stage measures it, apart.
        base = train("base", prompts, "stages[0].steps=1", "stages[1].steps=1")
    for seed in todo:
        results[seed] = run(seed, prompts, base)
        report(results, made)
        if seed == max(results):
            draw_pictures(FOLDER / f"seed{seed}", PROMPT_SEED)
    sys.stdout.write((EVIDENCE / "learning.md").read_text())
    if not all(result["holds"] for result in results.values()):
        sys.exit(1)


def setting(prompts: dict[str, Path]) -> str:
    """sha256 of all that decides a seed's figures but the code: the recipe with what it stands on, and the prompts."""
    parts = [to_yaml(load_config(RECIPE)), *(prompts[task].read_text(encoding="utf-8") for task in TASKS)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def stored(path: Path, made: str) -> dict[int, dict[str, Any]]:
    """The named seeds that an evidence file holds under this setting; of another setting nothing counts."""
    data = json.loads(path.read_text()) if path.is_file() else {}
    if data.get("setting") != made:
        return {}
    return {
        int(seed): result
        | {
            "checks": [
                Check(name, Difference(**c["change"]), c["holds"]) for name, c in result["checks"].items()
            ]
        }
        for seed, result in data["seeds"].items()
        if int(seed) in SEEDS
    }


def write_prompts() -> dict[str, Path]:
    """Held-out prompts that no setting was chosen on. Raises ValueError where runs were evaluated on others."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"edit": edit_lines, "t2i": t2i_lines}
    paths = {}
    for task, lines in makers.items():
        paths[task] = FOLDER / f"{task}_test.jsonl"
        rows = [json.dumps(line) for line in lines("heldout", NUM_PROMPTS, PROMPT_SEED)]
        text = "\n".join(rows) + "\n"
        if paths[task].is_file() and paths[task].read_text(encoding="utf-8") != text:
            raise ValueError(
                f"{paths[task]} holds prompts of another seed or code: remove {FOLDER} and run again"
            )
        paths[task].write_text(text, encoding="utf-8")
    return paths


def train(name: str, prompts: dict[str, Path], *changes: str) -> Path:
    """The folder of a run of the recipe under `changes`, trained, or what is left of it.

    Raises ConfigError where a finished one was trained by other settings: its figures are not of this commit.
    """
    folder = FOLDER / name
    overrides = list(changes)
    for index, task in enumerate(TASKS):
        overrides.append(f"evaluation.tasks[{index}].prompts={prompts[task]}")
        overrides.append(f"evaluation.tasks[{index}].num_prompts={NUM_PROMPTS}")
    if run_finished(folder):
        recipe = load_config(RECIPE, [f"output_dir={FOLDER}", f"name={name}", *overrides])
        check_same_recipe((folder / "config.yaml").read_text(), to_yaml(recipe))
    return train_once(str(RECIPE), folder, *overrides, timeout_s=3 * LIMIT_S)


def run(seed: int, prompts: dict[str, Path], base: Path) -> dict[str, Any]:
    """Train one seed, or what is left of it, and check its claims."""
    folder = train(f"seed{seed}", prompts, f"seed={seed}", "evaluation.baseline_guidance=[]")
    summary = json.loads((folder / "summary.json").read_text())
    seconds, checks = summary["seconds"], claims(folder, base)
    return {
        "commit": summary["commit"],
        "seconds": seconds,
        "checks": checks,
        "holds": all(check.holds for check in checks) and seconds <= LIMIT_S,
    }


def claims(folder: Path, base: Path) -> list[Check]:
    """Every part of the claim from a run's stored evaluations, paired by prompt and noise with those of `base`.

    Raises ValueError where the two scored the untrained base differently: then they are not pairs.
    """
    found = []
    for task in TASKS:
        before, after = rewards(folder, "before", task), rewards(folder, "after_t2i", task)
        if before != rewards(base, "before", task):
            raise ValueError(f"{folder} and {base} scored the base differently: remove both and run again")
        change = paired_bootstrap(before, after)
        found.append(
            Check(f"{task}: gain of at least {GAIN:g} at guidance 1", change, above(change.mean, GAIN))
        )
        best = max(
            ("before_guidance_2", "before_guidance_3"), key=lambda name: mean(rewards(base, name, task))
        )
        change = paired_bootstrap(rewards(base, best, task), after)
        scale = best.rpartition("_")[2]
        found.append(
            Check(f"{task}: over the base at guidance {scale}, its best", change, above(change.low, 0.0))
        )
        change = paired_bootstrap(
            *(rewards(folder, when, task, SECOND[task]) for when in ("before", "after_t2i"))
        )
        found.append(Check(f"{task}: the second scorer's gain", change, above(change.low, 0.0)))
    kept = paired_bootstrap(rewards(folder, "after_edit", "edit"), rewards(folder, "after_t2i", "edit"))
    found.append(Check(f"edit: kept through stage 2 within {LOST:g}", kept, above(kept.low, LOST)))
    return found


def rewards(folder: Path, evaluation: str, task: str, component: str | None = None) -> list[float | None]:
    stored = json.loads((folder / "evaluations" / evaluation / f"{task}.json").read_text())
    return stored["rewards"] if component is None else stored["components"][component]


def mean(values: list[float | None]) -> float:
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored)


def report(results: dict[int, dict[str, Any]], made: str) -> Path:
    """The table so far: a row for each part, a column for each seed."""
    results = dict(sorted(results.items()))
    names = [check.name for check in next(iter(results.values()))["checks"]]
    lines = [
        f"`recipes/shapes/pdtr_long.yaml`; {NUM_PROMPTS} held-out prompts a task, drawn with a seed that no setting "
        f"was chosen on; everything at guidance 1 unless said; training seeds {', '.join(map(str, SEEDS))}, named in "
        "`bench/accept/learning.py`. Differences with 95 % intervals over prompts. Times are of training with the "
        "evaluations before, between and after the stages; the base at other guidance is measured once, before.",
        "",
        "| part | " + " | ".join(f"seed {seed}" for seed in results) + " |",
        "|---" * (len(results) + 1) + "|",
    ]
    for row, name in enumerate(names):
        checks = [result["checks"][row] for result in results.values()]
        cells = [f"{interval(c.change, signed=True)} {'yes' if c.holds else '**no**'}" for c in checks]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    times = [f"{result['seconds'] / 60:.0f} min" for result in results.values()]
    lines += [
        f"| time, at most {LIMIT_S / 60:.0f} min | " + " | ".join(times) + " |",
        "| trained at commit | " + " | ".join(result["commit"][:12] for result in results.values()) + " |",
        "",
    ]
    held = sum(result["holds"] for result in results.values())
    lines += [
        f"All parts hold in **{held} of {len(results)}** seeds run so far ({len(SEEDS)} are named).",
        "",
        f"Held-out prompts drawn by the base and by seed {max(results)}, the same noise on both sides: "
        "`docs/images/learning_edit.png`, `docs/images/learning_t2i.png`.",
    ]
    data = {
        str(seed): {
            "commit": result["commit"],
            "seconds": result["seconds"],
            "holds": result["holds"],
            "checks": {
                check.name: {"change": vars(check.change), "holds": check.holds} for check in result["checks"]
            },
        }
        for seed, result in results.items()
    }
    return write("learning", "PDTR on the shapes world, three seeds", lines, {"setting": made, "seeds": data})


if __name__ == "__main__":
    main()
