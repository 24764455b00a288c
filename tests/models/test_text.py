"""The text encoder against diffusers' SD3 pipeline, and its cache."""

import logging
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from models.text import SD3TextEncoder

PROMPTS = ["a photo of a red circle", "", "a blue square left of a green star " * 4]


def load(folder: Path, **options: int) -> SD3TextEncoder:
    return SD3TextEncoder.from_pretrained(
        folder, dtype=torch.float32, device="cpu", max_sequence_length=12, **options
    )


@torch.no_grad()
def test_equals_diffusers_sd3_pipeline(folder: Path) -> None:
    encoder = load(folder)
    pipeline = StableDiffusion3Pipeline(
        transformer=None,
        scheduler=None,
        vae=None,
        text_encoder=encoder.clip_encoders[0],
        tokenizer=encoder.clip_tokenizers[0],
        text_encoder_2=encoder.clip_encoders[1],
        tokenizer_2=encoder.clip_tokenizers[1],
        text_encoder_3=encoder.t5_encoder,
        tokenizer_3=encoder.t5_tokenizer,
    )
    for prompt, embeds in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
        sequence, _, pooled, _ = pipeline.encode_prompt(
            prompt, None, None, do_classifier_free_guidance=False, max_sequence_length=12, device="cpu"
        )
        assert embeds.prompt_embeds.shape == (16 + 12, 48) and embeds.pooled_prompt_embeds.shape == (40,)
        assert torch.equal(embeds.prompt_embeds, sequence[0])
        assert torch.equal(embeds.pooled_prompt_embeds, pooled[0])


def test_result_does_not_depend_on_company(folder: Path) -> None:
    together = load(folder).encode(PROMPTS)
    for prompt, embeds in zip(PROMPTS, together, strict=True):
        alone = load(folder).encode([prompt])[0]
        assert torch.equal(alone.prompt_embeds, embeds.prompt_embeds)
        assert torch.equal(alone.pooled_prompt_embeds, embeds.pooled_prompt_embeds)


def test_cache_is_bounded_in_bytes_and_forgets_the_least_recent(folder: Path) -> None:
    size = load(folder).encode(["a"])[0].num_bytes
    assert size == (28 * 48 + 40) * 4
    encoder = load(folder, cache_bytes=2 * size)
    first, second = encoder.encode(["one", "two"])
    assert encoder.encode(["one"])[0] is first
    encoder.encode(["three"])
    assert encoder.encode(["one"])[0] is first
    assert encoder.encode(["two"])[0] is not second, "'two' was the least recent of three"
    assert encoder.cache.num_bytes == 2 * size


def test_cache_of_zero_bytes_keeps_nothing(folder: Path) -> None:
    encoder = load(folder, cache_bytes=0)
    first, again = encoder.encode(["a", "a"])
    assert first is not again and encoder.cache.num_bytes == 0


def test_truncation_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="models.text"):
        load(folder).encode(PROMPTS)
    assert len(caplog.records) == 1 and "cut to max_sequence_length 12" in caplog.text


def test_a_bare_string_is_refused(folder: Path) -> None:
    with pytest.raises(TypeError, match="list of prompts"):
        load(folder).encode("red circle")


def test_missing_parts_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path)
    for part in ("text_encoder_2", "text_encoder_3", "tokenizer_3"):
        assert part in str(error.value)
