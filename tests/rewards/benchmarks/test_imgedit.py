"""ImgEdit: its list of edits, hand-worked tables, and the rounding of the public scripts."""

import json
from pathlib import Path

import pytest
from PIL import Image

from core.prompts import Prompt
from rewards.benchmarks import imgedit
from rewards.benchmarks.items import DataError, Item, ScoredItem

EDITS = Path(__file__).parents[2] / "data" / "imgedit" / "basic_edit.json"


def item(kind, *grades):
    """One edit with its three grades; nothing for one that is missing."""
    images = (
        (dict(zip(imgedit.GRADES, map(float, grades), strict=True)) | {"score": 0.5},) if grades else (None,)
    )
    return ScoredItem(Item(f"{kind}{grades}", kind, Prompt(0, "edit", "x", ("x.png",))), images)


def values(rows):
    return {row.name: row.value for row in rows}


@pytest.fixture
def originals(tmp_path):
    (tmp_path / "scenes").mkdir()
    for k in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "scenes" / f"{k}.png")
    return tmp_path


def test_the_list_of_edits_is_read(originals):
    items = imgedit.read(EDITS, references=originals)
    assert [item.key for item in items][:3] == ["7", "12", "3"]
    assert {item.group for item in items} == set(imgedit.TYPES), "hybrid is compose by its name in the paper"
    assert items[0].prompt.references == (str(originals / "scenes" / "0.png"),)
    assert items[2].prompt.metadata == {"edit_type": "alter"}


def test_an_item_is_the_mean_of_three_grades_a_type_of_its_items_the_score_of_the_types():
    scored = [item(kind, 3, 3, 3) for kind in imgedit.TYPES[1:]] + [
        item("add", 5, 4, 4),
        item("add", 1, 1, 2),
    ]
    found = values(imgedit.figures(scored))
    assert found["add"] == pytest.approx((13 / 3 + 4 / 3) / 2)
    assert found["overall"] == pytest.approx((8 * 3 + 17 / 6) / 9)
    assert found["mean over items"] == pytest.approx((8 * 3 + 17 / 3) / 10)
    assert found["overall, adherence alone"] == pytest.approx((8 * 3 + 3) / 9)
    assert found["overall, preservation alone"] == pytest.approx((8 * 3 + 3) / 9)


def test_compat_rounds_items_types_and_their_mean_to_two_decimals():
    scored = [item("add", 5, 4, 4), item("add", 1, 1, 2), item("add", 1, 2, 2), item("alter", 2, 2, 3)]
    found = values(imgedit.figures(scored, compat=True))
    add = round((4.33 + 1.33 + 1.67) / 3, 2)
    assert found["add"] == add == 2.44
    assert found["alter"] == 2.33
    assert found["overall"] == round((add + 2.33) / 2, 2)
    assert "remove" not in found
    right = values(imgedit.figures(scored))
    assert right["add"] == pytest.approx(22 / 9) and right["overall"] is None, "types are missing"


def test_missing_edits_are_counted():
    rows = imgedit.figures([item("add", 3, 3, 3), item("add"), item("style")])
    assert (rows[0].expected, rows[0].missing, rows[0].value) == (3, 2, None)
    assert values(rows)["add"] == 3.0 and values(rows)["style"] is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"edit_type": "shrink"}, "edit_type 'shrink' is not one of add"),
        ({"prompt": ""}, "prompt is empty"),
        ({"id": "scenes/9.png"}, "9.png does not exist; get basic_edit.json"),
    ],
)
def test_bad_edits_are_refused(originals, tmp_path, row, message):
    path = tmp_path / "edits.json"
    path.write_text(json.dumps({"1": {"id": "scenes/0.png", "prompt": "x", "edit_type": "add"} | row}))
    with pytest.raises(DataError) as caught:
        imgedit.read(path, references=originals)
    assert message in str(caught.value)


def test_files_of_another_kind_are_refused(tmp_path):
    for text, message in (("[]", "is not {key"), ("{", "is not {key"), ("{}", "holds no edits")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError) as caught:
            imgedit.read(tmp_path / "x.json", references=tmp_path)
        assert message in str(caught.value) and "states no licence" in str(caught.value)
    with pytest.raises(DataError, match="--references is missing"):
        imgedit.read(EDITS, references=None)
    with pytest.raises(DataError, match="cannot be read as ImgEdit's list of edits"):
        imgedit.read(tmp_path / "absent.json", references=tmp_path)
