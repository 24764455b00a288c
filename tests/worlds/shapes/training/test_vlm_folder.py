"""The committed Qwen2.5-VL of the shapes world: whole, small, in the released layout, and able to answer."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from models.qwen25_vl import read_chat_template, read_token_pixels
from rewards.editreward.processing import EditProcessor
from rewards.editreward.settings import RUBRIC, EditRewardSettings
from worlds.shapes.scenes.render import render
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.training.evaluate_vlm import KINDS, Vlm, as_table, evaluate, main

FOLDER = Path(__file__).parents[4] / "recipes" / "shapes" / "vlm"
FLOOR = 0.8
"""What the project promises; the README's score lies well above it."""


@pytest.fixture(autouse=True)
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_folder_is_whole_and_small():
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
            "chat_template.jinja", "README.md"} <= set(files)  # fmt: skip
    assert sum(files.values()) <= 4_000_000
    vocabulary = json.loads((FOLDER / "tokenizer.json").read_text())
    assert len(vocabulary["model"]["vocab"]) + len(vocabulary["added_tokens"]) <= 1000


def test_stock_vllm_knows_its_weights_and_serves_its_heads():
    """Names as the hub's checkpoints have them, which vLLM's mapper reads; no head smaller than its kernels take."""
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert all(file.get_slice(name).get_dtype() == "BF16" for name in names)
    assert {
        "lm_head.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "visual.patch_embed.proj.weight",
    } <= names
    assert all(
        name.startswith(("model.layers.", "visual.", "model.embed", "model.norm", "lm_head"))
        for name in names
    )
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"]
    text = config["text_config"]
    assert text["hidden_size"] // text["num_attention_heads"] == 64
    assert sum(text["rope_parameters"]["mrope_section"]) == 32


def test_it_answers_held_out_questions():
    results = {item.kind: item for item in evaluate(FOLDER, 8 * len(KINDS), seed=1)}
    print(as_table(list(results.values())))
    assert results["all"].count == 8 * len(KINDS) and set(results) == {"all", *KINDS}
    assert results["all"].mean >= FLOOR > results["all"].guess


def test_the_answers_depend_on_the_pictures():
    from PIL import Image

    vlm, question = Vlm(FOLDER), "What colour is the circle?"
    scenes = [Scene("grey", (Shape("circle", color, 8.0, 8.0),)) for color in ("red", "blue", "green")]
    pictures = [[Image.fromarray(render(scene))] for scene in scenes]
    assert vlm.answer(pictures, [question] * 3) == ["red", "blue", "green"]
    assert vlm.answer(pictures[1:2], [question]) == ["blue"]  # alone as in a batch


def test_an_edit_reward_reads_it():
    """Its tokens see 7 x 7 pixels, not the released 28 x 28, and its template shows two pictures."""
    assert read_token_pixels(FOLDER) == 7
    settings = EditRewardSettings(
        dimensions=("overall",), means=(5.0,), stds=(2.0,), score_low=0.0, score_high=10.0, combine="mean",
        view="full", rubric=RUBRIC, chat_template=read_chat_template(FOLDER), add_generation_prompt=True,
        min_pixels=784, max_pixels=900, token_pixels=read_token_pixels(FOLDER),
    )  # fmt: skip
    from PIL import Image

    picture = Image.fromarray(render(Scene("grey", (Shape("circle", "red", 8.0, 8.0),))))
    encoded = EditProcessor(FOLDER, settings).encode(picture, picture, "make the red circle blue")
    assert encoded.grids.tolist() == [[1, 4, 4]] * 2 and int(encoded.token_types.sum()) == 32


def test_the_command_names_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "config.json does not exist" in capsys.readouterr().err
