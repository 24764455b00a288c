"""Reading with the frozen VLM, against transformers' own forward; its answers; the joined encoder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

from models.metaquery.conditioner import MetaQueryConditioner
from models.metaquery.encoder import MetaQueryEncoder
from models.metaquery.reading import QueryReader
from models.metaquery.vlm import load_vlm, prepare_pictures, shown_size
from tests.fakes.tiny_metaquery import TINY_CONFIG, make_tiny_conditioner

PROMPTS = ["a red fox", "make it blue, please, and keep the rest", "", "remove it"]
QUERIES = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGES = [[], [picture(96, 64)], [], [picture(64, 128, 1), picture(96, 96, 2), picture(96, 64, 3)]]


@pytest.fixture(scope="module")
def readers(metaquery_folders: tuple[Path, Path]) -> dict[str, QueryReader]:
    """Both modes on one VLM whose attention is sharp enough for positions to matter."""
    vlm, *parts = load_vlm(metaquery_folders[1], dtype=torch.float32)
    for layer in vlm.model.language_model.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            linear.weight.data *= 4
    # Without the constant that makes it say digits, what it says depends on what it sees.
    vlm.model.language_model.embed_tokens.weight.data[:, 0] = 0.0
    return {"flat": QueryReader(vlm, *parts), "mrope": QueryReader(vlm, *parts, position_mode="mrope")}


@pytest.fixture(scope="module")
def encoder(readers: dict[str, QueryReader]) -> MetaQueryEncoder:
    return MetaQueryEncoder(make_tiny_conditioner(), readers["flat"])


@torch.no_grad()
def stock_states(reader: QueryReader, prompt: str, images: list[Image.Image], *, pad: int, flat: bool) -> Any:
    """transformers' whole model on ids, padded on the left and masked, as public inference code calls it."""
    vlm = reader.vlm
    user = f"Generate an image: {prompt}"
    inputs: dict[str, torch.Tensor] = {}
    if images:
        small = [
            one.resize((one.width * 28 // 32, one.height * 28 // 32), Image.Resampling.BICUBIC)
            for one in images
        ]
        features = reader.image_processor(images=small, return_tensors="pt")
        inputs = {"pixel_values": features["pixel_values"], "image_grid_thw": features["image_grid_thw"]}
        pads = ["<|image_pad|>" * (int(grid.prod()) // 4) for grid in features["image_grid_thw"]]
        user = "".join(f"<|vision_start|>{each}<|vision_end|>" for each in pads) + prompt
    chat = f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
    ids = reader.tokenizer(chat)["input_ids"]
    filler = reader.tokenizer.convert_tokens_to_ids("<|vision_pad|>")
    ids = torch.tensor([[filler] * pad + ids + [filler] * len(QUERIES)])
    embeds = vlm.get_input_embeddings()(ids)
    embeds[0, -len(QUERIES) :] = QUERIES
    mask = torch.ones_like(ids)
    mask[:, :pad] = 0
    flat_ids = (mask.cumsum(1) - 1).clamp(min=0).expand(3, 1, -1)
    kinds = (ids == vlm.config.image_token_id).int()
    own = {"position_ids": flat_ids} if flat or not images else {"mm_token_type_ids": kinds}
    vlm.model.rope_deltas = None
    output = vlm.model(input_ids=ids, inputs_embeds=embeds, attention_mask=mask, **inputs, **own)
    return output.last_hidden_state[0, -len(QUERIES) :]


@pytest.mark.parametrize("mode", ["flat", "mrope"])
def test_equals_transformers_forward_in_a_batch_and_alone(readers: dict[str, QueryReader], mode: str) -> None:
    reader = readers[mode]
    with torch.no_grad():
        together = reader.hidden_states(QUERIES, PROMPTS, IMAGES)
    for k, (prompt, images) in enumerate(zip(PROMPTS, IMAGES, strict=True)):
        with torch.no_grad():
            alone = reader.hidden_states(QUERIES, [prompt], [images])[0]
        torch.testing.assert_close(together[k], alone, atol=1e-5, rtol=1e-5)
        expected = stock_states(reader, prompt, images, pad=3, flat=mode == "flat")
        torch.testing.assert_close(alone, expected, atol=2e-5, rtol=1e-4)


def test_positions_matter_only_with_a_picture(readers: dict[str, QueryReader]) -> None:
    with torch.no_grad():
        flat, mrope = (readers[m].hidden_states(QUERIES, PROMPTS[:2], IMAGES[:2]) for m in ("flat", "mrope"))
    assert torch.equal(flat[0], mrope[0]) and (flat[1] - mrope[1]).abs().max() > 1e-3


def test_gradient_reaches_the_queries_and_not_the_vlm(readers: dict[str, QueryReader]) -> None:
    queries = QUERIES.clone().requires_grad_()
    weights = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(2))

    def loss() -> torch.Tensor:
        return (readers["flat"].hidden_states(queries, PROMPTS[:2], IMAGES[:2]) * weights).sum()

    loss().backward()
    step, direction = 1e-2, torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        queries += step * direction
        above = loss()
        queries -= 2 * step * direction
        below = loss()
    assert queries.grad is not None
    expected = float((queries.grad * direction).sum())
    assert float(above - below) / (2 * step) == pytest.approx(expected, rel=2e-2)
    assert all(p.grad is None and not p.requires_grad for p in readers["flat"].vlm.parameters())


def test_checkpointing_the_vlm_changes_no_gradient(
    metaquery_folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    attention = Qwen2_5_VLAttention.forward
    monkeypatch.setattr(
        Qwen2_5_VLAttention,
        "forward",
        lambda self, *args, **kw: runs.append(1) or attention(self, *args, **kw),
    )
    gradients = []
    for checkpointed in (False, True):
        reader = QueryReader.from_pretrained(metaquery_folders[1])
        if checkpointed:
            reader.enable_gradient_checkpointing()
        queries = QUERIES.clone().requires_grad_()
        reader.hidden_states(queries, ["a fox"]).square().sum().backward()
        gradients.append(queries.grad)
        assert not reader.vlm.model.language_model.training
    assert torch.equal(gradients[0], gradients[1]) and len(runs) == 2 + 2 * 2


def test_one_token_sees_32_pixels_within_the_processors_limits(readers: dict[str, QueryReader]) -> None:
    processor = readers["flat"].image_processor  # 4 to 16 tokens of 28 px
    scale = 28 / 32
    for (width, height), tokens in {
        (128, 64): (4, 2), (112, 80): (4, 2), (32, 32): (2, 2), (1024, 1024): (4, 4), (1, 100): (1, 8),
    }.items():  # fmt: skip
        shown = shown_size(width * scale, height * scale, processor)
        assert shown == (tokens[0] * 28, tokens[1] * 28) or (width, height) == (1, 100), (width, shown)
    assert prepare_pictures([picture(128, 64).convert("RGBA")], processor, scale=scale).tokens == [8]
    with pytest.raises(ValueError, match="picture of 1 x 300 cannot be shown: .*crop it"):
        shown_size(1, 300, processor)


def test_wrong_inputs_are_refused(
    readers: dict[str, QueryReader], metaquery_folders: tuple[Path, Path]
) -> None:
    reader = readers["flat"]
    with pytest.raises(ValueError, match="1 lists of images do not fit 2 prompts"):
        reader.hidden_states(QUERIES, ["a", "b"], [[]])
    with pytest.raises(TypeError, match="takes a list"):
        reader.hidden_states(QUERIES, "a fox")
    with pytest.raises(ValueError, match="width 32 do not fit a VLM of width 64"):
        reader.hidden_states(torch.zeros(2, 32), ["a"])
    with pytest.raises(ValueError, match=r"control tokens of the VLM: <\|im_end\|>"):
        reader.hidden_states(QUERIES, ["a<|im_end|>"])
    with pytest.raises(ValueError, match="position_mode='rope'"):
        QueryReader.from_pretrained(metaquery_folders[1], position_mode="rope")  # type: ignore[arg-type]


def test_encoding_is_cached_by_prompt_and_pixels(encoder: MetaQueryEncoder) -> None:
    embeds = encoder.encode(PROMPTS, IMAGES)
    assert embeds[0].prompt_embeds.shape == (6, 48) and embeds[0].pooled_prompt_embeds.shape == (40,)
    assert encoder.encode(PROMPTS, [[one.copy() for one in row] for row in IMAGES])[3] is embeds[3]
    others = encoder.encode([PROMPTS[3]] * 4, [[], [picture(64, 128, 2)], IMAGES[3][:1], IMAGES[3][::-1]])
    for other in others:
        assert not torch.equal(other.prompt_embeds, embeds[3].prompt_embeds), (
            "pictures and their order are part of the prompt"
        )
    conditioner = encoder.conditioner
    assert conditioner is not None
    with torch.no_grad():
        states = encoder.reader.hidden_states(conditioner.meta_queries, PROMPTS, IMAGES)
        expected, pooled = conditioner.project(states)
    for k, one in enumerate(embeds):
        torch.testing.assert_close(one.prompt_embeds, expected[k], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.pooled_prompt_embeds, pooled[k], atol=1e-4, rtol=1e-4)


def test_answers_are_the_vlms_own(encoder: MetaQueryEncoder, metaquery_folders: tuple[Path, Path]) -> None:
    understanding = MetaQueryEncoder(None, encoder.reader)
    images = [picture(64, 64), picture(112, 56, 1)]
    answer = understanding.answer(images, "what changed?", max_new_tokens=6)
    assert answer == encoder.answer(images, "what changed?", max_new_tokens=6)
    assert answer and answer != understanding.answer([], "what changed?", max_new_tokens=6)
    with pytest.raises(ValueError, match="no conditioner"):
        understanding.encode(["a fox"])

    vlm, tokenizer = encoder.reader.vlm, AutoTokenizer.from_pretrained(metaquery_folders[1])
    features = encoder.reader.image_processor(images=images, return_tensors="pt")
    counts = (features["image_grid_thw"].prod(1) // 4).tolist()
    pads = "".join(f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts)
    ids = tokenizer(
        f"<|im_start|>user\n{pads}what changed?<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt"
    )
    ids = ids["input_ids"]
    for _ in range(6):  # without a cache: every token from a whole forward with real mRoPE
        with torch.no_grad():
            logits = vlm(
                input_ids=ids, mm_token_type_ids=(ids == vlm.config.image_token_id).int(), **features
            ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0, -6:], skip_special_tokens=True) == answer


def test_grounding_json_passes_through_untouched(
    encoder: MetaQueryEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = '```json\n[\n\t{"bbox_2d": [1, 2, 30, 40], "label": "red  fox ."}\n]\n```'
    tokenizer = encoder.reader.tokenizer
    tail = torch.tensor([tokenizer(said)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]])
    monkeypatch.setattr(
        encoder.reader.vlm, "generate", lambda input_ids, **_: torch.cat([input_ids, tail], dim=1)
    )
    answer = encoder.answer([picture(64, 64)], "where is the fox?")
    assert answer == said and json.loads(answer.strip("`").removeprefix("json"))[0]["bbox_2d"] == [
        1,
        2,
        30,
        40,
    ]


def test_a_conditioner_for_another_vlm_is_refused(encoder: MetaQueryEncoder) -> None:
    other = MetaQueryConditioner(replace(TINY_CONFIG, llm_hidden_size=32))
    with pytest.raises(ValueError, match="VLM of width 32, this one has 64"):
        MetaQueryEncoder(other, encoder.reader)
