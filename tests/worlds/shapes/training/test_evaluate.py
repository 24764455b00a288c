from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.pictures import contact_sheet
from tests.fakes.tiny_metaquery import make_tiny_metaquery
from worlds.shapes.scenes.edits import in_split
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.training.evaluate import (
    Base,
    Result,
    as_table,
    heldout_questions,
    main,
    mean_interval,
    score,
    summarise,
)

BASE = Path(__file__).parents[4] / "recipes" / "shapes" / "base"


def test_questions_are_held_out_and_repeat():
    first, again = heldout_questions("edit", 20), heldout_questions("edit", 20)
    assert first == again
    assert all(in_split(question.source, "heldout") for question in first)
    assert {question.group for question in heldout_questions("t2i", 100)} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr",
    }  # fmt: skip


def test_an_insertion_is_drawn_from_both_pictures_in_their_order():
    questions = heldout_questions("insert", 3)
    assert {question.group for question in heldout_questions("insert", 30)} == {"stated place", "any place"}
    base = Base.load(BASE)
    drawn = [
        base.draw(asked, 1.0, 2)
        for asked in (
            questions,
            [replace(question, shown=questions[0].source) for question in questions],
            [replace(q, source=q.shown, shown=q.source) for q in questions],
            [replace(question, shown=None) for question in questions],
        )
    ]
    assert len({pictures.tobytes() for pictures in drawn}) == len(drawn)


@pytest.mark.parametrize("task", ["t2i", "edit", "insert"])
def test_right_pictures_score_near_one(task):
    questions = heldout_questions(task, 30)
    truth = render_batch([question.target for question in questions])
    assert score(task, questions, truth).mean() > 0.95


def test_an_edit_that_changes_nothing_scores_zero():
    questions = heldout_questions("edit", 30)
    unchanged = render_batch([question.source for question in questions])
    assert score("edit", questions, unchanged).max() == 0


def test_the_interval_holds_the_mean_and_shrinks_as_the_root_of_the_count():
    scores = np.random.default_rng(0).random(400)
    mean, low, high = mean_interval(scores)
    assert low < mean == scores.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.1)


def test_a_summary_has_a_mean_for_each_group():
    questions = heldout_questions("t2i", 12)
    scores = np.arange(12) / 12
    result = summarise("t2i", "CFG 1", questions, scores)
    for name, value in result.groups.items():
        own = [s for s, question in zip(scores, questions, strict=True) if question.group == name]
        assert value == pytest.approx(np.mean(own))
    assert "CFG 1" in as_table([result, Result("edit", "codec", 1, 0.5, 0.4, 0.6, {})])


def test_a_contact_sheet_keeps_the_pixels():
    rows = [np.full((3, 4, 4, 3), 10, np.uint8), np.full((2, 4, 4, 3), 20, np.uint8)]
    sheet = contact_sheet(rows, scale=2)
    assert isinstance(sheet, Image.Image)
    pixels = np.asarray(sheet)
    assert pixels.shape == (20, 30, 3)
    assert (pixels[:8, :8] == 10).all() and (pixels[10:18, 10:18] == 20).all()
    assert (pixels[10:18, 20:] == 255).all()


def test_a_metaquery_base_is_drawn_with_its_vlm(tmp_path, tiny_model, capsys):
    folder, vlm = make_tiny_metaquery(tmp_path)
    base = Base.load(folder, vlm)
    questions = heldout_questions("edit", 3)
    pictures = base.draw(questions, 2.0, 2)
    assert pictures.shape == (3, 32, 32, 3) and (base.draw(questions, 2.0, 2) == pictures).all()
    sources = [question.source for question in questions]
    seen, unseen = base.embed(["make it red"] * 3, sources), base.embed(["make it red"] * 3, [])
    assert not np.allclose(seen[0], unseen[0]) and not np.allclose(seen[0][0], seen[0][1])

    assert main([str(folder)]) == 2
    assert "(it has conditioner/): give its Qwen2.5-VL as --vlm" in capsys.readouterr().err
    assert main([str(tiny_model), "--vlm", str(vlm)]) == 2
    assert (
        "(it has no conditioner/), which reads prompts with its text encoders; leave"
        in capsys.readouterr().err
    )
    options = ["--num-prompts", "4", "--guidance", "1", "2", "--steps", "1"]
    assert main([str(folder), "--vlm", str(vlm), *options]) == 0
    assert capsys.readouterr().out.count("| CFG 2 |") == 2


def test_a_metaquery_base_is_read_as_it_was_trained(tmp_path, tiny_model, capsys):
    """Positions of the VLM, and who is shown the picture to edit, each change what is drawn."""
    folder, vlm = make_tiny_metaquery(tmp_path)
    questions = heldout_questions("edit", 2)
    settings = [
        {},
        {"position_mode": "mrope"},
        {"references": ["vlm"]},
        {"references": ["transformer"]},
    ]
    drawn = [Base.load(folder, vlm, **setting).draw(questions, 1.0, 2) for setting in settings]
    for first in range(4):
        assert not any((drawn[first] == drawn[second]).all() for second in range(first))
    assert main([str(tiny_model), "--references", "vlm"]) == 2
    assert "the transformer alone can be shown the picture to edit" in capsys.readouterr().err
