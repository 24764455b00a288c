"""Answers against an independent reading of the scenes: the detector's picture, the verifier, the words themselves."""

import re

import numpy as np
import pytest

from worlds.shapes.scenes.captions import FAMILIES, captions
from worlds.shapes.scenes.edits import in_split
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import COLORS, PLACES, SHAPES
from worlds.shapes.scoring.components import analyse
from worlds.shapes.scoring.verifier import verify
from worlds.shapes.training.evaluate_vlm import KINDS, heldout_questions
from worlds.shapes.training.vlm_edits import (
    OUTCOMES,
    PAIR_KINDS,
    carried_out,
    pair_question,
    rest_kept,
    sample_pair,
)
from worlds.shapes.training.vlm_questions import SCENE_KINDS, caption_question, scene_of_split, scene_question

THING = rf"an? ({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
PLACE = "|".join(sorted(PLACES, key=len, reverse=True))
BOTH = ("left of", "right of", "above", "below")


def facts(scene):
    """(colour, shape, column, row) of each object, from its coordinates."""
    return [(item.color, item.shape, round(item.x / 8) - 1, round(item.y / 8) - 1) for item in scene.objects]


def place(fact):
    return PLACES[3 * fact[3] + fact[2]]


def expected(kind, text, scene):
    """The answer by matching the question's words against the facts."""
    found = facts(scene)
    words = re.sub(r"[?.]", "", text).split()
    named = [f for f in found if (f[0] in words) >= (set(words) & set(COLORS) != set())]
    if kind == "count":
        what = [f for f in found if f[0] in words or any(w.startswith(f[1]) for w in words)]
        return str(len(found if text == "How many objects are there?" else what))
    if kind == "background":
        return scene.background
    if kind in ("colour", "shape"):
        at = re.search(rf"at the ({PLACE})\?", text)
        chosen = [f for f in found if (place(f) == at[1] if at else f[0] in words or f[1] in words)]
        assert len(chosen) == 1
        return chosen[0][0 if kind == "colour" else 1]
    if kind == "where":
        chosen = [f for f in named if f[1] in words]
        assert len(chosen) == 1
        return place(chosen[0])
    if kind in ("exists", "attribute"):
        return "yes" if any(f[0] in words and f[1] in words for f in found) else "no"
    assert kind == "relation"
    relation = next(r for r in BOTH if f" {r} the " in text)
    first, second = (
        next(f for f in found if f"{f[0]} {f[1]}" in half) for half in text.split(f" {relation} the ")
    )
    dx, dy = first[2] - second[2], first[3] - second[3]
    true = {"left of": dx == -2, "right of": dx == 2, "above": dy == -2, "below": dy == 2}[relation]
    assert true or abs(dx if relation in BOTH[:2] else dy) != 1
    return "yes" if true else "no"


@pytest.mark.parametrize("kind", [k for k in SCENE_KINDS if k not in ("describe", "result")])
def test_answers_about_a_scene_are_true(kind):
    rng, answers = np.random.default_rng(1), []
    while len(answers) < 150:
        scene = scene_of_split(rng, "train")
        question = scene_question(rng, scene, kind)
        if question is not None:
            assert question.answer == expected(kind, question.text, scene), (question, scene)
            answers.append(question.answer)
    if kind in ("exists", "attribute", "relation"):
        assert 0.35 < answers.count("yes") / len(answers) < 0.65


def test_a_description_names_everything_in_the_order_of_the_cells():
    rng = np.random.default_rng(2)
    for _ in range(100):
        scene = scene_of_split(rng, "train")
        text = scene_question(rng, scene, "describe").answer
        named = re.findall(rf"{THING} at the ({PLACE})", text)
        assert sorted(named) == sorted((f[0], f[1], place(f)) for f in facts(scene))
        assert [PLACES.index(where) for *_, where in named] == sorted(PLACES.index(w) for *_, w in named)
        assert text.endswith(f" on {scene.background}")


def test_a_caption_is_said_in_other_words_of_its_own_split():
    rng, turned = np.random.default_rng(3), 0
    opposite = {
        "left of": "right of",
        "right of": "left of",
        "above": "below",
        "below": "above",
        "and": "and",
    }
    heldout = {
        caption.text
        for tag, families in FAMILIES.items()
        for colored in families
        for caption in captions(tag, colored, "heldout")
    }
    for _ in range(200):
        question = caption_question(rng, "train")
        asked = question.text.removeprefix("Generate an image: ")
        bare, _, background = asked.partition(" on ")
        two = re.fullmatch(r"(an? .*) (left of|right of|above|below|and) (an? .*)", bare)
        wanted = f"{two[3]} {opposite[two[2]]} {two[1]}" if two else bare
        turned += two is not None
        assert question.answer == (f"{wanted} on {background}" if background else wanted)
        assert bare not in heldout and wanted not in heldout
    assert turned > 60


def test_what_is_said_of_an_edit_agrees_with_the_verifier():
    """The verifier looks at the picture; it differs where two places overlap, which the questions' cells do not."""
    rng, differ, seen = np.random.default_rng(4), 0, {}
    for _ in range(250):
        pair = sample_pair(rng, "train")
        score = verify(analyse(render_batch([pair.result]))[0], pair.edit, pair.source)
        done = carried_out(pair.edit, pair.source, pair.result)
        kept = rest_kept(pair.edit, pair.source, pair.result)
        differ += (done, kept) != (score.instruction > 0.9, score.preservation > 0.95)
        seen.setdefault(pair.outcome, []).append((done, kept))
    assert differ <= 5
    assert set(seen) == set(OUTCOMES)
    assert set(seen["right"]) == {(True, True)} and set(seen["untouched"]) == {(False, True)}
    assert (True, False) in seen["extra"]


def test_the_change_of_a_pair_is_the_instruction_that_made_it():
    rng, checked = np.random.default_rng(5), 0
    while checked < 100:
        pair = sample_pair(rng, "train")
        question = pair_question(rng, pair, "change")
        if pair.outcome == "untouched":
            assert question.answer == "nothing"
        elif pair.outcome == "right" and not pair.edit.anywhere:
            assert question.answer == pair.instruction
            checked += 1
        elif pair.outcome == "extra":
            assert question is None


def test_a_question_on_either_picture_is_the_one_on_that_picture_alone():
    rng, found = np.random.default_rng(7), set()
    while len(found) < 6:
        pair = sample_pair(rng, "train")
        question = pair_question(rng, pair, "either")
        which = re.match(
            r"In the (first|second) picture: (What colour is the background|How many)",
            question.text if question else "",
        )
        if which:
            scene = pair.source if which[1] == "first" else pair.result
            kind = "background" if "background" in which[2] else "count"
            assert question.answer == expected(kind, question.text.partition(": ")[2], scene)
            found.add((which[1], question.answer))


def test_training_and_held_out_questions_show_different_scenes():
    rng = np.random.default_rng(6)
    for split in ("train", "heldout"):
        for _ in range(60):
            assert in_split(scene_of_split(rng, split), split)
            pair = sample_pair(rng, split)
            assert in_split(pair.source, split) and in_split(pair.result, split)
    asked = heldout_questions(150)
    assert {item.question.kind for item in asked} == set(KINDS) >= set(PAIR_KINDS)
    assert all(in_split(scene, "heldout") for item in asked for scene in item.scenes)
    assert asked == heldout_questions(150)
