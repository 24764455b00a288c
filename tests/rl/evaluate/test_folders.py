"""Folders in the official layouts that somebody else generated, scored without a model that generates."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards.benchmarks import gedit
from rl.evaluate.__main__ import main
from tests.fakes.judge_plays import SNAPSHOT
from tests.fakes.judge_server import JudgeServer
from worlds.shapes.scenes.captions import TAGS, sample_caption, scene_of
from worlds.shapes.scenes.render import render

DATA = Path(__file__).resolve().parents[2] / "data"
CPU = ["--resources", "device=cpu", "reward_cpus=0.25", "reward_workers=1", "threads=1"]


def run(*words):
    return main([*map(str, words), *CPU])


def results(output):
    return json.loads((output / "results.json").read_text())


def table(output):
    return {row["name"]: row for row in results(output)["table"]}


def by_judge(server):
    return ["--reward-params", "model=m", f"base_url={server.base_url}", "api_key_env=null"]


def grey(level, size=(8, 8)):
    return Image.new("RGB", size, (level, level, level))


def test_geneval_with_the_detector_of_the_shapes_world(tmp_path, ray_session):
    """Exact renderings, four of each prompt but the first one's last and all of the last one's; the first of each
    is plain grey."""
    captions = [sample_caption(np.random.default_rng(k), "heldout", TAGS[k % 6]) for k in range(12)]
    data, images, output = tmp_path / "evaluation_metadata.jsonl", tmp_path / "made", tmp_path / "out"
    data.write_text("".join(json.dumps(caption.metadata()) + "\n" for caption in captions))
    for k, caption in enumerate(captions[:-1]):
        samples = images / f"{k:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(caption.metadata()))
        for n in range(4 if k else 3):
            picture = render(scene_of(caption, n)) if n else np.full((32, 32, 3), 128, np.uint8)
            Image.fromarray(picture).save(samples / f"{n:05d}.png")
    shapes = ["--reward-params", "detector=shapes", "colors=detector"]
    assert run("geneval", "--data", data, "--images", images, "--output", output, *shapes) == 1, (
        "some are missing"
    )
    found = table(output)
    assert results(output)["images"] == {"expected": 48, "present": 43, "scored": 43}
    assert results(output)["detectors"] == ["shapes.shapes"]
    assert [prompt["scores"] for prompt in results(output)["prompts"]] == [
        [0.0, 1.0, 1.0, None], *[[0.0, 1.0, 1.0, 1.0]] * 10, [None] * 4,
    ]  # fmt: skip
    by_tag = {TAGS[0]: (2 + 3) / (3 + 4), TAGS[5]: 3 / 4} | dict.fromkeys(TAGS[1:5], 6 / 8)
    assert {tag: found[tag]["value"] for tag in TAGS} == pytest.approx(by_tag)
    assert found["overall"]["value"] == pytest.approx(np.mean(list(by_tag.values())))
    assert (found["overall"]["missing"], found["correct prompts"]["value"]) == (5, 1.0)
    assert "**Incomplete: of 48 pictures 43 are there" in (output / "results.md").read_text()


def test_dpg_with_any_vlm_in_both_modes(tmp_path, ray_session):
    """Each quarter of a grid has its own grey; the judge says yes to a question while its id is below grey / 50."""
    with (DATA / "dpg" / "questions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    ids = {row["question_natural_language"]: int(row["proposition_id"]) for row in rows}
    levels = (10, 60, 110, 210)
    images = tmp_path / "grids"
    images.mkdir()
    for name in ("first", "sorted", "unsorted", "apart"):
        grid = Image.new("RGB", (16, 16))
        for cell, level in enumerate(levels):
            grid.paste(grey(level), (cell % 2 * 8, cell // 2 * 8))
        grid.save(images / f"{name}.png")

    def answer(pictures, text):
        id = next((id for question, id in ids.items() if question in text), 0)  # 0: the trial question
        return "yes" if id < pictures[-1].getpixel((0, 0))[0] / 50 else "no"

    data = DATA / "dpg" / "questions.csv"
    with JudgeServer(score=answer) as server:
        words = ["dpg", "--data", data, "--images", images, *by_judge(server)]
        assert run(*words, "--output", tmp_path / "right") == 1
        asked = len(server.records)
        assert run(*words, "--output", tmp_path / "right") == 1
        assert len(server.records) == asked == 1 + 4 * (4 + 3 + 3 + 2), "a trial, and nothing is asked twice"
        assert run(*words, "--output", tmp_path / "compat", "--compat") == 1
    # Pictures 1 to 4 have yes for 0, 1, 2 and 4 questions; parents come before children in ids, so nothing is zeroed
    # but question 4 of `first` where 3 is a no.
    expected = [
        (0 + 1 / 4 + 2 / 4 + 1) / 4,
        (0 + 1 / 3 + 2 / 3 + 1) / 4,
        (0 + 1 / 3 + 2 / 3 + 1) / 4,
        (0 + 0.5 + 1 + 1) / 4,
    ]
    right, theirs = table(tmp_path / "right"), table(tmp_path / "compat")
    assert right["overall"]["value"] == pytest.approx(100 * np.mean(expected))
    assert (right["overall"]["expected"], right["overall"]["missing"]) == (20, 4)
    assert right["global"]["value"] is None
    # The public script loses `first` (row 0 skipped) and `apart` (rows apart); its categories see picture 4 alone.
    assert theirs["overall"]["value"] == pytest.approx(100 * np.mean(expected[1:3]))
    assert (theirs["overall"]["missing"], theirs["entity"]["value"]) == (0, 100.0)
    assert results(tmp_path / "right")["judge_snapshots"] == [SNAPSHOT]
    assert (
        (tmp_path / "compat" / "results.md").read_text().startswith("# dpg, scored as the public scripts do")
    )


def test_gedit_by_two_languages(tmp_path, ray_session):
    """The judge's grades follow from the grey of the edit: SC = grey / 10, PQ = 10 - SC."""
    sources, images, output = tmp_path / "data", tmp_path / "made", tmp_path / "out"
    rows, k = [], 0
    for group in gedit.GROUPS:
        for language in ("en", "cn"):
            named = {"key": f"k{k}", "task_type": group, "instruction_language": language}
            rows.append(named | {"instruction": f"change {k}", "Intersection_exist": k % 4 < 2})
            for path, picture in (
                (gedit.source_path(sources, group, language, f"k{k}"), grey(255, (12, 8))),
                (images / "fullset" / group / language / f"k{k}.png", grey(10 * (k % 8 + 1))),
            ):
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
            k += 1
    (images / "fullset" / "ps_human" / "en" / "k8.png").unlink()
    (sources / gedit.METADATA).write_text("".join(json.dumps(row) + "\n" for row in rows))

    sizes = set()

    def answer(pictures, text):
        sc = min(10, pictures[-1].getpixel((0, 0))[0] // 10)
        grades = {"success": sc, "preservation": 10, "naturalness": 10 - sc, "cleanness": 10}
        sizes.add(pictures[-1].size)
        return json.dumps({"reasoning": "seen", **grades})

    with JudgeServer(score=answer) as server:
        words = [
            "gedit",
            "--data",
            sources,
            "--languages",
            "en",
            "cn",
            "--images",
            images,
            "--output",
            output,
        ]
        assert run(*words, *by_judge(server)) == 1
    assert sizes - {(64, 64)} == {(12, 8)}, "shown at the size of the source, but for the trial"
    found = table(output)
    sc = {(row["task_type"], row["instruction_language"]): k % 8 + 1 for k, row in enumerate(rows)}
    chinese = [math.sqrt(value * (10 - value)) for (_, language), value in sc.items() if language == "cn"]
    assert found["cn full overall"]["value"] == pytest.approx(np.mean(chinese))
    assert found["cn full SC"]["value"] == pytest.approx(
        np.mean([v for (_, lang), v in sc.items() if lang == "cn"])
    )
    assert found["en full overall"]["value"] is None and found["en full overall"]["missing"] == 1
    assert found["en full overall, text_change"]["value"] == pytest.approx(math.sqrt(3 * 7))
    assert found["cn intersection overall"]["expected"] == 6


def test_imgedit_by_type_in_both_modes(tmp_path, ray_session):
    (tmp_path / "scenes").mkdir()
    for k in range(3):
        grey(255).save(tmp_path / "scenes" / f"{k}.png")
    images = tmp_path / "made"
    images.mkdir()
    edits = json.loads((DATA / "imgedit" / "basic_edit.json").read_text())
    for place, key in enumerate(edits):
        grey(place).save(images / f"{key}.png")

    def answer(pictures, text):
        place = pictures[-1].getpixel((0, 0))[0]
        return json.dumps({"reasoning": "seen", "adherence": 5, "quality": 5 - place % 3, "preservation": 4})

    data = ["--data", DATA / "imgedit" / "basic_edit.json", "--references", tmp_path]
    with JudgeServer(score=answer) as server:
        words = ["imgedit", *data, "--images", images, *by_judge(server)]
        assert run(*words, "--output", tmp_path / "out") == 0
        assert len(server.records) == 1 + 10, "a trial, and one question for each"
        assert run(*words, "--output", tmp_path / "out", "--compat") == 0
        assert len(server.records) == 11, "the table alone is made anew"
        theirs = table(tmp_path / "out")
        assert run(*words, "--output", tmp_path / "out") == 0
    right = table(tmp_path / "out")
    items = [(5 + 5 - place % 3 + 4) / 3 for place in range(10)]
    types = [(items[0] + items[1]) / 2, *items[2:]]
    assert right["overall"]["value"] == pytest.approx(np.mean(types))
    assert right["mean over items"]["value"] == pytest.approx(np.mean(items))
    rounded = [
        round((round(items[0], 2) + round(items[1], 2)) / 2, 2),
        *(round(item, 2) for item in items[2:]),
    ]
    assert theirs["overall"]["value"] == round(np.mean(rounded), 2)
    assert theirs["extract"]["value"] == 4.67 != right["extract"]["value"]
    assert len((tmp_path / "out" / "results.md").read_text().splitlines()) > 20
