"""An ablation grid: the recipes of its rows, runs that are kept, and a table against hand-made evaluations."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from core.recipe import ConfigError
from core.run_lock import hold_run
from models.lora.attach import hash_state
from models.lora.files import read_adapter
from rl.recipe.schema import load_config
from rl.sweep.__main__ import main, run_all, write_recipes
from rl.sweep.config import load_sweep
from rl.sweep.scores import GridScores
from rl.sweep.table import collect_rows, table_markdown
from rl.train import train
from tests.fakes.tiny_run import tiny_recipe

BOTH = "edit and T2I"


def stage(folder: Path, task: str) -> dict:
    reward = [{"name": f"{folder / 'reward.py'}:redness"}]
    return {
        "name": task,
        "task": task,
        "prompts": str(folder / f"{task}.jsonl"),
        "steps": 1,
        "rewards": reward,
    }


def grid_file(folder: Path, **changes) -> Path:
    grid = {
        "name": "grid",
        "recipe": "recipe.yaml",
        "output_dir": str(folder / "runs"),
        "seeds": [0, 1],
        "values": {"steps": 1, "where": "t2i.jsonl"},
        "changes": {"learner": {"adam_beta2": 0.9}},
        "rows": [
            {"name": "none", "untrained": True},
            {"name": "edit only", "of": BOTH, "moment": "after_edit"},
            {
                "name": "T2I only",
                "changes": {"stages": [stage(folder, "t2i") | {"steps": "${values.steps}"}]},
            },
            {"name": BOTH, "changes": {"learner": {"learning_rate": 1e-5}}},
        ],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid | changes))
    return path


def test_a_grid_that_another_process_runs_is_left_alone(tmp_path, capsys):
    tiny_recipe(tmp_path)
    with hold_run(tmp_path / "runs" / "grid"):
        assert main([str(grid_file(tmp_path))]) == 2
    assert "another run writes there now" in capsys.readouterr().err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    recipe = yaml.safe_load(tiny_recipe(folder).read_text())
    second = {"name": f"{folder / 'reward.py'}:redness", "label": "second", "weight": 0.0}
    for task in recipe["evaluation"]["tasks"]:
        task["rewards"] = [*task["rewards"], second]
    recipe["stages"] = [part | {"steps": 1} for part in recipe["stages"]]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_each_row_is_the_recipe_with_its_changes(folder):
    grid = load_sweep(grid_file(folder), ["learner.kl_beta=0.5", "values.steps=7"])
    plans = write_recipes(grid)
    assert list(plans) == ["t2i-only-seed0", "t2i-only-seed1", "edit-and-t2i-seed0", "edit-and-t2i-seed1"]
    configs = {name: load_config(path) for name, path in plans.items()}
    assert [(s.name, s.steps) for s in configs["t2i-only-seed1"].stages] == [("t2i", 7)]
    assert [s.name for s in configs["edit-and-t2i-seed0"].stages] == ["edit", "t2i"]
    changed = configs["edit-and-t2i-seed1"]
    assert (changed.learner.learning_rate, changed.learner.adam_beta2, changed.seed) == (1e-5, 0.9, 1)
    assert {(c.learner.kl_beta, c.learner.adam_beta2) for c in configs.values()} == {(0.5, 0.9)}
    assert changed.output_dir == str(folder / "runs" / "grid")


def test_a_row_that_is_read_from_another_asks_for_that_ones_run(folder):
    grid = load_sweep(grid_file(folder), [], only=["none", "edit only"], seeds=[4], parallel=2)
    assert list(write_recipes(grid)) == ["edit-and-t2i-seed4"]
    assert [row.name for row in grid.rows] == ["none", "edit only"] and grid.parallel == 2
    assert grid.run_folder(grid.rows[1], 4).name == "edit-and-t2i-seed4"


ROW = {"name": "a"}


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({"rows": []}, {}, "rows is empty"),
        ({"seeds": []}, {}, "seeds is empty"),
        ({}, {"parallel": 0}, "parallel=0 must be at least 1"),
        ({}, {"only": ["nothing"]}, "no row is named 'nothing'"),
        ({"rows": [ROW, ROW]}, {}, "row 'a' is there twice"),
        ({"rows": [ROW, {"name": "A!"}]}, {}, "row 'A!' shares its folder a-seed0 with another"),
        ({"recipes": "x"}, {}, "unknown key 'recipes': did you mean 'recipe'"),
        ({"rows": [{"name": "a", "change": {}}]}, {}, r"unknown key 'rows\[0\].change'"),
        ({"rows": [ROW, {"name": "b", "of": "a"}]}, {}, "row 'b': of and moment belong together"),
        ({"rows": [ROW, {"name": "b", "moment": "after_x"}]}, {}, "row 'b': of and moment belong together"),
        (
            {"rows": [ROW, {"name": "b", "of": "c", "moment": "after_x"}]}, {},
            r"row 'b': of='c' is no row that trains; those are \['a'\]",
        ),
        (
            {"rows": [ROW, {"name": "b", "of": "a", "moment": "after_x", "changes": {"seed": 1}}]}, {},
            "row 'b' has no run of its own",
        ),
        ({"rows": [ROW, {"name": "b", "untrained": True, "changes": {"seed": 1}}]}, {}, "no run of its own"),
        (
            {"rows": [ROW, {"name": "b", "untrained": True, "of": "a", "moment": "after_x"}]}, {},
            "row 'b' is untrained, and so of no run",
        ),
    ],
)  # fmt: skip
def test_a_wrong_grid_is_refused(folder, changes, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        load_sweep(grid_file(folder, **changes), [], **arguments)


def test_an_unknown_value_is_refused_and_known_ones_are_told(folder):
    with pytest.raises(ConfigError, match=r"no value is named 'step'; values are \['steps', 'where'\]"):
        load_sweep(grid_file(folder), ["values.step=3"])


def test_every_rows_mistakes_come_before_any_run(folder, capsys):
    rows = [
        {"name": "a", "changes": {"learner": {"kl_beat": 1}}},
        {"name": "b", "changes": {"sead": 1}},
        {"name": "c", "of": "d", "moment": "after_editing"},
        {"name": "d"},
    ]
    assert main([str(grid_file(folder, rows=rows))]) == 2
    error = capsys.readouterr().err
    assert "row 'a': unknown key 'learner.kl_beat'" in error and "row 'b': unknown key 'sead'" in error
    assert "row 'c' reads the moment 'after_editing'; this run has after_edit, after_t2i" in error
    rows = [{"name": "a", "changes": {"model": {"path": "/absent"}}}]
    assert main([str(grid_file(folder, rows=rows)), "--dry-run"]) == 2
    assert "no such model folder" in capsys.readouterr().out


def finished(folder: Path, name: str, **scores) -> None:
    """A run folder with the text-to-image scores of its moments; the second opinion is half of each."""
    run = folder / "runs" / "grid" / name
    for moment, rewards in scores.items():
        path = run / "evaluations" / moment / "t2i.json"
        path.parent.mkdir(parents=True)
        second = [None if value is None else value / 2 for value in rewards]
        path.write_text(json.dumps({"rewards": rewards, "components": {"second": second}}))
    rewards = [{"name": "first", "label": None, "weight": 1.0}, {"name": "x", "label": "second", "weight": 0}]
    config = {"evaluation": {"tasks": [{"task": "t2i", "rewards": rewards}]}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    stages = [{"name": moment.removeprefix("after_")} for moment in scores if moment != "before"]
    (run / "summary.json").write_text(json.dumps({"stages": stages}))


@pytest.fixture
def grid(tmp_path):
    tiny_recipe(tmp_path)
    grid = load_sweep(grid_file(tmp_path), [])
    before = [0.2, 0.4, 0.6, 0.8]
    finished(tmp_path, "t2i-only-seed0", before=before, after_t2i=[0.3, 0.5, 0.7, None])
    finished(tmp_path, "t2i-only-seed1", before=before, after_t2i=[0.4, 0.6, 0.8, 1.0])
    finished(
        tmp_path, "edit-and-t2i-seed1", before=before, after_edit=[0.1, 0.3, 0.5, 0.7], after_t2i=[0.5] * 4
    )
    return grid


def test_the_table_averages_over_seeds_and_prompts(grid):
    none, edit, t2i, both = collect_rows(grid)
    assert none.cells["t2i"].mean.mean == pytest.approx(0.5) and none.seeds == ()
    cell = t2i.cells["t2i"]  # the fourth prompt is not scored in every run
    assert (cell.mean.n, cell.mean.missing, t2i.seeds) == (3, 1, (0, 1))
    assert cell.mean.mean == pytest.approx(0.55) and cell.change.mean == pytest.approx(0.15)
    assert cell.by_seed == pytest.approx((0.5, 0.7))  # of what each seed scored
    # Every prompt changes by the same .1 or .2, so all that varies is which seeds are drawn.
    assert (cell.change.low, cell.change.high) == (pytest.approx(0.1), pytest.approx(0.2))
    assert cell.mean.low < 0.5 < 0.6 < cell.mean.high
    half = t2i.cells["t2i/second"]
    assert half.change.mean == pytest.approx(0.075) and half.mean.mean == pytest.approx(0.275)
    assert (edit.seeds, both.seeds) == ((1,), (1,))
    assert edit.cells["t2i"].change.mean == pytest.approx(-0.1), "read in the middle of another row's run"
    assert both.cells["t2i"].change.mean == pytest.approx(0.0)
    text = table_markdown("grid", [none, edit, t2i, both])
    assert "| row | seeds | t2i | t2i/second |" in text
    assert "| none | – | 0.500 [" in text
    assert "(+0.150 [+0.100, +0.200]) |" in text


def test_two_rows_are_compared_over_the_seeds_that_both_have(grid):
    rows, scores = {row.name: row for row in grid.rows}, GridScores(grid)
    change = scores.compare(rows["T2I only"], rows["edit only"], "t2i")
    # Of seed 1 alone: every prompt .3 better.
    assert (change.mean, change.low, change.high) == (pytest.approx(0.3),) * 3 and change.n == 4
    change = scores.compare(rows["T2I only"], rows["none"], "t2i")
    assert change.mean == pytest.approx(0.15) and change.n == 3


def test_a_grid_of_which_nothing_is_finished_has_an_empty_table(tmp_path):
    tiny_recipe(tmp_path)
    rows = collect_rows(load_sweep(grid_file(tmp_path), []))
    assert [row.cells for row in rows] == [{}] * 4
    assert "| none | – |" in table_markdown("grid", rows)


@pytest.fixture(scope="module")
def run_in_parallel(folder, worker_server):
    """Both rows' runs of a seed at once, each in a process and a Ray of its own."""
    arguments = [str(grid_file(folder, seeds=[0])), "gallery.prompts=0", "--parallel", "2"]
    worker_server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in worker_server.environment().items():
            patch.setenv(name, value)
        assert main(arguments) == 0
    return folder / "runs" / "grid", arguments


def test_a_grid_runs_and_keeps_what_is_finished(run_in_parallel):
    """The second time nothing is trained again, and the table is made from what is there."""
    out, arguments = run_in_parallel
    changed = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    assert len(changed) == 2
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")} == changed
    none, edit, t2i, both = json.loads((out / "table.json").read_text())["rows"]
    before = json.loads((out / "t2i-only-seed0/evaluations/before/edit.json").read_text())["rewards"]
    assert none["cells"]["edit"]["mean"]["mean"] == pytest.approx(np.mean(before))
    after = json.loads((out / "edit-and-t2i-seed0/evaluations/after_edit/t2i.json").read_text())["rewards"]
    assert edit["cells"]["t2i"]["mean"]["mean"] == pytest.approx(np.mean(after))
    for row in (edit, t2i, both):
        assert set(row["cells"]) == {"edit", "edit/second", "t2i", "t2i/second"} and row["seeds"] == [0]


def test_runs_side_by_side_come_to_the_same_as_one_alone(run_in_parallel, tmp_path, ray_session):
    out, _ = run_in_parallel
    recipe = out / "t2i-only-seed0.yaml"
    assert train(load_config(recipe, [f"output_dir={tmp_path}"])) == 0
    hashes = [hash_state(read_adapter(root / "t2i-only-seed0" / "adapter")[0]) for root in (out, tmp_path)]
    assert hashes[0] == hashes[1]


def test_a_run_that_fails_or_takes_too_long_is_named_and_stops_no_other(folder, capsys):
    path = grid_file(folder, seeds=[0], name="late", timeout_s=0.5)
    assert main([str(path), "--only", "T2I only", BOTH, "--parallel", "2"]) == 1
    error = capsys.readouterr().err
    assert "run t2i-only-seed0 failed" in error and "run edit-and-t2i-seed0 failed" in error


SAVES_ON_SIGTERM = """#!/bin/sh
trap 'touch {folder}/saved; exit 143' TERM
touch {folder}/started
while :; do sleep 0.05; done
"""


def test_a_signal_reaches_the_run_under_way_and_no_other_begins(folder, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(SAVES_ON_SIGTERM.format(folder=tmp_path))
    program.chmod(0o755)
    grid = load_sweep(grid_file(folder, output_dir=str(tmp_path)), [])
    plans = write_recipes(grid)
    monkeypatch.setattr(sys, "executable", str(program))

    def interrupt():
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        run_all(grid, plans)
    assert left.value.code == 128 + signal.SIGTERM and (tmp_path / "saved").exists()
    assert len(list(grid.folder.glob("*.log"))) == 1
    assert json.loads((grid.folder / "status.json").read_text())["state"] == "stopped"
