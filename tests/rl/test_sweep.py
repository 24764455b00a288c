"""An ablation grid: the recipes of its rows, runs that are kept, and a table against hand-made evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from rl.config import ConfigError, load_config
from rl.sweep import main, run_name, write_recipes
from rl.sweep_config import load_sweep
from rl.sweep_table import collect_rows, table_markdown
from tests.tiny_run import tiny_recipe


def grid_file(folder: Path, **changes) -> Path:
    stage = {"name": "t2i", "task": "t2i", "prompts": str(folder / "t2i.jsonl"), "steps": 1}
    reward = [{"name": f"{folder / 'reward.py'}:redness"}]
    grid = {
        "name": "grid",
        "recipe": "recipe.yaml",
        "output_dir": str(folder / "runs"),
        "seeds": [0, 1],
        "rows": [
            {"name": "none", "untrained": True},
            {"name": "T2I only", "changes": {"stages": [stage | {"rewards": reward}]}},
            {"name": "low lr", "changes": {"learner": {"learning_rate": 1e-5}}},
        ],
    }
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(grid | changes))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    tiny_recipe(folder)
    return folder


def test_each_row_is_the_recipe_with_its_changes(folder):
    grid = load_sweep(grid_file(folder), ["learner.kl_beta=0.5"])
    plans = write_recipes(grid)
    assert list(plans) == ["t2i-only-seed0", "t2i-only-seed1", "low-lr-seed0", "low-lr-seed1"]
    configs = {name: load_config(path) for name, path in plans.items()}
    assert [stage.name for stage in configs["t2i-only-seed1"].stages] == ["t2i"]
    assert [stage.name for stage in configs["low-lr-seed0"].stages] == ["edit", "t2i"]
    assert (configs["low-lr-seed1"].learner.learning_rate, configs["low-lr-seed1"].seed) == (1e-5, 1)
    assert {c.learner.kl_beta for c in configs.values()} == {0.5}
    assert configs["low-lr-seed0"].output_dir == str(folder / "runs" / "grid")


@pytest.mark.parametrize(
    ("changes", "arguments", "expected"),
    [
        ({"rows": []}, {}, "rows is empty"),
        ({"seeds": []}, {}, "seeds is empty"),
        ({}, {"only": ["nothing"]}, "no row is named 'nothing'"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, {}, "row 'a' is there twice"),
        ({"recipes": "x"}, {}, "recipes"),
    ],
)
def test_a_wrong_grid_is_refused(folder, changes, arguments, expected):
    with pytest.raises(ConfigError, match=expected):
        load_sweep(grid_file(folder, **changes), [], **arguments)


def test_every_rows_mistakes_come_before_any_run(folder, capsys):
    rows = [{"name": "a", "changes": {"learner": {"kl_beat": 1}}}, {"name": "b", "changes": {"sead": 1}}]
    assert main([str(grid_file(folder, rows=rows))]) == 2
    error = capsys.readouterr().err
    assert "row 'a': unknown key 'learner.kl_beat'" in error and "row 'b': unknown key 'sead'" in error
    rows = [{"name": "a", "changes": {"model": {"path": "/absent"}}}]
    assert main([str(grid_file(folder, rows=rows)), "--dry-run"]) == 2
    assert "no such model folder" in capsys.readouterr().out


def finished(folder: Path, name: str, before, after) -> None:
    run = folder / "runs" / "grid" / name
    for moment, rewards in (("before", before), ("after_t2i", after)):
        path = run / "evaluations" / moment / "t2i.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"rewards": rewards}))
    (run / "summary.json").write_text(json.dumps({"stages": [{"name": "edit"}, {"name": "t2i"}]}))


def test_the_table_averages_over_seeds_and_prompts(tmp_path):
    tiny_recipe(tmp_path)
    grid = load_sweep(grid_file(tmp_path), [])
    before = [0.2, 0.4, 0.6, 0.8]
    finished(tmp_path, "t2i-only-seed0", before, [0.3, 0.5, 0.7, None])
    finished(tmp_path, "t2i-only-seed1", before, [0.4, 0.6, 0.8, 1.0])
    none, t2i, low = collect_rows(grid, run_name)
    assert none.cells["t2i"].mean == pytest.approx(0.5) and none.seeds == ()
    cell = t2i.cells["t2i"]  # the fourth prompt is not scored in every run
    assert (cell.prompts, t2i.seeds) == (3, (0, 1))
    assert cell.mean == pytest.approx(0.55) and cell.change == pytest.approx(0.15)
    assert cell.by_seed == pytest.approx((0.5, 0.6))
    # Every prompt changes by the same .1 or .2, so all that varies is which seeds are drawn.
    assert (cell.low, cell.high) == (pytest.approx(0.1), pytest.approx(0.2))
    assert low.cells == {}
    text = table_markdown("grid", [none, t2i, low])
    assert "| none | – | 0.500 |" in text
    assert "| T2I only | 2 | 0.550 (+0.150 [+0.100, +0.200]) |" in text
    assert "| low lr | – | – |" in text


def test_a_grid_runs_and_keeps_what_is_finished(folder):
    """A real run in a process and a Ray of its own; the second time nothing is trained again."""
    path = str(grid_file(folder, seeds=[0]))
    arguments = [path, "gallery.prompts=0", "--only", "none", "T2I only"]
    assert main(arguments) == 0
    run = folder / "runs" / "grid" / "t2i-only-seed0"
    changed = (run / "metrics.jsonl").stat().st_mtime_ns
    assert main(arguments) == 0
    assert (run / "metrics.jsonl").stat().st_mtime_ns == changed
    table = json.loads((folder / "runs" / "grid" / "table.json").read_text())
    cells = table["rows"][1]["cells"]
    before = json.loads((run / "evaluations" / "before" / "edit.json").read_text())["rewards"]
    assert table["rows"][0]["cells"]["edit"]["mean"] == pytest.approx(np.mean(before))
    assert set(cells) == {"edit", "t2i"} and cells["t2i"]["prompts"] == 4
