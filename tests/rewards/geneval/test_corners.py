"""Corners of GenEval's rules, worked by hand: reasons, repeated classes, boxes, what colour is asked about, cuts."""

import pytest

from rewards.geneval import Detection, evaluate, relations
from tests.rewards.geneval.test_rules import ATTRIBUTES, ONE, RED, at, judge, verdicts

SEVERAL = {
    "tag": "position",
    "include": [
        {"class": "dog", "count": 1, "color": "red"},
        {"class": "cat", "count": 2, "color": "blue", "position": ["left of", 0]},
    ],
    "exclude": [{"class": "bird", "count": 1}],
}
TWO_CATS = [at(5, 5), at(5, 40)]


@pytest.mark.parametrize(
    ("detections", "colors", "reason", "parts"),
    [
        # Parts: dog's count and colour, cats' count, colour and place, and a 0 for a bird.
        ({"dog": [at(60, 5)], "cat": TWO_CATS}, ("red", "blue"), "", (1, 1, 1, 1, 1)),
        (
            {"cat": [at(5, 5)]},
            ("red", "blue"),
            "expected 1 dog, found 0; expected 2 cat, found 1",
            (0, 0, 0.5, 0, 0),
        ),
        (
            {"cat": TWO_CATS},
            ("red", "blue"),
            "expected 1 dog, found 0; no target for cat to be left of",
            (0, 0, 1, 1, 0),
        ),
        (
            {"dog": [at(60, 5)], "cat": TWO_CATS},
            ("pink", "blue"),
            "expected 1 red dog, found 0 in that colour; no target for cat to be left of",
            (1, 0, 1, 1, 0),
        ),
        # A wrong colour of the object that is placed: its place is not looked at.
        (
            {"dog": [at(60, 5)], "cat": TWO_CATS},
            ("red", "pink"),
            "expected 2 blue cat, found 0 in that colour",
            (1, 1, 1, 0, 0),
        ),
        (
            {"dog": [at(60, 5)], "cat": [at(5, 5), at(95, 5)]},
            ("red", "blue"),
            "expected cat left of dog, found another relation",
            (1, 1, 1, 1, 0.5),
        ),
        (
            {"dog": [at(60, 5)], "cat": TWO_CATS, "bird": [at(30, 30), at(40, 40)]},
            ("red", "blue"),
            "expected fewer than 1 bird, found 2",
            (1, 1, 1, 1, 1, 0),
        ),
    ],
)
def test_every_failure_has_its_reason_and_its_parts(detections, colors, reason, parts):
    dog, cat = colors
    result = judge(SEVERAL, detections, {"dog": [dog], "cat": [cat, cat]})
    assert result.reason == reason
    assert result.correct is (reason == "")
    assert result.dense == pytest.approx(sum(parts) / len(parts))


def test_a_class_in_two_clauses_of_other_counts():
    record = {
        "tag": "two_object",
        "include": [{"class": "cat", "count": 1}, {"class": "cat", "count": 2}],
    }
    # Each clause counts all cats by itself: two are one too many for the first.
    two = judge(record, {"cat": [at(5, 5), at(50, 5)]})
    assert verdicts(two) == pytest.approx((True, False, 0.5, 0.5))
    one = judge(record, {"cat": [at(5, 5)]})
    assert verdicts(one) == pytest.approx((False, False, 0.75, 0.75))


def test_an_object_never_stands_in_a_relation_to_itself():
    record = {
        "tag": "position",
        "include": [{"class": "cat", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    }
    # Both clauses take the surest cat, although the other one does stand left of it.
    result = judge(record, {"cat": [at(60, 5), at(5, 5, 0.8)]})
    # Ours: counts 0 and 0, relation 0. Theirs wants exactly one: 0, then 0 and one 0 for the relation.
    assert verdicts(result) == (False, False, 0, 0)
    assert result.reason == "expected cat left of cat, found another relation"
    alone = judge(record, {"cat": [at(60, 5)]})
    # Ours: 1, 1, 0. Theirs: 1, 1, then the 0 and the 1 of a wrong relation.
    assert verdicts(alone) == pytest.approx((False, False, 2 / 3, 0.75))


@pytest.mark.parametrize("relation", ["right of", "below"])
def test_a_diagonal_fulfils_either_relation(relation):
    record = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": [relation, 0]}],
    }
    assert judge(record, {"dog": [at(5, 5)], "cat": [at(60, 60)]}).strict
    assert not judge(record, {"dog": [at(60, 60)], "cat": [at(5, 5)]}).correct


@pytest.mark.parametrize(
    ("box", "target", "expected"),
    [
        # Sizes 10 and 100, so the margin is 11 on each axis: 30 - 11 = 19 is over half of 30.
        ((75, 45, 85, 55), (0, 0, 100, 100), {"right of"}),
        # 20 - 11 = 9 is under half of 20.
        ((65, 45, 75, 55), (0, 0, 100, 100), set()),
        # Exactly one half is not above it: 4 - 2 = 2.
        ((4, 0, 14, 10), (0, 0, 10, 10), set()),
        # Offset (20, 40), length 44.7, margin 2: 18 is .40 of it, 38 is .85.
        ((20, 40, 30, 50), (0, 0, 10, 10), {"below"}),
        # Offset (30, 40), length 50: 28 is .56, 38 is .76.
        ((30, 40, 40, 50), (0, 0, 10, 10), {"right of", "below"}),
        # Wide and flat: margins 20 across and 2 down.
        ((0, 30, 100, 40), (30, 0, 130, 10), {"below"}),
        # Boxes without an extent stand where they are, and nowhere when they coincide.
        ((5, 5, 5, 5), (9, 5, 9, 5), {"left of"}),
        ((5, 5, 5, 5), (5, 5, 5, 5), set()),
        # Corners the wrong way round have the same centre and size.
        ((10, 10, 0, 0), (50, 10, 40, 0), {"left of"}),
    ],
)
def test_relations_by_hand(box, target, expected):
    assert relations(box, target) == expected
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(target, box) == {mirror[name] for name in expected}


def test_a_box_without_area_counts_and_its_colour_is_asked():
    flat = Detection((5, 5, 5, 40), 0.95)
    asked = []

    def classify(name, detections):
        asked.extend(detections)
        return [""]  # what a classifier says that has nothing to look at: no colour at all

    result = evaluate(RED, {"cat": [flat]}, classify_color=classify)
    assert asked == [flat]
    assert verdicts(result) == (False, False, 0.5, 0.5)
    assert result.reason == "expected 1 red cat, found 0 in that colour"
    assert judge(ONE, {"cat": [flat]}).strict


def test_a_classifier_that_fails_leaves_no_verdict():
    def classify(name, detections):
        raise RuntimeError("the crop is empty")

    with pytest.raises(RuntimeError, match="the crop is empty"):
        evaluate(RED, {"cat": [at(5, 5)]}, classify_color=classify)


def test_colour_is_asked_only_where_it_can_matter():
    asked = []

    def classify(name, detections):
        asked.append((name, len(detections)))
        return ["red"] * len(detections)

    both = {"cat": [at(5, 5)], "dog": [at(50, 5), at(70, 5)]}
    evaluate(ATTRIBUTES, both, classify_color=classify)
    assert asked == [("cat", 1), ("dog", 1)]
    asked.clear()
    too_few = {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}]}
    evaluate(too_few, {"cat": [at(5, 5)]}, classify_color=classify)
    evaluate(ONE, {"cat": [at(5, 5)]}, classify_color=classify)
    assert asked == []


def test_sixteen_of_a_class_are_kept_the_surest_first():
    many = [at(5 * i, 5, 0.91 + 0.002 * i) for i in range(20)]
    record = {"tag": "counting", "include": [{"class": "cat", "count": 16}]}
    # Four of the twenty are cut, so sixteen is what is found.
    assert judge(record, {"cat": many}).strict
    beyond = {"tag": "counting", "include": [{"class": "cat", "count": 17}]}
    assert judge(beyond, {"cat": many}).reason == "expected 17 cat, found 16"
    red = {"tag": "colors", "include": [{"class": "cat", "count": 16, "color": "red"}]}
    seen = []

    def classify(name, detections):
        seen.extend(d.score for d in detections)
        return ["red"] * len(detections)

    evaluate(red, {"cat": many}, classify_color=classify)
    assert seen == sorted((d.score for d in many), reverse=True)[:16]


def test_ties_at_the_cut_keep_the_detectors_order():
    record = {
        "tag": "position",
        "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    }
    left, right = at(5, 5, 0.5), at(95, 5, 0.5)
    target = {"dog": [at(50, 5)]}
    assert judge(record, {**target, "cat": [left, right]}).correct
    assert not judge(record, {**target, "cat": [right, left]}).correct
