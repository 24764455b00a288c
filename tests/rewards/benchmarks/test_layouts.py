"""Picture folders: what is written is found, what others wrote is found, what is wrong with them is said."""

import json

import numpy as np
import pytest
from PIL import Image

from core.prompts import Prompt
from rewards.benchmarks.items import DataError, Item
from rewards.benchmarks.layouts import Keyed, Numbered
from rewards.benchmarks.registry import BENCHMARKS, Request

ITEM = Item("00007", "colors", Prompt(7, "t2i", "a red cup", metadata={"tag": "colors"}))


def pictures(count, size=(6, 4)):
    rng = np.random.default_rng(count)
    return [
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)
    ]


def same(found, images):
    return all(
        np.array_equal(np.asarray(f.load()), np.asarray(i)) for f, i in zip(found, images, strict=True)
    )


@pytest.mark.parametrize(
    ("layout", "count", "files"),
    [
        (Numbered(), 2, {"00007/metadata.jsonl", "00007/samples/00000.png", "00007/samples/00001.png"}),
        (Keyed(), 4, {"00007.png"}),
        (Keyed(), 1, {"00007.png"}),
        (Keyed("fullset"), 1, {"fullset/00007.png"}),
    ],
    ids=["geneval", "dpg", "dpg_single", "gedit"],
)
def test_what_is_written_is_found(tmp_path, layout, count, files):
    assert layout.find(tmp_path, ITEM, count) == [None] * count
    images = pictures(count)
    layout.write(tmp_path, ITEM, images)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == files
    assert same(layout.find(tmp_path, ITEM, count), images)
    assert layout.problems(tmp_path, ITEM, count) == []


def test_files_that_are_there_are_left_alone(tmp_path):
    first, second = pictures(2)
    Keyed().write(tmp_path, ITEM, [first])
    before = (tmp_path / "00007.png").stat().st_mtime_ns
    Keyed().write(tmp_path, ITEM, [second])
    assert (tmp_path / "00007.png").stat().st_mtime_ns == before
    assert same(Keyed().find(tmp_path, ITEM, 1), [first])


def test_geneval_records_are_written_as_the_public_evaluator_reads_them(tmp_path):
    Numbered().write(tmp_path, ITEM, pictures(1))
    record = json.loads((tmp_path / "00007" / "metadata.jsonl").read_text())
    assert record == {"prompt": "a red cup", "tag": "colors"}


def test_other_numberings_are_taken_in_the_order_of_their_numbers(tmp_path):
    samples = tmp_path / "00007" / "samples"
    samples.mkdir(parents=True)
    images = pictures(3)
    for name, image in zip(("2.png", "10.png", "0001.png"), images, strict=True):
        image.save(samples / name)
    (samples / "grid.png").write_bytes(b"not a sample")
    found = Numbered().find(tmp_path, ITEM, 4)
    assert found[3] is None
    assert same(found[:3], [images[2], images[0], images[1]])


def test_the_grid_is_cut_by_its_own_size(tmp_path):
    quarters = pictures(4, (5, 3))
    grid = Image.new("RGB", (10, 6))
    for k, quarter in enumerate(quarters):
        grid.paste(quarter, (k % 2 * 5, k // 2 * 3))
    grid.save(tmp_path / "00007.png")
    assert same(Keyed().find(tmp_path, ITEM, 4), quarters)
    grid.crop((0, 0, 9, 6)).save(tmp_path / "00007.png")
    (problem,) = Keyed().problems(tmp_path, ITEM, 4)
    assert "9 x 6 px do not divide into a grid of four" in problem


def test_pictures_of_other_modes_become_rgb(tmp_path):
    Image.new("RGBA", (4, 4), (9, 8, 7, 255)).save(tmp_path / "00007.png")
    (found,) = Keyed().find(tmp_path, ITEM, 1)
    assert found.load().mode == "RGB"
    assert found.load().getpixel((0, 0)) == (9, 8, 7)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    Numbered().write(tmp_path, ITEM, pictures(3))
    assert Numbered().problems(tmp_path, ITEM, 2) == [
        f"{tmp_path}/00007/samples: holds 3 pictures; give --num-images-per-prompt 3, or take the surplus away"
    ]
    (tmp_path / "00007" / "metadata.jsonl").write_text('{"prompt": "a blue cup"}')
    (problem,) = Numbered().problems(tmp_path, ITEM, 3)
    assert "these pictures are of 'a blue cup', and the data has 'a red cup' here" in problem
    (tmp_path / "00007" / "metadata.jsonl").write_text("half a rec")
    (tmp_path / "00007" / "samples" / "00001.png").write_bytes(b"no picture")
    problems = Numbered().problems(tmp_path, ITEM, 3)
    assert len(problems) == 2
    assert (
        "00001.png: is not a readable picture" in problems[0]
        and "is not the record of a prompt" in problems[1]
    )


def test_benchmarks_say_what_they_need_and_what_they_do_not_use(tmp_path):
    with pytest.raises(DataError) as caught:
        BENCHMARKS["imgedit"].read(Request(task="edit", languages=("en",)))
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "--data is missing",
        "--references is missing",
        "--languages is not used by imgedit",
        "--task is not used by imgedit",
    ]
    with pytest.raises(DataError, match="--reward is missing"):
        BENCHMARKS["custom"].read(Request(data=tmp_path, task="t2i"))


@pytest.mark.parametrize(
    ("keys", "message"), [(("../x",), "cannot be a file name"), (("/x",), "cannot be a file name")]
)
def test_keys_that_leave_the_folder_are_refused(tmp_path, keys, message):
    header = "item_id,text,proposition_id,dependency,tuple,question_natural_language"
    path = tmp_path / "questions.csv"
    path.write_text("\n".join([header, *(f"{key},text,1,0,t,q?" for key in keys)]))
    with pytest.raises(DataError, match=message):
        BENCHMARKS["dpg"].read(Request(data=path))


def test_every_benchmark_has_a_scorer_that_can_be_named(tmp_path):
    parts = BENCHMARKS["shapes"].read(Request(num_prompts=6))
    assert [(part.task, part.reward.name, len(part.items)) for part in parts] == [
        ("t2i", "geneval_shapes", 6),
        ("edit", "edit_shapes", 6),
    ]
    assert {item.group for item in parts[0].items} == {
        "single_object", "two_object", "counting", "colors", "position", "color_attr",
    }  # fmt: skip
    assert len({item.group for item in parts[1].items}) == 6
