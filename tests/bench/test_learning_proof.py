"""The learning proof spread over machines: seeds that the committed evidence holds are not run again."""

import json

import pytest

from bench.accept import evidence, learning
from core.statistics import Difference

CHANGE = Difference(before=0.5, after=0.62, mean=0.12, low=0.1, high=0.14, n=3072, missing=0)


def result(seconds=3000.0, holds=True):
    return {
        "commit": "0123456789abcdef",
        "seconds": seconds,
        "holds": holds,
        "checks": [learning.Check("edit: gain", CHANGE, holds)],
    }


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    return tmp_path


def test_what_was_reported_is_read_back(folder):
    results = {2: result(holds=False), 1: result()}
    learning.report(results, "abc")
    assert learning.stored(folder / "learning.json", "abc") == results
    page = (folder / "learning.md").read_text()
    assert "| part | seed 1 | seed 2 |" in page and "**1 of 2**" in page and "| 0123456789ab |" in page


def test_evidence_of_another_setting_or_seed_does_not_count(folder):
    assert learning.stored(folder / "learning.json", "abc") == {}
    learning.report({1: result()}, "abc")
    assert learning.stored(folder / "learning.json", "other") == {}
    data = json.loads((folder / "learning.json").read_text())
    data["seeds"]["77"] = data["seeds"]["1"]
    (folder / "learning.json").write_text(json.dumps(data))
    assert list(learning.stored(folder / "learning.json", "abc")) == [1]


def test_the_setting_changes_with_the_prompts(tmp_path):
    paths = {task: tmp_path / f"{task}.jsonl" for task in learning.TASKS}
    for path in paths.values():
        path.write_text("{}\n")
    before = learning.setting(paths)
    paths["edit"].write_text("{}\n{}\n")
    assert learning.setting(paths) != before == learning.setting(paths | {"edit": paths["t2i"]})
