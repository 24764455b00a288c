"""GEdit-Bench: both ways to its data, hand-worked tables by language and subset."""

import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from core.prompts import Prompt, load_references
from rewards.benchmarks import gedit, gedit_export
from rewards.benchmarks.items import DataError, Item, ScoredItem

INSTRUCTIONS = Path(__file__).parents[2] / "data" / "gedit" / "instructions.json"


def item(group, sc, pq, *, language="en", intersection=True):
    """One edit with these grades; None for both when it is missing."""
    metadata = {"group": group, "language": language, "intersection": intersection}
    images = (None,) if sc is None else ({"score": 0.5, "sc": sc, "pq": pq},)
    key = f"{group}/{language}/{sc}{pq}{intersection}"
    return ScoredItem(Item(key, group, Prompt(0, "edit", "x", ("x.png",), metadata)), images)


def complete(value=4.0, **more):
    return [item(group, value, value, **more) for group in gedit.GROUPS]


def values(rows):
    return {row.name: row.value for row in rows}


@pytest.fixture
def pictures(tmp_path):
    """The folder of source pictures that the sample of instructions names."""
    for row in json.loads(INSTRUCTIONS.read_text()).values():
        path = tmp_path / row["id"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), "red").save(path)
    return tmp_path


def test_instructions_as_json_are_read(pictures):
    items = gedit.read(INSTRUCTIONS, references=pictures)
    assert len(items) == 22
    assert {item.group for item in items} == set(gedit.GROUPS)
    assert items[0].key == "background_change/en/4a7d36259ad94d238a6e7e7e0bd6b643"
    assert items[0].prompt.prompt == "Change the background to a city street."
    assert load_references(items[0].prompt)[0].size == (6, 4)
    assert items[0].prompt.metadata["intersection"] is None


def test_the_table_of_a_language_is_the_mean_over_groups_of_each_samples_root():
    scored = [*complete(), item("text_change", 9.0, 1.0), item("text_change", 0.0, 10.0)]
    found = values(gedit.figures(scored))
    text = (4.0 + 3.0 + 0.0) / 3  # sqrt(16), sqrt(9), sqrt(0): of the samples, not of the means
    assert found["en full overall"] == pytest.approx((10 * 4.0 + text) / 11)
    assert found["en full overall, text_change"] == pytest.approx(text)
    assert text != pytest.approx(math.sqrt((4 + 9 + 0) / 3 * (4 + 1 + 10) / 3))
    assert found["en full SC"] == pytest.approx((10 * 4.0 + 13 / 3) / 11)
    assert found["en full PQ"] == pytest.approx((10 * 4.0 + 5.0) / 11)
    assert not any(name.startswith("cn") for name in found)


def test_the_intersection_and_the_languages_are_kept_apart():
    scored = [*complete(4.0), *complete(8.0, intersection=False), *complete(2.0, language="cn")]
    found = values(gedit.figures(scored))
    assert found["en full overall"] == pytest.approx(6.0)
    assert found["en intersection overall"] == pytest.approx(4.0)
    assert found["cn full overall"] == found["cn intersection overall"] == pytest.approx(2.0)


def test_where_nobody_says_what_the_intersection_is_there_is_no_row_of_it():
    assert not any("intersection" in row.name for row in gedit.figures(complete(intersection=None)))


def test_a_missing_edit_is_counted_and_a_missing_group_leaves_no_mean():
    rows = gedit.figures([*complete()[:-1], item("tone_transfer", None, None), item("ps_human", None, None)])
    overall = rows[0]
    assert overall.name == "en full overall"
    assert (overall.value, overall.missing, overall.expected) == (None, 2, 12)
    assert values(rows)["en full overall, ps_human"] == 4.0


def test_compat_changes_nothing():
    scored = [*complete(3.0), item("ps_human", 9.0, 4.0)]
    assert values(gedit.figures(scored)) == values(gedit.figures(scored, compat=True))


def rows_of_the_data_set(count=2):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "blue").save(buffer, "JPEG")
    for k in range(count):
        for language, text in (("en", "make it red"), ("cn", "把它变成红色")):
            yield {
                "key": f"{language}{k}", "task_type": gedit.GROUPS[k], "instruction": text,
                "instruction_language": language, "Intersection_exist": k == 0,
                "input_image": {"bytes": buffer.getvalue()},
            }  # fmt: skip


def test_the_data_set_is_unpacked_to_the_public_layout_and_read_back(tmp_path):
    assert gedit_export.export(rows_of_the_data_set(), tmp_path) == 4
    assert (tmp_path / "fullset" / "background_change" / "cn" / "cn0_SRCIMG.png").is_file()
    english, both = gedit.read(tmp_path), gedit.read(tmp_path, languages=("en", "cn"))
    assert [item.key for item in english] == ["background_change/en/en0", "color_alter/en/en1"]
    assert [item.prompt.metadata["intersection"] for item in english] == [True, False]
    assert [item.prompt.prompt for item in both][1] == "把它变成红色"
    assert load_references(both[1].prompt)[0].size == (8, 6)


@pytest.mark.parametrize("column", ["key", "task_type", "instruction_language"])
@pytest.mark.parametrize("value", ["../../escape", "/tmp/escape", "..", "a\0b"])
def test_no_column_leads_out_of_the_folder(tmp_path, column, value):
    (first, *_) = rows_of_the_data_set()
    with pytest.raises(DataError, match=rf"row 0: {column} .*a folder is called so"):
        gedit_export.export([first | {column: value}], tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "escape").exists()


def test_a_row_without_a_picture_is_refused_and_no_list_is_written(tmp_path):
    rows = [row | {"input_image": None} for row in rows_of_the_data_set(1)]
    with pytest.raises(DataError, match="row 0: has no input_image"):
        gedit_export.export(rows, tmp_path)
    assert not (tmp_path / gedit.METADATA).exists()


def test_what_cannot_be_unpacked_is_said_on_the_command_line(tmp_path, capsys):
    assert gedit_export.main([str(tmp_path / "absent"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install pyarrow" in error or "holds no parquet file" in error
    assert gedit_export.main([]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edit_type": "recolour"}, "group 'recolour' is not one of background_change"),
        ({"id": "fullset/ps_human/fr/x.png"}, "language 'fr' is not one of en, cn"),
        ({"id": "fullset/ps_human/en/absent.png"}, "does not exist; get the data set stepfun-ai/GEdit-Bench"),
        ({"prompt": " "}, "the instruction is empty"),
    ],
)
def test_bad_rows_are_refused(pictures, tmp_path, change, message):
    key, row = next(iter(json.loads(INSTRUCTIONS.read_text()).items()))
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({key: row | change}))
    with pytest.raises(DataError) as caught:
        gedit.read(path, references=pictures)
    assert message in str(caught.value) and key in str(caught.value)


def test_data_in_no_known_form_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    for path, references, message in (
        (tmp_path / "x.json", None, "give --references, the folder of its pictures"),
        (tmp_path / "x.json", tmp_path, 'is not {key: {"prompt", "id", "edit_type"}}'),
        (tmp_path, None, "cannot be read as the list of GEdit-Bench's edits"),
    ):
        with pytest.raises(DataError) as caught:
            gedit.read(path, references=references)
        assert message in str(caught.value)
