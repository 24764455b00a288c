"""The proof of the task that needs two references: what it asks, and what it makes of a run's figures."""

import json

import numpy as np
import pytest

from bench.accept import evidence, two_references
from bench.accept.evidence import Clock
from bench.accept.learning_pictures import blocks
from bench.accept.two_references import BASE, RECIPE, ROOT, RUNS, mislead, run_claims, write_evidence
from rl.recipe.schema import load_config
from worlds.shapes.training.config import load_recipe
from worlds.shapes.training.evaluate import Base, heldout_questions


def test_the_recipes_follow_each_other():
    base = load_recipe(ROOT / two_references.BASE_RECIPE)
    recipe = load_config(ROOT / RECIPE)
    assert recipe.model.path.endswith(f"{base.output_dir}/model") and ROOT / base.output_dir == RUNS / "base"
    assert base.targets.insert and base.insert_share
    assert [stage.name for stage in recipe.stages] == ["insert"], "the proof reads `after_insert`"


def test_a_misleading_second_picture_shows_another_shape_and_colour():
    questions = heldout_questions("insert", 40)
    for asked, told in zip(questions, mislead(questions), strict=True):
        (right,), (wrong,) = asked.shown.objects, told.shown.objects
        assert right.shape != wrong.shape and right.color != wrong.color
        assert (asked.source, asked.target, asked.prompt) == (told.source, told.target, told.prompt)


def test_the_sheet_shows_both_pictures():
    (block,) = blocks("insert", heldout_questions("insert", 1), Base.load(BASE))
    assert block.reference.shape == (64, 32, 3)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose rewards rose by .1 on each of 50 prompts; the second scorer's fell."""
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    monkeypatch.setattr(two_references, "RUNS", tmp_path)
    rng = np.random.default_rng(0)
    before = rng.random(50)
    (tmp_path / "evaluations").mkdir()
    for moment, change in (("before", 0.0), ("after_insert", 0.1)):
        (tmp_path / "evaluations" / moment).mkdir()
        found = {
            "rewards": [*(before + change)],
            "components": {"edit_shapes_template": [*(before - change)]},
        }
        (tmp_path / "evaluations" / moment / "edit.json").write_text(json.dumps(found))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "export.json").write_text('{"step": 7}')
    return tmp_path


def test_a_rise_holds_and_a_fall_does_not(run, capsys):
    claims = run_claims(run)
    assert [claim.holds for claim in claims] == [True, False]
    assert "+0.100 [+0.100, +0.100]" in claims[0].measured
    with pytest.raises(SystemExit):
        write_evidence(claims, Clock(run / "seconds.json"), run)
    page = (run / "two_references.md").read_text()
    assert "(7 steps from the embedded base)" in page and "**no**" in page and page in capsys.readouterr().out
    write_evidence(claims[:1], Clock(run / "seconds.json"), run)
    assert json.loads((run / "two_references.json").read_text())["changes"][0]["mean"] == pytest.approx(0.1)
