"""The packed forward pass is the model's own, the tokenizer is Qwen2's, and a resumed run is the straight one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rewards.editreward.settings import RUBRIC
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.training.checkpoint import load_checkpoint
from worlds.shapes.training.config import load_recipe
from worlds.shapes.training.loop import TrainingLoop
from worlds.shapes.training.tokenizers import SPECIAL_TOKENS, vlm_tokenizer
from worlds.shapes.training.train import build_stage, main
from worlds.shapes.training.vision import GRID, VLM_SIZE, patches, shrink, vision_features
from worlds.shapes.training.vlm import corpus, read_rows
from worlds.shapes.training.vlm_batch import Row, sample_rows

SHAPES = Path(__file__).parents[4] / "recipes" / "shapes"
COMMON = ["save_every=2", "log_every=2", "threads=1"]
TOWER = ["batch_size=8", "probe_pictures=8", "model.layers=1", "model.width=32", "model.heads=1", "model.mlp_width=32",
         "model.token_width=64"]  # fmt: skip
MODEL = ["batch_size=4", "model.layers=1", "model.heads=1", "model.mlp_width=64", "compare_layer=1",
         "vocabulary_scenes=150", "pair_share=0.5", "text_share=0.25"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    """A vision tower of two steps, through the command line."""
    folder = tmp_path_factory.mktemp("tower")
    recipe = str(SHAPES / "vision.yaml")
    assert main([recipe, *COMMON, *TOWER, "steps=2", f"output_dir={folder}"]) == 0
    return folder / "model"


def new_loop(tower, output, *overrides):
    recipe = load_recipe(
        SHAPES / "vlm.yaml",
        [*COMMON, *MODEL, "steps=4", f"vision={tower}", f"output_dir={output}", *overrides],
    )
    return TrainingLoop(build_stage(recipe), recipe)


@pytest.fixture(scope="module")
def loop(tower, tmp_path_factory):
    """A model of four steps."""
    straight = new_loop(tower, tmp_path_factory.mktemp("straight"))
    straight.run()
    return straight


def test_resumed_equals_straight(loop, tower, tmp_path):
    cut = new_loop(tower, tmp_path, "stop_step=2")
    cut.run()
    torch.manual_seed(99)  # whatever the global generator holds must not matter
    resumed = new_loop(tower, tmp_path)
    resumed.resume("auto")
    assert resumed.step == 2
    resumed.run()
    states = [load_checkpoint(folder / "checkpoints/step-000004")[0] for folder in (loop.folder, tmp_path)]
    assert_same(*states)
    weights = [(folder / "model/model.safetensors").read_bytes() for folder in (loop.folder, tmp_path)]
    assert weights[0] == weights[1]
    last = [json.loads((f / "metrics.jsonl").read_text().splitlines()[-1]) for f in (loop.folder, tmp_path)]
    assert last[0]["loss"] == last[1]["loss"]


def assert_same(first, second):
    """Nested state, tensors bit for bit."""
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def test_a_vision_tower_is_resumed_and_stays_as_it_is(loop, tower, tmp_path):
    recipe = str(SHAPES / "vision.yaml")
    common = [recipe, *COMMON, *TOWER, "steps=2", "save_every=1", f"output_dir={tmp_path}"]
    assert main([*common, "stop_step=1"]) == 0
    assert main([*common, "--resume", "auto"]) == 0
    name = "visual/model.safetensors"
    assert (tmp_path / "model" / name).read_bytes() == (tower / name).read_bytes()
    from safetensors.torch import load_file

    trained = loop.stage.model.model.visual.state_dict()
    for key, value in load_file(tower / name).items():
        assert torch.equal(value, trained[key])


def test_packed_rows_give_what_the_model_gives_for_each_conversation_alone(loop):
    """Against transformers' own forward, with its own tower, placeholders and multimodal positions."""
    stage = loop.stage
    rows = [stage.packer.fit(row) for row in sample_rows(stage.recipe, 0)]
    assert {len(row.scenes) for row in rows} == {0, 1, 2}
    scenes = [scene for row in rows for scene in row.scenes]
    pixels = patches(torch.from_numpy(shrink(render_batch(scenes))).permute(0, 3, 1, 2).float() / 255)
    batch = stage.packer.pack(rows, pixels)
    model = stage.model.eval()
    with torch.no_grad():
        packed, _ = read_rows(model, batch, vision_features(model.model.visual, batch.pixels), 1)
        number, seen = 0, 0
        for row in rows:
            shown = pixels[seen : seen + len(row.scenes)]
            seen += len(row.scenes)
            for question in row.questions:
                mine = batch.conversations == number
                alone = alone_logits(model, stage, row, question, shown)
                torch.testing.assert_close(
                    alone[-len(packed[mine]) - 1 : -1], packed[mine], rtol=0, atol=2e-4
                )
                number += 1
    assert number == len(batch.kinds)


def alone_logits(model, stage, row: Row, question, shown):
    tokenizer = stage.tokenizer
    turns = [
        {"role": "user", "content": [*[{"type": "image"}] * len(row.scenes), {"type": "text", "text": question.text}]}
    ]  # fmt: skip
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    text = text.replace("<|image_pad|>", "<|image_pad|>" * GRID**2) + question.answer + "<|im_end|>"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    vision = {}
    if row.scenes:
        grid = torch.tensor([[1, GRID, GRID]] * len(row.scenes))
        types = (ids == stage.packer.image_token).int()
        vision = {"pixel_values": shown.flatten(0, 1), "image_grid_thw": grid, "mm_token_type_ids": types}
    model.model.rope_deltas = None
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **vision).logits[0]


def test_pictures_are_what_the_exported_processor_makes_of_them(loop):
    processor = Qwen2VLImageProcessorPil.from_pretrained(loop.folder / "model")
    scenes = sample_rows(loop.recipe, 1)[0].scenes
    picture = render_batch(scenes)
    theirs = processor(images=[Image.fromarray(p) for p in picture], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, GRID, GRID]] * len(scenes)
    ours = patches(torch.from_numpy(shrink(picture)).permute(0, 3, 1, 2).float() / 255)
    torch.testing.assert_close(theirs["pixel_values"], ours.flatten(0, 1), rtol=0, atol=1e-5)
    again = processor(images=[Image.fromarray(shrink(picture)[0])], return_tensors="pt")
    assert again["image_grid_thw"].tolist() == [[1, VLM_SIZE // 7, VLM_SIZE // 7]]


def test_the_tokenizer_is_the_same_each_time_and_after_a_save_and_load(loop):
    texts = corpus(loop.recipe)
    first, second = vlm_tokenizer(texts, max_vocabulary=1000), vlm_tokenizer(texts[::-1], max_vocabulary=1000)
    loaded = AutoTokenizer.from_pretrained(loop.folder / "model")
    assert first.get_vocab() == second.get_vocab() == loaded.get_vocab()
    assert len(loaded) <= 1000 and loaded.eos_token == "<|im_end|>"
    rng = np.random.default_rng(0)
    for text in [
        *rng.choice(texts, 40),
        RUBRIC,
        "Ünheard of: 12 {braces}\n",
        "<|im_start|>user\na<|im_end|>",
    ]:
        ids = loaded(str(text), add_special_tokens=False).input_ids
        assert ids == first(str(text), add_special_tokens=False).input_ids
        assert loaded.decode(ids) == str(text)
    words = "a red circle at the top left and a blue square on grey"
    assert len(loaded(words).input_ids) == len(words.split())
    assert len(loaded("12").input_ids) == 2
    for token in SPECIAL_TOKENS:
        assert len(loaded(token).input_ids) == 1
    with pytest.raises(ValueError, match="max_vocabulary=300"):
        vlm_tokenizer(texts, max_vocabulary=300)


def test_a_missing_tower_is_named(tmp_path, capsys):
    assert main([str(SHAPES / "vlm.yaml"), f"vision={tmp_path}", f"output_dir={tmp_path}"]) == 2
    assert "no vision tower there; make it with recipes/shapes/vision.yaml" in capsys.readouterr().err
