"""GenEval's table: its official prompts, hand-worked figures, and the public summary's way."""

from collections import Counter
from pathlib import Path

import pytest

from core.prompts import Prompt
from rewards.benchmarks import geneval
from rewards.benchmarks.items import DataError, Item, ScoredItem
from rewards.geneval.rules import TAGS

OFFICIAL = Path(__file__).parents[2] / "data" / "geneval" / "evaluation_metadata.jsonl"


def item(tag, *correct, strict=None):
    """Pictures that are correct or not; None for one that is absent."""
    images = tuple(
        None
        if value is None
        else {"score": value, "m2f.clip.correct": value, "m2f.clip.strict": strict if strict is not None else value,
              "m2f.clip.dense": value / 2}
        for value in correct
    )  # fmt: skip
    return ScoredItem(Item(f"{tag}{correct}", tag, Prompt(0, "t2i", "x")), images)


def values(rows):
    return {row.name: row.value for row in rows}


def test_the_official_prompts_are_read():
    items = geneval.read(OFFICIAL)
    assert len(items) == 553
    assert [items[0].key, items[552].key] == ["00000", "00552"]
    assert Counter(item.group for item in items) == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip
    assert items[0].prompt.prompt == "a photo of a bench"
    assert items[0].prompt.metadata["include"] == [{"class": "bench", "count": 1}]


def test_the_overall_score_is_the_mean_over_the_six_tags():
    scored = [item(tag, 1.0, 0.0, 0.0, 0.0) for tag in TAGS[:5]]
    scored += [item(TAGS[5], 1.0, 1.0, 1.0, 1.0), item(TAGS[5], 0.0, 0.0, 1.0, 1.0)]
    found = values(geneval.figures(scored))
    assert found["color_attr"] == 6 / 8
    assert found["overall"] == pytest.approx((5 * 0.25 + 0.75) / 6)
    assert found["correct images"] == pytest.approx((5 + 6) / 28)
    assert found["correct prompts"] == 1.0
    assert found["overall, partial credit"] == pytest.approx(found["overall"] / 2)


def test_a_tag_without_pictures_leaves_no_overall_score_but_in_compat():
    scored = [item("colors", 1.0, 0.0), item("position", None, None)]
    right, theirs = values(geneval.figures(scored)), values(geneval.figures(scored, compat=True))
    assert right["overall"] is None and right["colors"] == 0.5 and right["position"] is None
    assert theirs["overall"] == 0.5
    assert "position" not in theirs


def test_a_prompt_with_a_missing_picture_is_correct_only_if_another_one_is():
    scored = [item("colors", 1.0, None), item("colors", 0.0, None), item("colors", 0.0, 0.0)]
    row = next(row for row in geneval.figures(scored) if row.name == "correct prompts")
    assert (row.value, row.missing) == (0.5, 2)
    theirs = next(row for row in geneval.figures(scored, compat=True) if row.name == "correct prompts")
    assert theirs.value == pytest.approx(1 / 3)


def test_missing_pictures_are_counted():
    rows = geneval.figures([item("colors", 1.0, None, 0.0, None)])
    overall = rows[0]
    assert (overall.expected, overall.missing) == (4, 2)
    assert values(rows)["colors"] == 0.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", "tag": "colour"}', "tag 'colour' is not one of single_object"),
        ('{"prompt": "x", "tag": "colors", "include": [{"class": "cup"}]}', "include[0].count"),
        ('{"tag": "colors"}', "key 'prompt' must be a non-empty string"),
        ("not json", "not valid JSON"),
    ],
)
def test_lines_that_are_no_records_are_refused_with_a_way_out(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError) as caught:
        geneval.read(path)
    assert message in str(caught.value) and "github.com/djghosh13/geneval" in str(caught.value)


def test_an_absent_file_says_where_to_get_it(tmp_path):
    with pytest.raises(DataError, match="evaluation_metadata.jsonl of github.com/djghosh13/geneval"):
        geneval.read(tmp_path / "absent.jsonl")
