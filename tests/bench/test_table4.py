"""Table 4 in miniature: the grid's rows, the paper's directions and how ours are held against them."""

import json
from pathlib import Path

import pytest
import yaml

from bench.accept import table4
from bench.accept.table4 import best_lines, counted, joint_lines, report
from bench.accept.table4_directions import (
    COMPARISONS,
    HOLDS,
    METRICS,
    OPEN,
    PAPER,
    REVERSED,
    UNMEASURED,
    best_rows,
    direction_table,
    directions,
    verdict,
)
from core.statistics import Estimate
from rl.recipe.schema import load_config
from rl.sweep.__main__ import run_name, write_recipes
from rl.sweep.config import load_sweep
from rl.sweep.scores import GridScores
from rl.sweep.table import collect_rows

ROOT = Path(__file__).resolve().parents[2]
GRID = ROOT / "recipes" / "shapes" / "table4.yaml"
SCORES = {
    "none": (0.60, 0.50),
    "judge edit": (0.60, 0.60),
    "EditReward edit": (0.60, 0.55),
    "GenEval only": (0.70, 0.45),
    "judge + GenEval": (0.70, 0.60),
    "EditReward + GenEval": (0.65, 0.65),
    "joint": (0.62, 0.52),
}
"""Text-to-image and editing of made-up runs."""


@pytest.fixture
def grid(tmp_path):
    return load_sweep(GRID, ["values.prompts=8"], seeds=[0], output_dir=str(tmp_path))


@pytest.fixture
def finished(grid):
    """Every run's evaluations on disk: the scores above, up and down by .01 from prompt to prompt, the second scorer's
    a tenth lower.
    """
    rows = {row.name: row for row in grid.rows}
    for name, scores in SCORES.items():
        row = rows[name]
        for owner in grid.trained if row.untrained else [rows[row.of or name]]:
            run = grid.run_folder(owner, 0)
            last = "after_joint" if name == "joint" else "after_t2i"
            for task, score in zip(("t2i", "edit"), scores, strict=True):
                path = (
                    run / "evaluations" / ("before" if row.untrained else row.moment or last) / f"{task}.json"
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                rewards = [score + 0.01 * (-1) ** i for i in range(8)]
                label = "geneval_shapes_template" if task == "t2i" else "edit_shapes_template"
                second = {label: [value - 0.1 for value in rewards]}
                path.write_text(json.dumps({"rewards": rewards, "components": second}))
    for path in write_recipes(grid).values():
        run = path.with_suffix("")
        stages = yaml.safe_load(path.read_text())["stages"]
        (run / "config.yaml").write_text(path.read_text())
        (run / "summary.json").write_text(json.dumps({"stages": stages, "seconds": 300.0}))
    return grid


def test_the_grid_has_the_papers_rows_and_one_of_ours_in_four_runs_a_seed(grid):
    assert [row.name for row in grid.rows] == list(SCORES) == [*PAPER, "joint"]
    configs = {name: load_config(path) for name, path in write_recipes(grid).items()}
    told = {
        name: [(s.name, [r.name for part in s.parts or [s] for r in part.rewards]) for s in config.stages]
        for name, config in configs.items()
    }
    t2i = ("t2i", ["geneval_shapes"])
    assert told == {
        run_name("GenEval only", 0): [t2i],
        run_name("judge + GenEval", 0): [("edit", ["judge"]), t2i],
        run_name("EditReward + GenEval", 0): [("edit", ["editreward"]), t2i],
        run_name("joint", 0): [("joint", ["editreward", "geneval_shapes"])],
    }
    for config in configs.values():
        steps = {"edit": 0, "t2i": 0}
        for stage in config.stages:
            for part in stage.parts or [stage]:
                steps[part.task] += stage.steps // max(len(stage.parts), 1)
        assert set(steps.values()) <= {0, 20}, "a task that is trained is trained for as long in every row"
        assert (config.rollout.workers, config.learner.ranks, config.evaluation.tasks[0].num_prompts) == (
            1,
            1,
            8,
        )


def test_the_default_grid_has_three_seeds():
    assert len(load_sweep(GRID, []).seeds) >= 3


def estimate(mean, low, high):
    return Estimate(mean, low, high, 8)


@pytest.mark.parametrize(
    ("paper", "ours", "expected"),
    [
        (0.04, (0.03, 0.01, 0.05), HOLDS),
        (0.04, (0.03, -0.01, 0.07), OPEN),
        (0.04, (-0.03, -0.05, -0.01), REVERSED),
        (-0.04, (-0.03, -0.05, -0.01), HOLDS),
        (-0.04, (0.01, -0.02, 0.04), OPEN),
        (-0.04, (0.03, 0.01, 0.05), REVERSED),
        (0.0, (0.01, -0.02, 0.04), HOLDS),
        (0.0, (0.03, 0.01, 0.05), REVERSED),
        (0.0, (-0.03, -0.05, -0.01), REVERSED),
        (0.04, (0.03, None, None), UNMEASURED),
    ],
)
def test_a_direction_holds_is_reversed_or_open(paper, ours, expected):
    assert verdict(paper, estimate(*ours)) == expected


def test_the_papers_own_exceptions_are_among_its_directions(finished):
    found = {(d.later, d.earlier, d.metric): d.paper for d in directions(GridScores(finished))}
    assert len(found) == len(COMPARISONS) * len(METRICS)
    assert found["EditReward edit", "judge edit", "ImgEdit"] == -0.04, "edit-only GPT-4.1 is best on ImgEdit"
    assert found["EditReward + GenEval", "EditReward edit", "GEdit-EN"] == 0, "GEdit ties"
    assert found["EditReward + GenEval", "judge + GenEval", "GenEval"] == 0
    assert found["judge + GenEval", "judge edit", "ImgEdit"] == -0.05
    assert found["GenEval only", "none", "GenEval"] == 0.04
    columns = {name: {row: values[i] for row, values in PAPER.items()} for i, name in enumerate(METRICS)}
    assert best_rows(columns["ImgEdit"]) == ["judge edit"]
    assert best_rows(columns["GEdit-EN"]) == ["EditReward edit", "EditReward + GenEval"]
    assert best_rows(columns["DPG"]) == ["EditReward + GenEval"]


def test_measured_directions_follow_from_the_stored_evaluations(finished):
    found = {(d.later, d.earlier, d.metric): d for d in directions(GridScores(finished))}
    for metric in ("GenEval", "DPG"):  # the second scorer's differences are the first one's
        rise = found["GenEval only", "none", metric]
        assert rise.ours.mean == pytest.approx(0.1) and rise.verdict == HOLDS
    fall = found["GenEval only", "none", "GEdit-EN"]
    assert fall.paper == pytest.approx(0.09) and fall.verdict == REVERSED
    tie = found["judge edit", "none", "GenEval"]
    assert tie.paper == 0 and tie.ours.mean == pytest.approx(0.0, abs=1e-9)
    assert found["EditReward edit", "judge edit", "ImgEdit"].verdict == HOLDS
    assert (
        found["EditReward + GenEval", "judge + GenEval", "GenEval"].verdict == REVERSED
    )  # a tie in the paper
    table = direction_table(list(found.values()))
    assert len(table) == 2 + len(COMPARISONS)
    assert "| GenEval only − none | rises by 0.04; +0.100 [+0.100, +0.100]; holds |" in table[4]
    assert "**reversed**" in table[4]
    edits = counted(list(found.values()), "GEdit-EN")
    assert edits.startswith("of 11 directions") and "GenEval only − none" in edits


def test_the_page_says_what_was_measured_for_every_row(finished):
    lines, data = report(finished, [0], wall_s=1200.0)
    page = "\n".join(lines)
    assert (
        "python -m bench.accept.table4 --seeds 0" in page
        and "4 runs, 2 at once, the longest 5.0 min; 2.5 min of the machine a run" in page
    )
    for name, (t2i, edit) in SCORES.items():
        (line,) = [line for line in lines if line.startswith(f"| {name} |")]
        assert f"| {edit:.3f} [" in line and f"| {t2i:.3f} [" in line and f"| {t2i - 0.1:.3f} [" in line
    best = best_lines(collect_rows(finished))
    assert "- ImgEdit: judge edit; ours EditReward + GenEval" in best
    joint = joint_lines(GridScores(finished))
    assert joint[2].startswith("| joint − none | +0.020") and "−" in joint[3]
    assert "| EditReward + GenEval − joint | +0.030 [+0.030, +0.030]" in joint[3]
    assert len(data["directions"]) == 44 and len(json.dumps(data)) > 1000


def test_without_a_trained_editreward_it_says_how_to_get_one(tmp_path, capsys):
    assert table4.main(["--editreward", str(tmp_path / "absent")]) == 2
    assert "bench.accept.editreward" in capsys.readouterr().err
