"""The record of every group, and which two of a step are worth looking at."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from core.prompts import Prompt
from core.spans import Span, read_spans
from rewards.scoring import GroupScore
from rl.record.groups import GroupRecord, best_and_worst, group_record, group_samples
from rl.record.journal import Journal
from rl.workers.requests import RolloutRequest, RolloutResult
from rollout.shapes import Shape
from tests.rl.report.report_runs import config


def record(group, rewards, step=1):
    return GroupRecord(step, "edit", group, "a circle", rewards, {"red": rewards})


def test_a_record_holds_what_each_sample_earned_and_why_a_group_was_dropped():
    group = RolloutRequest(7, (Prompt(0, "t2i", "a circle"),), (1, 2))
    score = GroupScore(7, [0.5, None], [True, False], {"red": [0.5, None]}, {}, {}, {}, True, "too few")
    found = group_record(RolloutResult(group, (), (), score), 3, "edit")
    assert found == GroupRecord(3, "edit", 7, "a circle", [0.5, None], {"red": [0.5, None]}, True, "too few")
    failed = group_record(RolloutResult(group, (), failure="no such image"), 3, "edit")
    assert (failed.rewards, failed.components, failed.reason) == ([None, None], {}, "no such image")
    assert failed.mean is None and found.mean == 0.5


def test_best_and_worst_by_mean_over_what_was_scored():
    records = [record(1, [0.2, None]), record(2, [0.9, 0.1]), record(3, [None, None]), record(4, [0.5, 0.5])]
    assert [r.group for r in best_and_worst(records)] == [2, 1]
    assert [r.group for r in best_and_worst(records[:1])] == [1]
    assert best_and_worst(records[2:3]) == []


def test_a_resumed_run_drops_the_groups_and_spans_of_steps_it_does_again(tmp_path):
    def spans(step):
        return [Span("rollout", "rollout-0", 10.0 * step, 10.0 * step + 2.5, step)]

    journal = Journal(tmp_path, config("made"), resume_step=None)
    for step, rewards in ((1, [0.1, None]), (2, [0.2, 0.3])):
        journal.groups([record(step, rewards, step=step)])
        journal.spans(spans(step))
    Journal(tmp_path, config("made"), resume_step=1).groups([record(3, [0.4, 0.5], step=2)])
    lines = [json.loads(line) for line in (tmp_path / "groups.jsonl").read_text().splitlines()]
    assert [(line["step"], line["group"], line["rewards"]) for line in lines] == [
        (1, 1, [0.1, None]),
        (2, 3, [0.4, 0.5]),
    ]
    assert read_spans(tmp_path / "spans.jsonl") == spans(1)
    with pytest.raises(FileExistsError):
        Journal(tmp_path, config("made"), resume_step=None)


def test_the_first_sample_carries_the_reference_of_all():
    pixels = np.arange(3 * 4 * 3, dtype=np.uint8).reshape(3, 4, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    group = RolloutRequest(1, (Prompt(0, "edit", "make it red", (uri,)),), (11, 12))
    first, second = group_samples(group, np.stack([pixels, 255 - pixels]), [0.5, None])
    assert first.reference is not None and (first.reference == pixels).all() and second.reference is None
    assert (first.seed, second.seed, second.reward) == (11, 12, None)
    assert (second.image == 255 - pixels).all()


def test_references_are_shown_as_the_policy_saw_them(tmp_path):
    """At their shape's sizes, in their order."""
    for name, colour, size in (("a", "red", (40, 20)), ("b", "blue", (10, 10))):
        Image.new("RGB", size, colour).save(tmp_path / f"{name}.png")
    prompt = Prompt(0, "edit", "put it in", tuple(str(tmp_path / f"{name}.png") for name in "ab"))
    shape = Shape((16, 32), ((16, 32), (24, 24)))
    group = RolloutRequest(1, (prompt,), (11,), shape=shape)
    (sample,) = group_samples(group, np.zeros((1, 16, 32, 3), np.uint8), [0.5])
    assert sample.reference is not None and sample.reference.shape == (24, 56, 3)
    assert (sample.reference[:16, :32] == [255, 0, 0]).all() and (sample.reference[16:, :32] == 255).all()
    assert (sample.reference[:, 32:] == [0, 0, 255]).all()
