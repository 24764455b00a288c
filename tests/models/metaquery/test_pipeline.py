"""MetaQuery's pipeline against a loop written by hand, its folder layout, and edits that repeat."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.folders import METAQUERY_PARTS
from models.latents import encode_images, image_to_tensor
from models.lora.attach import DEFAULT_TARGETS, adapter_state, attach_lora
from models.lora.files import save_adapter
from models.metaquery.pipeline import MetaQueryPipeline
from tests.fakes.tiny_metaquery import make_tiny_conditioner

STEPS = {"num_inference_steps": 3, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipeline(metaquery_folders: tuple[Path, Path]) -> MetaQueryPipeline:
    loaded = MetaQueryPipeline.from_pretrained(*metaquery_folders)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@torch.no_grad()
def test_edit_equals_a_hand_written_loop(pipeline: MetaQueryPipeline) -> None:
    image = picture(20, 40)
    got = pipeline("make it red", image, "blurry", generator=seeded(), height=40, width=24, **STEPS).images

    resized = image.resize((24, 40), Image.Resampling.LANCZOS)
    reference = encode_images(pipeline.vae, image_to_tensor(resized, 40, 24)[None])
    reader = pipeline._encoder().reader
    rows = [
        pipeline.conditioner.project(
            reader.hidden_states(pipeline.conditioner.meta_queries, [prompt], [[resized]])
        )
        for prompt in ("make it red", "blurry")
    ]
    latents = torch.randn(1, 4, 10, 6, generator=seeded())
    pipeline.scheduler.set_timesteps(3)
    sigmas = pipeline.scheduler.sigmas.clone()
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
        positive, negative = (
            pipeline.transformer(
                latents, embeds, pooled, 1000 * sigma[None], reference_hidden_states=reference
            ).sample
            for embeds, pooled in rows
        )
        latents = latents + (sigma_next - sigma) * (negative + 3.5 * (positive - negative))
    torch.testing.assert_close(got, latents, atol=1e-4, rtol=1e-4)


def test_prompt_picture_and_negative_prompt_reach_the_image(pipeline: MetaQueryPipeline) -> None:
    def latents(*call: object) -> torch.Tensor:
        return pipeline(*call, generator=seeded(), height=32, width=32, **STEPS).images  # type: ignore[arg-type]

    first = latents("a red fox")
    assert torch.equal(latents("a red fox"), first)
    for other in (("a blue fox",), ("a red fox", None, "blue"), ("a red fox", picture())):
        assert (latents(*other) - first).abs().max() > 1e-3, other


def test_several_references_are_seen_in_their_order(pipeline: MetaQueryPipeline) -> None:
    """By the VLM beside both prompts, and by the transformer: each alone makes a difference."""
    pair = [picture(), picture(seed=1)]

    def latents(images: list[Image.Image], **options: float) -> torch.Tensor:
        call = {"height": 32, "width": 32, **STEPS, **options}
        return pipeline("put it there", images, generator=seeded(), **call).images  # type: ignore[arg-type]

    assert torch.equal(latents(pair), latents(pair))
    assert (latents(pair) - latents(pair[::-1])).abs().max() > 1e-3
    embeds = [pipeline._encoder().encode(["x"], [one])[0].prompt_embeds for one in (pair, pair[::-1])]
    assert (embeds[0] - embeds[1]).abs().max() > 1e-4


def test_an_edit_repeats_alone_and_in_a_batch(pipeline: MetaQueryPipeline) -> None:
    size = {"height": 32, "width": 32, **STEPS}
    alone = pipeline("make it red", picture(), generator=seeded(5), **size).images
    torch.randn(3)  # the global generator must not matter
    assert torch.equal(pipeline("make it red", picture(), generator=seeded(5), **size).images, alone)
    together = pipeline(
        ["remove the much longer thing at the left", "make it red"],
        [picture(96, 32, 1), picture()],
        generator=[seeded(4), seeded(5)],
        **size,
    ).images
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_every_kind_of_picture_is_edited(pipeline: MetaQueryPipeline) -> None:
    options = {"height": 32, "width": 32, "num_inference_steps": 1}
    thin, huge = picture(1, 300), picture(2000, 1500)
    for image in (picture().convert("RGBA"), picture().convert("P"), Image.new("I;16", (8, 8)), thin, huge):
        assert pipeline("make it red", image, generator=seeded(), **options).images[0].size == (32, 32)
    with pytest.raises(ValueError, match="32 bits a pixel"):
        pipeline("make it red", Image.new("F", (8, 8)), **options)
    rotated = picture(16, 32)
    rotated.getexif()[0x0112] = 8
    upright = rotated.transpose(Image.Transpose.ROTATE_90)
    drawn = [pipeline("x", one, generator=seeded(), **STEPS).images for one in (rotated, upright)]
    assert torch.equal(*drawn)


def test_folder_round_trips(
    tmp_path: Path, pipeline: MetaQueryPipeline, metaquery_folders: tuple[Path, Path]
) -> None:
    pipeline.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(METAQUERY_PARTS)
    again = MetaQueryPipeline.from_pretrained(tmp_path, metaquery_folders[1])
    call = {"prompt": ["make it red"], "image": picture(), "height": 32, "width": 32, **STEPS}
    first, second = (p(**call, generator=seeded()).images for p in (pipeline, again))  # type: ignore[arg-type]
    assert torch.equal(first, second)


def test_position_mode_is_passed_on(pipeline: MetaQueryPipeline) -> None:
    parts = pipeline.components
    other = MetaQueryPipeline(**parts, position_mode="mrope")
    assert other._encoder().reader.position_mode == "mrope"
    assert pipeline._encoder().reader.position_mode == "flat"


def test_adapters_load(tmp_path: Path, metaquery_folders: tuple[Path, Path]) -> None:
    pipeline = MetaQueryPipeline.from_pretrained(*metaquery_folders)
    base = pipeline("a fox", generator=seeded(), **STEPS).images
    attach_lora(pipeline.transformer, rank=2, alpha=4.0, targets=DEFAULT_TARGETS, seed=0)
    state = {k: torch.ones_like(v) * 0.05 for k, v in adapter_state(pipeline.transformer).items()}
    save_adapter(state, tmp_path, rank=2, alpha=4.0, targets=DEFAULT_TARGETS)
    fresh = MetaQueryPipeline.from_pretrained(*metaquery_folders)
    fresh.load_adapter(tmp_path)
    assert (fresh("a fox", generator=seeded(), **STEPS).images - base).abs().max() > 1e-3


def test_answer_needs_no_drawing(pipeline: MetaQueryPipeline) -> None:
    images = [picture(), picture(seed=1)]
    expected = pipeline._encoder().answer(images, "how many?", max_new_tokens=4)
    assert pipeline.answer(images, "how many?", max_new_tokens=4) == expected and len(expected) == 4


def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, pipeline: MetaQueryPipeline, metaquery_folders: tuple[Path, Path]
) -> None:
    with pytest.raises(FileNotFoundError, match=r"conditioner: missing subfolder.*no such folder"):
        shutil.copytree(metaquery_folders[0], tmp_path / "model")
        shutil.rmtree(tmp_path / "model" / "conditioner")
        MetaQueryPipeline.from_pretrained(tmp_path / "model", tmp_path / "vlm")
    conditioner = make_tiny_conditioner(joint_attention_dim=20)
    with pytest.raises(ValueError, match="conditioner's joint_attention_dim is 20, the transformer's 48"):
        MetaQueryPipeline(**(pipeline.components | {"conditioner": conditioner}))
    with pytest.raises(ValueError, match="2 negative_prompts do not fit 1 prompts"):
        pipeline("a", negative_prompt=["b", "c"])
