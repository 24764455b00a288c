"""Hand-worked verdicts for every tag, failure and corner of GenEval's rules."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from rewards.geneval import TAGS, Detection, evaluate, relations
from rewards.geneval.detection import SCORE_THRESHOLD

DATA = Path(__file__).parents[2] / "data" / "geneval"


def at(x: float, y: float, score: float = 0.95, size: float = 10.0) -> Detection:
    return Detection((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


def judge(record: dict, detections: dict, colors: dict[str, list[str]] | None = None):
    def classify(name: str, asked: Sequence[Detection]) -> list[str]:
        return (colors or {})[name][: len(asked)]

    return evaluate(record, detections, classify_color=classify)


def verdicts(result) -> tuple[bool, bool, float, float]:
    return result.correct, result.strict, result.dense, result.flow_grpo_compat


ONE = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
TWO = {"tag": "two_object", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}
RED = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
COUNT = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 2}],
    "exclude": [{"class": "cat", "count": 3}],
}
COUNT_ONE = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 1}],
    "exclude": [{"class": "cat", "count": 2}],
}
LEFT = {
    "tag": "position",
    "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
}
ATTRIBUTES = {
    "tag": "color_attr",
    "include": [{"class": "cat", "count": 1, "color": "red"}, {"class": "dog", "count": 1, "color": "blue"}],
}


@pytest.mark.parametrize(
    ("record", "detections", "colors", "expected"),
    [
        # (correct, strict, dense, flow_grpo_compat)
        (ONE, {"cat": [at(5, 5)]}, None, (True, True, 1, 1)),
        (ONE, {}, None, (False, False, 0, 0)),
        (ONE, {"dog": [at(5, 5)]}, None, (False, False, 0, 0)),
        (ONE, {"cat": [at(5, 5), at(50, 5)]}, None, (True, False, 0, 0)),
        # 16 found for 1: theirs falls to 1 - 15, ours stays at 0. More than 16 are cut.
        (ONE, {"cat": [at(5 * i, 5) for i in range(16)]}, None, (True, False, 0, -14)),
        (ONE, {"cat": [at(5 * i, 5) for i in range(40)]}, None, (True, False, 0, -14)),
        (TWO, {"cat": [at(5, 5)], "dog": [at(50, 5)]}, None, (True, True, 1, 1)),
        (TWO, {"cat": [at(5, 5)]}, None, (False, False, 0.5, 0.5)),
        (COUNT, {"cat": [at(5, 5), at(50, 5)]}, None, (True, True, 1, 1)),
        (COUNT, {"cat": [at(5, 5)]}, None, (False, False, 0.5, 0.5)),
        # Three for two: half the count, and the violated exclude clause is one more part of 0.
        (COUNT, {"cat": [at(5 * i, 5) for i in range(3)]}, None, (False, False, 0.25, 0.5)),
        (COUNT, {"cat": [at(5 * i, 5) for i in range(5)]}, None, (False, False, 0, -0.5)),
        # 16 where the tag counts one: the exclude clause makes it wrong, and both of our parts are 0.
        (COUNT_ONE, {"cat": [at(5 * i, 5) for i in range(16)]}, None, (False, False, 0, -14)),
        # Only the counting tag asks for more than .9.
        (COUNT, {"cat": [at(5, 5), at(50, 5, 0.9)]}, None, (False, False, 0.5, 0.5)),
        # So a third cat at .9 is no surplus either, and one just above is.
        (COUNT, {"cat": [at(5, 5), at(50, 5), at(90, 5, 0.9)]}, None, (True, True, 1, 1)),
        (COUNT, {"cat": [at(5, 5), at(50, 5), at(90, 5, 0.91)]}, None, (False, False, 0.25, 0.5)),
        (RED, {"cat": [at(5, 5)]}, {"cat": ["red"]}, (True, True, 1, 1)),
        (RED, {"cat": [at(5, 5)]}, {"cat": ["blue"]}, (False, False, 0.5, 0.5)),
        (RED, {}, {}, (False, False, 0, 0)),
        # Two cats, the surer one red: correct, but neither strict nor dense forgives the second.
        (RED, {"cat": [at(5, 5), at(50, 5, 0.8)]}, {"cat": ["red"]}, (True, False, 0.5, 0)),
        (LEFT, {"dog": [at(60, 5)], "cat": [at(5, 5)]}, None, (True, True, 1, 1)),
        # A wrong relation: theirs earns (1 + 1 + 0 + 1) / 4, ours (1 + 1 + 0) / 3.
        (LEFT, {"dog": [at(5, 5)], "cat": [at(60, 5)]}, None, (False, False, 2 / 3, 0.75)),
        (LEFT, {"cat": [at(5, 5)]}, None, (False, False, 1 / 3, 1 / 3)),
        (LEFT, {"dog": [at(5, 5)]}, None, (False, False, 1 / 3, 1 / 3)),
        # Two dogs: the surer one is the target; theirs demands exactly one and gives the relation 0.
        (
            LEFT,
            {"dog": [at(60, 5), at(0, 50, 0.5)], "cat": [at(5, 5)]},
            None,
            (True, False, 2 / 3, 1 / 3),
        ),
        (
            ATTRIBUTES,
            {"cat": [at(5, 5)], "dog": [at(50, 5)]},
            {"cat": ["red"], "dog": ["blue"]},
            (True, True, 1, 1),
        ),
        (
            ATTRIBUTES,
            {"cat": [at(5, 5)], "dog": [at(50, 5)]},
            {"cat": ["blue"], "dog": ["red"]},
            (False, False, 0.5, 0.5),
        ),
        (ATTRIBUTES, {"cat": [at(5, 5)]}, {"cat": ["red"]}, (False, False, 0.5, 0.5)),
    ],
)
def test_verdicts(record, detections, colors, expected):
    result = judge(record, detections, colors)
    assert verdicts(result) == pytest.approx(expected)
    assert bool(result.reason) != result.correct


@pytest.mark.parametrize(("tag", "threshold"), [(tag, 0.9 if tag == "counting" else 0.3) for tag in TAGS])
def test_score_must_exceed_the_threshold_of_the_tag(tag, threshold):
    assert threshold >= SCORE_THRESHOLD, "detectors leave out the masks of what scores less"
    record = {"tag": tag, "include": [{"class": "cat", "count": 1}]}
    assert not judge(record, {"cat": [at(5, 5, threshold)]}).correct
    assert judge(record, {"cat": [at(5, 5, threshold + 1e-6)]}).correct


def test_failed_colour_leaves_no_target():
    record = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1, "color": "red"},
            {"class": "cat", "count": 1, "position": ["left of", 0]},
        ],
    }
    result = judge(record, {"dog": [at(60, 5)], "cat": [at(5, 5)]}, {"dog": ["blue"]})
    # Parts: count 1, colour 0, count 1, position 0.
    assert verdicts(result) == (False, False, 0.5, 0.5)
    assert "no target for cat" in result.reason


def test_own_wrong_colour_forfeits_the_relation():
    record = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
    }
    result = judge(record, {"dog": [at(60, 5)], "cat": [at(5, 5)]}, {"cat": ["blue"]})
    # Ours: 1, then 1, 0, 0. Theirs leaves the relation out: 1, then 1, 0.
    assert verdicts(result) == pytest.approx((False, False, 0.5, 2 / 3))


def test_every_pair_must_stand_in_the_relation():
    record = {
        "tag": "position",
        "include": [{"class": "dog", "count": 2}, {"class": "cat", "count": 1, "position": ["left of", 0]}],
    }
    result = judge(record, {"dog": [at(60, 5), at(5, 5)], "cat": [at(30, 5)]})
    assert verdicts(result) == pytest.approx((False, False, (1 + 1 + 0.5) / 3, 0.75))


def test_colour_share_counts_the_surest_objects():
    record = {"tag": "colors", "include": [{"class": "cat", "count": 3, "color": "red"}]}
    result = judge(record, {"cat": [at(9 * i, 5) for i in range(3)]}, {"cat": ["red", "blue", "red"]})
    assert verdicts(result) == pytest.approx((False, False, (1 + 2 / 3) / 2, (1 + 2 / 3) / 2))


def test_class_in_two_clauses_sees_the_same_objects():
    record = {
        "tag": "color_attr",
        "include": [{"class": "cat", "count": 1, "color": c} for c in ("red", "blue")],
    }
    result = judge(record, {"cat": [at(5, 5), at(50, 5, 0.8)]}, {"cat": ["red", "blue"]})
    # As upstream: both clauses look at the surest cat, which is red.
    assert not result.correct
    assert result.dense == pytest.approx((0 + 1 + 0 + 0) / 4)


def test_most_confident_objects_are_taken_whatever_the_order():
    asked = []

    def classify(name, detections):
        asked.extend(d.score for d in detections)
        return ["red"] * len(detections)

    record = {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}]}
    evaluate(record, {"cat": [at(5, 5, 0.4), at(20, 5, 0.9), at(35, 5, 0.6)]}, classify_color=classify)
    assert asked == [0.9, 0.6]


def test_equal_scores_keep_the_detectors_order():
    seen = []

    def classify(name, detections):
        seen.extend(d.box[0] for d in detections)
        return ["red"] * len(detections)

    evaluate(RED, {"cat": [at(40, 5), at(5, 5), at(20, 5)]}, classify_color=classify)
    assert seen == [35.0]


def test_exclude_of_another_class():
    record = {
        "tag": "single_object",
        **{"include": ONE["include"]},
        "exclude": [{"class": "dog", "count": 1}],
    }
    result = judge(record, {"cat": [at(5, 5)], "dog": [at(50, 5)]})
    assert verdicts(result) == (False, False, 0.5, 1)
    assert judge(record, {"cat": [at(5, 5)], "dog": [at(50, 5, 0.2)]}).correct
    alone = {"tag": "single_object", "exclude": [{"class": "dog", "count": 1}]}
    assert verdicts(judge(alone, {})) == (True, True, 1, 0)


@pytest.mark.parametrize(
    ("box", "target", "expected"),
    [
        ((0, 0, 10, 10), (40, 0, 50, 10), {"left of"}),
        ((40, 0, 50, 10), (0, 0, 10, 10), {"right of"}),
        ((0, 0, 10, 10), (0, 40, 10, 50), {"above"}),
        ((0, 40, 10, 50), (0, 0, 10, 10), {"below"}),
        ((0, 0, 10, 10), (40, 40, 50, 50), {"left of", "above"}),
        ((0, 0, 10, 10), (0, 0, 10, 10), set()),
        # Within a tenth of both sizes: an offset of 2 between boxes of 10 shrinks to nothing.
        ((0, 0, 10, 10), (2, 0, 12, 10), set()),
        # 3.9 shrinks to 1.9, which is under half of 3.9; 4.1 shrinks to 2.1, which is over half of it.
        ((0, 0, 10, 10), (3.9, 0, 13.9, 10), set()),
        ((0, 0, 10, 10), (4.1, 0, 14.1, 10), {"left of"}),
    ],
)
def test_relations(box, target, expected):
    assert relations(box, target) == expected


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"include": ONE["include"]}, "metadata.tag"),
        ({"tag": "colors"}, "neither include nor exclude"),
        ({"tag": "colors", "include": [{"class": "cat"}]}, r"include\[0\].count: None"),
        ({"tag": "colors", "include": [{"class": "cat", "count": 0}]}, r"include\[0\].count: 0"),
        ({"tag": "colors", "include": [{"count": 1}]}, r"include\[0\].class"),
        (
            {"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["near", 0]}]},
            r"include\[0\].position: .*near",
        ),
        (
            {"tag": "position", "include": [{"class": "cat", "count": 1, "position": ["left of", 0]}]},
            "not the index of an earlier",
        ),
        (
            {"tag": "counting", "include": ONE["include"], "exclude": [{"class": "cat"}]},
            r"exclude\[0\].count",
        ),
        ({"tag": "colors", "include": ["cat"]}, r"include\[0\]: 'cat' is not a clause"),
        ({"tag": "colors", "include": "cat"}, "include: 'cat' is not a list of clauses"),
        (
            {"tag": "colors", "include": {"class": "cat", "count": 1}},
            "include: {.*} is not a list of clauses",
        ),
        (
            {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": ["red"]}]},
            r"\[0\].color: \['red'\]",
        ),
        (
            {
                "tag": "counting",
                "exclude": [ONE["include"][0], {**ONE["include"][0], "position": ["above", 0]}],
            },
            r"exclude\[1\].position",
        ),
    ],
)
def test_malformed_metadata_is_named(record, message):
    with pytest.raises(ValueError, match=message):
        judge(record, {"cat": [at(5, 5)]})


def test_bad_detections_and_classifiers_are_refused():
    with pytest.raises(ValueError, match="box"):
        Detection((0.0, 0.0, float("nan"), 1.0), 0.5)
    with pytest.raises(ValueError, match="score"):
        Detection((0.0, 0.0, 1.0, 1.0), float("nan"))
    with pytest.raises(ValueError, match="0 colours for 1 detections of cat"):
        evaluate(RED, {"cat": [at(5, 5)]}, classify_color=lambda name, asked: [])
