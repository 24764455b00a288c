"""`label` against a judge on a real port: labels, failures that stay failures, agreement, budget, and being killed."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.stats import spearmanr

from rewards.editreward.__main__ import main
from rewards.editreward.data.generate_config import load_section
from rewards.editreward.data.label_config import LabelSection, label_problems
from rewards.editreward.data.label_questions import read_template
from rewards.editreward.data.shards import EditSample, read_shard, write_shard
from tests.fakes.judge_plays import Play
from tests.fakes.judge_server import JudgeServer

ROOT = Path(__file__).resolve().parents[3]
EDITS, SHARDS = 24, 6
KEY = "sk-not-to-be-seen"


def grades_of(pictures: list[Image.Image]) -> dict[str, int]:
    """Instruction by the result's red, preservation by the source's green, quality by the result's blue."""
    source, result = (np.asarray(picture, dtype=float).mean((0, 1)) / 25.5 for picture in pictures)
    return {"instruction": round(result[0]), "preservation": round(source[1]), "quality": round(result[2])}


class Grader:
    """Grades by `grades_of`; the second time it sees a pair of pictures, quality is one lower."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()

    def __call__(self, pictures: list[Image.Image], text: str) -> str:
        grades, name = grades_of(pictures), b"".join(picture.tobytes() for picture in pictures)
        if name in self.seen:
            grades["quality"] = max(grades["quality"] - 1, 0)
        self.seen.add(name)
        return json.dumps({"reasoning": "seen", **grades})


def edit(i: int) -> EditSample:
    rng = np.random.default_rng(i)
    source, result = (Image.new("RGB", (24, 16), tuple(map(int, rng.integers(0, 255, 3)))) for _ in range(2))
    colour = ("red", "green", "blue", "grey")[i % 4]
    return EditSample(
        f"{i:07d}-000", source, result, f"make it {colour}, edit {i};", "paint", {}, {"seed": i}
    )


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    size = EDITS // SHARDS
    for k in range(SHARDS):
        write_shard(
            tmp_path / "edits" / f"edits-{k:05d}.tar", [edit(i) for i in range(k * size, (k + 1) * size)]
        )
    return tmp_path / "edits"


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(score=Grader(), token=KEY) as server:
        yield server


@pytest.fixture
def recipe(tmp_path: Path, shards: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDIT_JUDGE_KEY", KEY)
    judge = {
        "model": "judge", "base_url": server.base_url, "api_key_env": "EDIT_JUDGE_KEY", "concurrency": 2, "attempts": 2,
        "longest_wait_s": 0.05, "timeout_s": 20,
    }  # fmt: skip
    section = {"shards": [str(shards / "*.tar")], "judge": judge, "second_opinions": 0.5}
    content = {
        "name": "run",
        "output_dir": str(tmp_path),
        "seed": 1,
        "label": section,
        "generate": {"model": "x"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def label(recipe: Path, *words: str) -> int:
    return main(["label", str(recipe), *words])


def labelled(recipe: Path) -> dict[str, EditSample]:
    return {
        s.key: s
        for path in sorted((recipe.parent / "run" / "labelled").glob("*.tar"))
        for s in read_shard(path)
    }


def opinions(server: JudgeServer) -> list[int]:
    """The seeds of the requests that arrived."""
    return [record.arguments["seed"] for record in server.records]


def test_every_edit_gets_the_judges_grades_and_the_same_pictures(recipe: Path, server: JudgeServer) -> None:
    assert label(recipe) == 0
    found = labelled(recipe)
    assert list(found) == [edit(i).key for i in range(EDITS)]
    for i in range(EDITS):
        given, sample = edit(i), found[edit(i).key]
        grades = grades_of([given.source, given.result])
        overall = math.sqrt(min(grades["instruction"], grades["preservation"]) * grades["quality"])
        assert sample.scores == {**grades, "overall": pytest.approx(overall)}
        assert sample.source.tobytes() == given.source.tobytes()
        assert sample.result.tobytes() == given.result.tobytes()
        assert sample.instruction == given.instruction and sample.provenance["seed"] == i
        judge = sample.provenance["judge"]
        assert (judge["outcome"], judge["model"], judge["template"]) == ("ok", "judge", "label_edit.v1")
        assert judge["template_sha256"] == read_template(None).sha256 and judge["snapshots"]
    record = server.records[0]
    assert record.parts == ("text", "image", "text", "image", "text")
    assert "make it" in record.text and record.arguments["response_format"]["type"] == "json_schema"
    assert not any(KEY.encode() in path.read_bytes() for path in recipe.parent.rglob("*") if path.is_file())


def test_agreement_is_of_edits_asked_twice_with_another_seed(recipe: Path, server: JudgeServer) -> None:
    assert label(recipe) == 0
    twice = [sample for sample in labelled(recipe).values() if "second_opinion" in sample.provenance]
    assert 3 <= len(twice) < EDITS, "the subset depends on seed and key alone; change the recipe's seed"
    assert sorted(opinions(server)) == [0] * EDITS + [1000] * len(twice)
    first = [sample.provenance["judge"]["scores"]["quality"] for sample in twice]
    second = [sample.provenance["second_opinion"]["scores"]["quality"] for sample in twice]
    assert second == [max(value - 1, 0) for value in first]
    report = json.loads((recipe.parent / "run" / "labelled" / "labels.json").read_text())
    assert report["agreement"]["pairs"] == len(twice)
    assert report["agreement"]["quality"] == {
        "spearman": pytest.approx(spearmanr(first, second).statistic),
        "mean_absolute_difference": pytest.approx(np.mean(np.abs(np.subtract(first, second)))),
    }
    assert report["agreement"]["instruction"]["mean_absolute_difference"] == 0.0
    assert report["outcomes"]["judge"] == {"ok": EDITS}
    values = [sample.scores["quality"] for sample in labelled(recipe).values()]
    assert report["labels"]["quality"]["mean"] == pytest.approx(np.mean(values))
    assert report["labels"]["quality"]["deviation"] == pytest.approx(np.std(values))


def test_a_failure_is_recorded_with_its_outcome_and_never_filled_in(
    recipe: Path, server: JudgeServer
) -> None:
    faults = {
        1: ("refusal", "refused"), 4: ("filtered", "filtered"), 5: ("nonsense", "malformed"),
        6: ("truncated", "truncated"), 9: ("error_500", "unavailable"),
    }  # fmt: skip
    server.plays = [[Play(kind, when=f"edit {i};", times=0), 0] for i, (kind, _) in faults.items()]
    assert label(recipe, "label.second_opinions=0") == 0
    found = labelled(recipe)
    for i in range(EDITS):
        sample = found[edit(i).key]
        outcome = faults[i][1] if i in faults else "ok"
        assert sample.provenance["judge"]["outcome"] == outcome
        assert bool(sample.provenance["judge"]["detail"]) == (outcome != "ok")
        assert all((value is None) == (outcome != "ok") for value in sample.scores.values())
        assert set(sample.scores) == {"instruction", "preservation", "quality", "overall"}
    # Later the endpoint is well: only the edit that it was away for is asked about again.
    server.plays, asked = [], len(server.records)
    before = {key: sample.provenance for key, sample in found.items()}
    assert label(recipe, "label.second_opinions=0") == 0
    assert len(server.records) == asked + 1 and "edit 9;" in server.records[-1].text
    found = labelled(recipe)
    assert found[edit(9).key].scores["quality"] == grades_of([edit(9).source, edit(9).result])["quality"]
    assert all(found[key].provenance == before[key] for key in found if key != edit(9).key)
    assert label(recipe, "label.second_opinions=0") == 0
    assert len(server.records) == asked + 1


def test_a_spent_budget_stops_the_run_and_a_larger_one_goes_on_without_asking_again(
    recipe: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    budget = "label.judge.max_total_tokens"
    assert label(recipe, f"{budget}=6000") == 2
    said = capsys.readouterr().err
    assert "max_total_tokens" in said and "Traceback" not in said
    paid = len(server.records)
    assert 0 < paid < EDITS
    assert label(recipe, f"{budget}=1000000") == 0
    twice = sum("second_opinion" in sample.provenance for sample in labelled(recipe).values())
    assert len(server.records) == EDITS + twice, "what was paid for is in the cache"
    assert len(labelled(recipe)) == EDITS


def test_a_key_that_is_refused_stops_the_run_at_once(
    recipe: Path, server: JudgeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDIT_JUDGE_KEY", "sk-wrong")
    assert label(recipe) == 2
    said = capsys.readouterr().err
    assert "401" in said or "Incorrect API key" in said
    assert "sk-wrong" not in said and len(server.records) <= 4
    assert not labelled(recipe)


def test_an_endpoint_that_says_nothing_stops_the_run(
    recipe: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.stop()
    assert label(recipe, "label.give_up_after_s=0.01") == 2
    assert "label.give_up_after_s 0.01 or more" in capsys.readouterr().err


def test_killed_with_sigkill_it_goes_on_where_it_was(recipe: Path, server: JudgeServer) -> None:
    straight = recipe.parent / "straight"
    assert (
        label(recipe, f"label.output={straight}", f"label.judge.cache={recipe.parent / 'other.sqlite'}") == 0
    )
    asked = len(server.records)
    server.score = Grader()
    server.plays = [[Play("slow", seconds=0.1, times=0), 0]]
    process = subprocess.Popen([sys.executable, "-m", "rewards.editreward", "label", str(recipe)], cwd=ROOT)
    output, deadline = recipe.parent / "run" / "labelled", time.monotonic() + 120
    while not list(output.glob("*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(120)
    assert len(list(output.glob("*.tar"))) < SHARDS, "it was killed too late to prove anything"
    server.plays = []
    done = {path: path.stat().st_mtime_ns for path in output.glob("*.tar")}
    assert label(recipe) == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    names = [path.name for path in sorted(output.glob("*.tar"))]
    assert names == [path.name for path in sorted(straight.glob("*.tar"))]
    again = len(server.records) - asked
    assert asked <= again <= asked + 4, "asked twice is what was in flight, or answered and not yet kept"
    if again == asked:  # else one answer was lost, and this judge gives a pair another grade the second time
        assert all((output / name).read_bytes() == (straight / name).read_bytes() for name in names)


def test_labels_of_edits_that_were_replaced_are_made_anew(
    recipe: Path, shards: Path, server: JudgeServer
) -> None:
    assert label(recipe, "label.second_opinions=0") == 0
    import dataclasses

    path = shards / "edits-00001.tar"
    others = [dataclasses.replace(edit(i + 50), key=edit(i).key) for i in range(4, 8)]
    write_shard(path, others)
    assert label(recipe, "label.second_opinions=0") == 0
    assert len(server.records) == EDITS + 4
    assert labelled(recipe)[edit(5).key].instruction == edit(55).instruction


def test_other_questions_for_the_same_output_are_refused(
    recipe: Path, tmp_path: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert label(recipe) == 0
    asked = len(server.records)
    own = tmp_path / "own.txt"
    text = (ROOT / "rewards" / "editreward" / "data" / "label_edit.v1.txt").read_text()
    own.write_text(text.replace("10 all of it", "10 the whole of it"))
    # With everything labelled there is nothing to ask, so a shard is taken away first.
    (tmp_path / "run" / "labelled" / "edits-00000.tar").unlink()
    assert label(recipe, f"label.template={own}", "label.judge.model=other") == 2
    said = capsys.readouterr().err
    assert "template was label_edit.v1, is now own" in said and "model was judge, is now other" in said
    assert len(server.records) == asked


def test_what_is_wrong_is_said_before_anything_is_asked(
    recipe: Path, shards: Path, tmp_path: Path, server: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(shards, tmp_path / "more")
    words = [
        "label.judge.base_urll=x", "label.max_asks=9", "label.second_opinions=2",
        f"label.shards=[{shards}/*.tar,{tmp_path}/more/*.tar]", f"label.output={shards}",
    ]  # fmt: skip
    assert label(recipe, *words) == 2
    said = capsys.readouterr().err
    for part in (
        "did you mean 'base_url'", "label.max_asks=9 must be in [1, 5]", "label.second_opinions=2",
        "several shards are called edits-00000.tar", "holds the shards to label",
    ):  # fmt: skip
        assert part in said
    assert label(recipe, "label.shards=[/none/*.tar]", "label.template=/none.txt") == 2
    said = capsys.readouterr().err
    assert "label.shards: no file matches" in said and "/none.txt" in said
    assert not server.records


def test_the_dry_run_says_what_it_would_cost_and_asks_nobody(
    recipe: Path, server: JudgeServer, caplog: Any
) -> None:
    caplog.set_level("INFO")
    assert label(recipe, "--dry-run", "label.judge.model=gpt-4.1-2025-04-14") == 0
    assert "24 edits to go" in caplog.text and "36 calls (1 per image)" in caplog.text and "$" in caplog.text
    assert not server.records


def test_the_packaged_recipe_is_sound() -> None:
    header, section = load_section("recipes/editreward_label.yaml", [], "label", LabelSection)
    assert label_problems(header, section) == []
