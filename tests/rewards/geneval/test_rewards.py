"""The geneval rewards as a run uses them: built-in names, checks, shared models, components."""

import asyncio
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from rewards.base import FatalRewardError, RewardSet, RewardSpec
from rewards.calling import RewardBatch
from rewards.checks import check_rewards
from rewards.geneval import TAGS
from rewards.geneval.loading import load_colors, load_detector, torch_device
from rewards.geneval.rewards import GenEval, GenEvalOfficial, GenEvalStrict
from rewards.geneval.settings import DetectorSettings
from rewards.loading import load_reward
from rewards.scoring import score_group
from tests.fakes.tiny_detectors import noise
from worlds.shapes.scenes.captions import sample_t2i
from worlds.shapes.scenes.render import render
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.scoring.rewards import GenEvalShapes

SHAPES = {"detector": "shapes", "colors": "detector"}


@pytest.fixture(scope="module")
def hub(tiny_hub, tiny_clip) -> dict:
    return {
        "detector": "transformers",
        "checkpoint": str(tiny_hub),
        "clip": str(tiny_clip),
        "scale": [96, 64],
    }


def score(reward, images, metadata):
    return reward.score(
        images=images, prompts=[""] * len(images), references=[[]] * len(images), metadata=metadata
    )


def examples(count: int = 40):
    """Pictures of the shapes world and GenEval records, half of which belong to another picture."""
    rng = np.random.default_rng(0)
    records, scenes = zip(*[sample_t2i(rng, "heldout") for _ in range(count)], strict=True)
    images = [Image.fromarray(render(scenes[k - k % 2])) for k in range(count)]
    return images, list(records)


@pytest.mark.parametrize("credit", ["dense", "strict", "correct", "flow_grpo_compat"])
def test_the_shapes_backend_scores_as_the_shapes_reward(credit):
    images, records = examples()
    ours = score(GenEval(credit=credit, **SHAPES), images, records)
    theirs = score(GenEvalShapes(credit), images, records)
    assert ours.scores == theirs.scores and len(set(ours.scores)) > 1
    for part in ("dense", "strict", "correct"):
        assert ours.components[f"shapes.shapes.{part}"] == theirs.components[part]


def test_the_three_rewards_pay_their_verdicts():
    two = Scene("grey", (Shape("circle", "red", 8.0, 8.0), Shape("circle", "blue", 24.0, 16.0)))
    circle = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    rewards = [GenEval(**SHAPES), GenEvalStrict(**SHAPES), GenEvalOfficial(**SHAPES)]
    images = [Image.fromarray(render(two))]
    assert [score(reward, images, [circle]).scores for reward in rewards] == [[0.0], [0.0], [1.0]]


def test_one_component_for_each_tag_through_the_scoring_of_a_group():
    """A group has one tag, so five of the six columns are None throughout, which masks and fails nothing."""
    images, records = examples()
    for tag in TAGS:
        chosen = [k for k, record in enumerate(records) if record["tag"] == tag][:4]
        batch = RewardBatch(
            images=[images[k] for k in chosen],
            prompts=[""] * len(chosen),
            references=[[]] * len(chosen),
            metadata=[records[k] for k in chosen],
        )
        loaded = load_reward(RewardSpec("geneval", params=SHAPES))
        group = asyncio.run(score_group(0, [loaded], batch))
        assert group.mask == [True] * len(chosen) and not group.failures
        columns = {name: values for name, values in group.components.items() if name != "geneval"}
        assert set(columns) == {
            f"geneval/shapes.shapes.{part}" for part in ("dense", "strict", "correct", *TAGS)
        }
        for other in TAGS:
            column = columns[f"geneval/shapes.shapes.{other}"]
            assert column == (group.rewards if other == tag else [None] * len(chosen))


def test_backends_are_named_in_every_component(hub):
    reward = GenEval(**hub)
    assert reward.check() == [] and reward.readiness() == []
    records = [{"tag": "colors", "include": [{"class": "person", "count": 1, "color": "red"}]}] * 3
    images = [noise(64, 64, 1), noise(70, 50, 2), noise(64, 64, 3)]
    output = score(reward, images, records)
    assert all(0 <= value <= 1 for value in output.scores)
    assert {name.rpartition(".")[0] for name in output.components} == {"transformers-96x64.clip-64-8"}
    assert all("/" not in name for name in output.components)
    assert score(reward, images, records) == output


def test_equal_settings_share_one_model_even_when_asked_at_once(hub):
    settings = DetectorSettings("transformers", hub["checkpoint"], scale=(64, 64))
    found = []
    threads = [threading.Thread(target=lambda: found.append(load_detector(settings))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(item) for item in found}) == 1
    assert load_detector(DetectorSettings("transformers", hub["checkpoint"], scale=(64, 64))) is found[0]
    assert load_detector(DetectorSettings("transformers", hub["checkpoint"], scale=(80, 64))) is not found[0]
    first, second = GenEval(**hub)._load(), GenEvalStrict(**hub)._load()
    assert first[0] is second[0] and first[1] is second[1]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"detector": "yolo"}, "detector is 'yolo'; choose one of mask2former, transformers, shapes"),
        ({}, "checkpoint is missing; give the path of mmdet's mask2former_swin-s"),
        ({"checkpoint": "/none.pth"}, "checkpoint '/none.pth' is not a file here"),
        ({"config": "/none.py"}, "config '/none.py' is not a file here"),
        ({"clip": "/none"}, "clip '/none' is not a folder here"),
        ({}, "clip is missing"),
        ({"colors": "lab", "clip": "x"}, "clip is set, which colors 'lab' does not use"),
        ({"colors": "rgb"}, "colors is 'rgb'; choose one of clip, lab, detector"),
        ({"colors": "detector"}, "colors is 'detector', which only detector 'shapes' has"),
        ({"device": "tpu"}, "device is 'tpu'; choose one of auto, cpu, cuda"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"scale": [800, 1333]}, "scale is [800, 1333]; give the longest and the shortest edge"),
        ({"scale": [800]}, "scale is [800]"),
        ({"detector": "transformers"}, "checkpoint is missing; give the path of a folder"),
        (SHAPES | {"checkpoint": "x"}, "checkpoint is set, which detector 'shapes' does not use"),
    ],
)
def test_check_names_the_key_the_value_and_the_way_out(params, expected):
    problems = GenEval(**params).check()
    assert any(problem.startswith(expected) for problem in problems), problems


def test_a_dry_run_asks_for_the_check_and_loads_nothing():
    rewards = RewardSet("t2i", "t2i", [RewardSpec("geneval_strict", params={"checkpoint": "/none.pth"})])
    problems = check_rewards(rewards)
    assert "reward 'geneval_strict': checkpoint '/none.pth' is not a file here" in problems[0]
    wrong = RewardSet("t2i", "t2i", [RewardSpec("geneval", params={"credit": "half"})])
    assert "credit: 'half' is not one of dense, strict" in check_rewards(wrong)[0]
    assert check_rewards(RewardSet("t2i", "t2i", [RewardSpec("geneval_official", params=SHAPES)])) == []


def test_without_mmdet_the_check_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mmdet", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    (tmp_path / "weights.pth").write_bytes(b"")
    reward = GenEval(checkpoint=str(tmp_path / "weights.pth"), colors="lab")
    (problem,) = reward.check()
    assert problem.startswith("detector 'mask2former' needs mmdet, cv2, which is not installed: ")
    assert "pip install 'unipic-rl[geneval]'" in problem and "detector: transformers" in problem
    assert "mmdet cannot be imported" in reward.readiness()[0]


def test_another_mmdet_is_named(monkeypatch):
    monkeypatch.setattr("rewards.geneval.settings.metadata.version", lambda name: "2.28.2")
    assert "mmdet is 2.28.2; this backend is written for 3.3" in GenEval().check()[0]


def test_what_cannot_load_is_fatal_and_never_a_number(tmp_path, hub):
    broken = tmp_path / "weights.safetensors"
    broken.write_bytes(b"nothing")
    reward = GenEval(detector="mask2former", checkpoint=str(broken), colors="lab")
    assert "weights.safetensors" in reward.readiness()[0]
    with pytest.raises(FatalRewardError, match="weights.safetensors"):
        score(reward, [noise(64, 64)], [{"tag": "colors", "include": [{"class": "cat", "count": 1}]}])
    with pytest.raises(FatalRewardError, match="clip is missing"):
        load_colors("clip", None, "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FatalRewardError, match="not a CLIPModel"):
        load_colors("clip", str(tmp_path), "cpu")
    with pytest.raises(FatalRewardError, match="torch sees no GPU"):
        torch_device("cuda")
    with pytest.raises(ValueError, match="metadata.tag"):
        score(GenEval(**hub), [noise(64, 64)], [{}])
