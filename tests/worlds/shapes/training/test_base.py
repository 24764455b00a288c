"""The committed base: whole, small, and able to draw and edit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from models.folders import check_model_folder
from worlds.shapes.training.evaluate import Base, evaluate, heldout_questions

BASE = Path(__file__).parents[4] / "recipes" / "shapes" / "base"
MEGABYTE = 1_000_000
# Well below the scores in the base's README: 32 prompts have a half-width of about .15.
FLOOR = 0.25


@pytest.fixture(autouse=True)
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_folder_is_whole_and_small():
    assert check_model_folder(BASE) == []
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE
    parameters = 0
    for path in BASE.rglob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_slice(name)
                assert tensor.get_dtype() in ("BF16", "F32"), (path, name)
                parameters += torch.Size(tensor.get_shape()).numel()
    assert parameters <= 6_000_000
    for index in ("", "_2", "_3"):
        vocabulary = json.loads((BASE / f"tokenizer{index}" / "tokenizer.json").read_text())["model"]["vocab"]
        assert len(vocabulary) <= 1000


def test_it_scores_above_a_floor_without_guidance():
    results = evaluate(BASE, [1.0], 32, ceilings=False)
    assert [result.task for result in results] == ["t2i", "edit"]
    for result in results:
        assert result.mean > FLOOR, result


def test_a_picture_depends_on_its_prompt_and_noise_alone():
    base = Base.load(BASE)
    for task in ("t2i", "edit"):
        questions = heldout_questions(task, 3)
        together = base.draw(questions, 1.0, 4).astype(int)
        alone = base.draw(questions[:1], 1.0, 4).astype(int)
        assert abs(together[0] - alone[0]).max() <= 1
        assert (base.draw(questions[:1], 1.0, 4, seed=1).astype(int) != alone).any()
