"""Pictures of many shapes in one run, through every place that has to keep them apart, compared bit for bit."""

import json

import numpy as np
import pytest
from PIL import Image

from core.prompts import load_prompts
from rl.recipe.schema import load_config
from rl.recipe.shapes import count_shapes, shape_rule
from tests.cases.conftest import CASES
from tests.fakes.tiny_run import tiny_recipe
from tests.rl.loop.test_run import copy_run, final_hash, groups, learned, records, run

SIZES = [
    (8, 64),
    (16, 24),
    (24, 16),
    (40, 24),
    (24, 40),
    (32, 24),
    (48, 40),
    (40, 48),
    (56, 32),
    (16, 16),
    (24, 24),
]
"""[height, width] of the first on, the case of 100:1, are their lines' own."""


def write_edits(folder):
    """The references of the cases, then pictures at ten further sizes, then two references in one line; line 6 asks to
    be squashed."""
    lines = [json.loads(line) for line in (CASES / "references" / "edit.jsonl").read_text().splitlines()]
    for line in lines:
        line["image"] = str(CASES / "references" / line["image"])
    lines[5]["size"] = SIZES[0]
    for number, (height, width) in enumerate(SIZES[1:]):
        pixels = np.random.default_rng(number).integers(0, 255, (2 * height, 2 * width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{height}x{width}.png")
        lines.append({"prompt": "make it red", "image": f"{height}x{width}.png", "size": (height, width)})
    lines.append({"prompt": "add a star", "references": [lines[0]["image"], lines[1]["image"]]})
    (folder / "edit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, ray_session):
    """Two steps of editing with all shapes, one of text-to-image at sizes that are drawn; one rollout worker."""
    folder = tmp_path_factory.mktemp("shapes")
    recipe = tiny_recipe(
        folder,
        model__longer_edge=64,
        model__sizes=[{"height": 32, "width": 48}, {"height": 48, "width": 32}],
        rollout__group_size=2,
        model__reference_pixels=64 * 32 + 1024,
        rollout__prompts_per_rollout=10,
        learner__micro_batch_size=2,
    )
    write_edits(folder)
    changes = "stages[1].steps=1", "evaluation.tasks[0].num_prompts=5", "gallery.prompts=5"
    run(recipe, *changes)
    return folder, recipe, changes


def test_all_shapes_are_trained_on_and_the_gate_is_0(straight):
    folder, recipe, _ = straight
    rule = shape_rule(load_config(recipe).model)
    prompts = load_prompts(folder / "edit.jsonl", "edit")
    assert len({rule.of(prompt).size for prompt in prompts}) == 15  # two of the cases have the same
    assert rule.of(prompts[-1]).references == ((64, 32), (16, 56))
    assert count_shapes(load_config(recipe)) == 18
    seen = {json.loads(line)["prompt"] for line in groups(folder).splitlines() if '"stage": "edit"' in line}
    assert "add a star" in seen
    steps = [r for r in records(folder) if "loss/total" in r]
    assert len(steps) == 3 and all(r["gate/log_prob_gap_max"] <= 1e-6 for r in steps)
    assert all(r["reward/missing_share"] == 0 and r["optimizer/samples"] >= 18 for r in steps)


def test_pictures_are_kept_in_their_proportions(straight):
    out = straight[0] / "runs" / "tiny"
    index = json.loads((out / "samples" / "edit" / "step_000001.json").read_text())
    expected = [
        (1, 2),
        (4, 1),
        (1, 1),
        (1, 2),
        (2, 1),
    ]  # width to height of the first five cases, turned upright
    for sample, (width, height) in zip(index["samples"], expected, strict=True):
        for x0, y0, x1, y1 in (sample["box"], sample["reference_box"]):
            assert (x1 - x0) * height == (y1 - y0) * width
    with np.load(out / "evaluations" / "before" / "edit.npz") as stored:
        assert [stored[name].shape for name in stored.files] == [
            (1, 64, 32, 3), (1, 16, 64, 3), (1, 64, 64, 3), (1, 64, 32, 3), (1, 32, 64, 3)
        ]  # fmt: skip
    scores = json.loads((out / "evaluations" / "after_edit" / "edit.json").read_text())
    assert None not in scores["rewards"] and len(scores["rewards"]) == 5
    assert (out / "samples" / "before_after_edit.png").is_file()


def test_three_workers_equal_one_and_a_resumed_run_the_straight_one(straight, tmp_path):
    folder, recipe, changes = straight
    run(recipe, *changes, f"output_dir={tmp_path / 'three' / 'runs'}", "rollout.workers=3",
        "resources.placement=separate")  # fmt: skip
    copy_run(folder, tmp_path / "resumed", ("step_000001",))
    run(recipe, *changes, f"output_dir={tmp_path / 'resumed' / 'runs'}", resume="auto")
    for other in ("three", "resumed"):
        assert final_hash(tmp_path / other) == final_hash(folder)
        assert learned(tmp_path / other) == learned(folder)
        assert groups(tmp_path / other) == groups(folder)
