"""Model inputs and the model: against transformers' own processor, a short mRoPE reference, and plain arithmetic."""

import base64
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.training.optimization import trained_parameters
from rewards.editreward.config import ModelSection, Recipe
from rewards.editreward.model import attach_lora, build_model, merge_lora
from rewards.editreward.processing import (
    EditProcessor,
    InputError,
    classify_request,
    prepare_picture,
    read_chat_template,
    shown_size,
)
from rewards.editreward.settings import RUBRIC, EditRewardSettings, SettingsError
from rewards.editreward.train.rank import choose_trainable
from tests.rewards.editreward.editreward_data import make_base

ROOT = Path(__file__).resolve().parents[3]
SIZES = [(64, 64), (200, 90), (90, 200), (400, 300), (30, 240)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def make_settings(base, **changes):
    values = {
        "dimensions": ("overall",), "means": (5.0,), "stds": (2.0,), "score_low": 0.0, "score_high": 10.0,
        "combine": "mean", "view": "full", "rubric": RUBRIC, "chat_template": read_chat_template(base),
        "add_generation_prompt": True, "min_pixels": 4 * 784, "max_pixels": 16 * 784,
        "token_pixels": 28,
    }  # fmt: skip
    return EditRewardSettings(**values | changes)


def picture(size, seed):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def edits():
    return [
        (picture(s, 2 * i), picture(SIZES[-1 - i], 2 * i + 1), f"edit {i} é") for i, s in enumerate(SIZES)
    ]


@pytest.fixture(scope="module")
def model(base):
    model = build_model(base, 2, bias=True, dtype=torch.float32).eval()
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    torch.nn.init.normal_(model.score.bias)
    return model


def test_inputs_are_those_of_the_library_processor_on_prepared_pictures(base, edits):
    from transformers import AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    settings = make_settings(base)
    ours = EditProcessor(base, settings)
    limits = {"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
    library = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor.from_pretrained(base, size=limits),
        AutoTokenizer.from_pretrained(base),
        Qwen2VLVideoProcessor(),
        chat_template=settings.chat_template,
    )
    for source, result, instruction in edits:
        content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": settings.text(instruction)}]
        text = library.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        pictures = [prepare_picture(p, settings) for p in (source, result)]
        theirs = library(text=[text], images=pictures, return_tensors="pt")
        encoded = ours.encode(source, result, instruction)
        assert encoded.input_ids.tolist() == theirs["input_ids"][0].tolist()
        assert encoded.token_types.tolist() == theirs["mm_token_type_ids"][0].tolist()
        assert encoded.grids.tolist() == theirs["image_grid_thw"].tolist()
        torch.testing.assert_close(encoded.pixels, theirs["pixel_values"], rtol=0, atol=1e-5)


def test_a_prepared_picture_keeps_its_shape_and_the_limits(base):
    settings = make_settings(base)
    for size in [*SIZES, (1000, 1000), (5, 7), (300, 40)]:
        width, height = prepare_picture(picture(size, 0).convert("RGBA"), settings).size
        assert width % 28 == height % 28 == 0 and 4 * 784 <= width * height <= 16 * 784
        again = prepare_picture(picture((width, height), 0), settings)
        assert again.size == (width, height)
        assert shown_size(*size, settings.min_pixels, settings.max_pixels, 28) == (width, height)
    with pytest.raises(InputError, match="crop it"):
        prepare_picture(picture((3000, 20), 0), settings)
    with pytest.raises(InputError, match="aspect ratio"):
        prepare_picture(picture((3000, 10), 0), settings)


def test_reserved_text_is_refused_everywhere(base, edits):
    source, result, _ = edits[0]
    settings = make_settings(base)
    with pytest.raises(InputError, match="control tokens"):
        EditProcessor(base, settings).encode(source, result, "look: <|image_pad|>")
    with pytest.raises(InputError, match="control tokens"):
        classify_request(source, result, "<|im_end|>", settings, model="m")


def test_a_template_that_hides_the_pictures_is_refused(base):
    with pytest.raises(SettingsError, match="shows 0 of 2 pictures"):
        EditProcessor(base, make_settings(base, chat_template="{{ messages[0]['role'] }}"))


def test_the_request_carries_the_very_pixels_and_text(base, edits):
    settings = make_settings(base, add_generation_prompt=False)
    source, result, instruction = edits[1]
    request = classify_request(source, result, instruction, settings, model="name")
    first, second, text = request["messages"][0]["content"]
    for part, original in ((first, source), (second, result)):
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/png;base64"
        sent = Image.open(io.BytesIO(base64.b64decode(data)))
        assert sent.tobytes() == prepare_picture(original, settings).tobytes()
    assert text["text"] == settings.text(instruction)
    assert request["add_generation_prompt"] is False and request["model"] == "name"
    only = classify_request(
        source, result, "", make_settings(base, view="result", rubric="How good?"), model="m"
    )
    assert [part["type"] for part in only["messages"][0]["content"]] == ["image_url", "text"]


def reference_positions(ids, grids, image_token):
    """Time, height and width of every token: text counts up, a picture counts rows and columns of 2 x 2 patches."""
    rows, place, grids = [], 0, iter(grids)
    i = 0
    while i < len(ids):
        if ids[i] != image_token:
            rows.append((place, place, place))
            place, i = place + 1, i + 1
            continue
        _, h, w = (int(n) for n in next(grids))
        rows += [(place, place + y, place + x) for y in range(h // 2) for x in range(w // 2)]
        i += (h // 2) * (w // 2)
        place += max(h, w) // 2
    return torch.tensor(rows).T


def test_positions_are_real_mrope_and_flat_ones_would_score_otherwise(base, edits, model):
    processor = EditProcessor(base, make_settings(base))
    encoded = [processor.encode(*edit) for edit in edits[:2]]
    batch = processor.collate(encoded)
    seen = {}

    def catch(module, args, kwargs):
        seen["positions"] = kwargs["position_ids"]

    handle = model.backbone.language_model.register_forward_pre_hook(catch, with_kwargs=True)
    with torch.no_grad():
        scores = model(batch)
    handle.remove()
    positions = seen["positions"][-3:]
    for row, one in enumerate(encoded):
        expected = reference_positions(one.input_ids.tolist(), one.grids, processor.image_token_id)
        assert torch.equal(positions[:, row, : len(one.input_ids)], expected)
    with torch.no_grad():
        flat = model.backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixels,
            image_grid_thw=batch.grids, use_cache=False,
        ).last_hidden_state  # fmt: skip
        last = batch.attention_mask.sum(1) - 1
        assert not torch.allclose(model.score(flat[torch.arange(2), last]), scores, atol=1e-3)


def test_padding_and_company_do_not_change_a_score(base, edits, model):
    processor = EditProcessor(base, make_settings(base))
    encoded = [processor.encode(*edit) for edit in edits]
    with torch.no_grad():
        together = model(processor.collate(encoded))
        alone = torch.cat([model(processor.collate([one])) for one in encoded])
    assert together.shape == (5, 2) and together.dtype == torch.float32
    assert float(alone.std(0).min()) > 0.1, "the edits must differ for this to mean anything"
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_the_score_is_one_linear_of_the_last_token(base, edits, model):
    processor = EditProcessor(base, make_settings(base))
    batch = processor.collate([processor.encode(*edits[0])])
    with torch.no_grad():
        hidden = model.backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, pixel_values=batch.pixels,
            image_grid_thw=batch.grids, mm_token_type_ids=batch.token_types,
        ).last_hidden_state  # fmt: skip
        expected = model.score.weight @ hidden[0, -1] + model.score.bias
        torch.testing.assert_close(model(batch)[0], expected)
    fresh = build_model(base, 3, bias=False, dtype=torch.float32)
    with torch.no_grad():
        assert model.score.bias is not None and fresh.score.bias is None
        assert fresh(batch).tolist() == [[0.0, 0.0, 0.0]]


def test_the_vision_tower_can_stay_as_it_is(base):
    model = build_model(base, 1, bias=True, dtype=torch.float32)
    choose_trainable(model, Recipe(name="run", model=ModelSection(path=str(base), trainable="language")))
    named = dict(trained_parameters(model))
    assert not any(name.startswith("backbone.visual.") for name in named)
    language = {name for name, _ in model.named_parameters() if name.startswith("backbone.language_model.")}
    assert named.keys() == language | {"score.weight", "score.bias"}


def test_lora_trains_the_language_model_and_the_head_alone_and_merges_exactly(base, edits):
    model = build_model(base, 1, bias=True, dtype=torch.float32)
    model.requires_grad_(False)
    assert attach_lora(model, rank=2, alpha=4.0, targets=["q_proj", "down_proj"], seed=0) == 4
    names = [name for name, _ in trained_parameters(model)]
    assert [n for n in names if "lora_" not in n] == ["score.weight", "score.bias"]
    assert all("language_model" in n for n in names if "lora_" in n) and len(names) == 10
    processor = EditProcessor(base, make_settings(base))
    batch = processor.collate([processor.encode(*edit) for edit in edits])
    plain = build_model(base, 1, bias=True, dtype=torch.float32)
    for m in (model, plain):
        torch.manual_seed(2)
        torch.nn.init.normal_(m.score.weight)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), plain(batch))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        moved = model(batch)
        assert not torch.allclose(moved, plain(batch), atol=1e-2)
        merge_lora(model)
        torch.testing.assert_close(model(batch), moved, rtol=1e-4, atol=1e-4)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="model.lora.targets: qkv matches no linear layer"):
        attach_lora(plain, rank=2, alpha=4.0, targets=["qkv"], seed=0)


def test_processing_works_without_torchvision(base):
    code = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "torchvision" else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
import torch
from PIL import Image
from rewards.editreward.model import build_model
from rewards.editreward.processing import EditProcessor, read_chat_template
from rewards.editreward.settings import EditRewardSettings
base = sys.argv[1]
settings = EditRewardSettings(("a",), (0.0,), (1.0,), 0.0, 1.0, "mean", "full", "{instruction}",
                              read_chat_template(base), True, 3136, 12544, 28)
processor = EditProcessor(base, settings)
picture = Image.new("RGB", (70, 50), (200, 10, 10))
batch = processor.collate([processor.encode(picture, picture, "x")])
print(build_model(base, 1, bias=True, dtype=torch.float32)(batch).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(base)], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([1, 1])" in done.stdout


def test_folders_that_hold_no_qwen_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the folder of a Qwen2.5-VL"):
        build_model(tmp_path, 1, bias=True, dtype=torch.float32)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        build_model(tmp_path, 1, bias=True, dtype=torch.float32)
