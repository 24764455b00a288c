"""The pipeline against diffusers' SD3 pipeline, its own folder layout, and the inputs people give it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image

from models.components import load_transformer
from models.latents import encode_images, image_to_tensor
from models.lora.attach import adapter_parameters, attach_lora, hash_state, load_adapter_state
from models.pipeline import KontextPipeline

STEPS = {"num_inference_steps": 3, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> KontextPipeline:
    loaded = KontextPipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_text_to_image_equals_diffusers(folder: Path, pipeline: KontextPipeline) -> None:
    parts = {name: part for name, part in pipeline.components.items() if name != "transformer"}
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    stock = StableDiffusion3Pipeline(transformer=transformer, **parts)
    stock.set_progress_bar_config(disable=True)
    call = {
        "prompt": ["a red circle", "two blue stars"], "negative_prompt": ["black", "white"], "guidance_scale": 3.5,
        "num_images_per_prompt": 2, "output_type": "latent", **STEPS,
    }  # fmt: skip
    expected = stock(generator=seeded(), height=32, width=32, **call).images
    torch.testing.assert_close(pipeline(generator=seeded(), **call).images, expected, atol=1e-5, rtol=1e-5)


def test_edit_equals_a_hand_written_loop(pipeline: KontextPipeline) -> None:
    image = picture(20, 40)
    got = pipeline(
        "make it red", image, generator=seeded(), height=40, width=24, output_type="latent", **STEPS
    ).images

    text = pipeline._text_encoder("prompt", 8).encode(["make it red", ""])
    reference = encode_images(pipeline.vae, image_to_tensor(image, 40, 24)[None])
    latents = torch.randn(1, 4, 10, 6, generator=seeded())
    pipeline.scheduler.set_timesteps(3)
    sigmas = pipeline.scheduler.sigmas.clone()
    with torch.no_grad():
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            positive, negative = (
                pipeline.transformer(
                    latents,
                    one.prompt_embeds[None],
                    one.pooled_prompt_embeds[None],
                    1000 * sigma[None],
                    reference_hidden_states=reference,
                ).sample
                for one in text
            )
            latents = latents + (sigma_next - sigma) * (negative + 3.5 * (positive - negative))
    torch.testing.assert_close(got, latents, atol=1e-4, rtol=1e-4)


def test_same_seed_same_image_and_the_reference_matters(pipeline: KontextPipeline) -> None:
    def edit(seed: int, image: Image.Image) -> np.ndarray:
        return pixels(pipeline("make it red", image, generator=seeded(seed), **STEPS).images)

    first = edit(0, picture())
    torch.randn(3)
    assert (edit(0, picture()) == first).all(), "the global generator must not matter"
    assert (edit(1, picture()) != first).any()
    assert (edit(0, picture(seed=1)) != first).any()


def test_several_references_of_a_prompt_keep_their_order(
    pipeline: KontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer,
        "forward",
        lambda **kw: seen.append(kw["reference_hidden_states"]) or forward(**kw),
    )
    room, cat = picture(32, 32), picture(64, 16, seed=1)

    def edit(
        prompt: str | list[str], image: object, seeds: tuple[int, ...] = (0,), **more: int
    ) -> torch.Tensor:
        options = {"height": 32, "width": 32, "guidance_scale": 1.0, "output_type": "latent", **STEPS, **more}
        generators = [seeded(seed) for seed in seeds]
        return pipeline(prompt, image, generator=generators, **options).images

    both = edit("x", [room, cat])
    for shown, (image, height, width) in zip(seen[0], ((room, 32, 32), (cat, 16, 64)), strict=True):
        expected = encode_images(pipeline.vae, image_to_tensor(image, height, width)[None])
        assert torch.equal(shown, expected)
    assert torch.equal(edit(["x"], [[room, cat]]), both)
    other = picture(32, 32, seed=2)
    assert (edit("x", [room, other]) - edit("x", [other, room])).abs().max() > 1e-3
    together = edit(["x", "x"], [[room, cat], [other, cat]], (0, 1))
    torch.testing.assert_close(together[:1], both, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[1:], edit("x", [other, cat], (1,)), atol=1e-5, rtol=1e-5)
    edit("x", [room, cat], reference_pixels=32 * 32 + 256)
    assert [one.shape[-2:] for one in seen[-1]] == [(8, 8), (2, 8)]


def test_one_generator_per_image_makes_each_its_own(pipeline: KontextPipeline) -> None:
    options = {"output_type": "latent", **STEPS}
    together = pipeline(["a star", "a circle"], generator=[seeded(1), seeded(2)], **options).images
    alone = pipeline("a circle", generator=[seeded(2)], **options).images
    torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)


def test_guidance_of_one_runs_the_prompt_alone(
    pipeline: KontextPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer, "forward", lambda **kw: rows.append(len(kw["hidden_states"])) or forward(**kw)
    )
    pipeline("a star", guidance_scale=1.0, **STEPS)
    pipeline("a star", guidance_scale=2.0, **STEPS)
    assert rows == [1] * 3 + [2] * 3


def test_folder_round_trips(tmp_path: Path, folder: Path, pipeline: KontextPipeline) -> None:
    pipeline.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in folder.iterdir())
    again = KontextPipeline.from_pretrained(tmp_path)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert hash_state(getattr(again, name).state_dict()) == hash_state(
            getattr(pipeline, name).state_dict()
        )
    first, second = (
        p("a red star", picture(), generator=seeded(), **STEPS).images for p in (pipeline, again)
    )
    assert (pixels(first) == pixels(second)).all()


def test_every_kind_of_reference_works(pipeline: KontextPipeline) -> None:
    rotated = picture(16, 32)
    rotated.getexif()[0x0112] = 8
    for image in [picture().convert(mode) for mode in ("RGBA", "LA", "P", "L", "CMYK")] + [rotated]:
        assert pipeline("make it red", image, generator=seeded(), **STEPS).images[0].mode == "RGB"
    upright = rotated.transpose(Image.Transpose.ROTATE_90)
    outputs = [pixels(pipeline("x", one, generator=seeded(), **STEPS).images) for one in (rotated, upright)]
    assert outputs[0].shape == outputs[1].shape and (outputs[0] == outputs[1]).all()


def test_default_size_follows_the_reference(pipeline: KontextPipeline) -> None:
    assert pipeline("a star", **STEPS).images[0].size == (32, 32)
    assert pipeline("a star", picture(160, 90), **STEPS).images[0].size == (40, 24)
    assert pipeline("a star", picture(160, 90), height=16, width=48, **STEPS).images[0].size == (48, 16)


def test_output_types_agree(pipeline: KontextPipeline) -> None:
    outputs = {
        kind: pipeline("a star", generator=seeded(), output_type=kind, **STEPS).images
        for kind in ("pil", "np", "pt")
    }
    np.testing.assert_allclose(outputs["np"], pixels(outputs["pil"]) / 255, atol=1e-6)
    np.testing.assert_allclose(outputs["pt"].permute(0, 2, 3, 1).numpy(), outputs["np"])
    as_tuple = pipeline("a star", generator=seeded(), return_dict=False, **STEPS)
    assert (pixels(as_tuple[0]) == pixels(outputs["pil"])).all()


def test_runs_on_embeddings_without_text_encoders(folder: Path, pipeline: KontextPipeline) -> None:
    text_parts = [f"{part}{suffix}" for part in ("text_encoder", "tokenizer") for suffix in ("", "_2", "_3")]
    bare = KontextPipeline.from_pretrained(folder, **dict.fromkeys(text_parts))
    positive, negative = pipeline._text_encoder("prompt", 8).encode(["a star", ""])
    given = {
        "prompt_embeds": positive.prompt_embeds[None], "pooled_prompt_embeds": positive.pooled_prompt_embeds[None],
        "negative_prompt_embeds": negative.prompt_embeds[None],
        "negative_pooled_prompt_embeds": negative.pooled_prompt_embeds[None],
    }  # fmt: skip
    expected = pipeline("a star", generator=seeded(), **STEPS).images
    assert (pixels(bare(**given, generator=seeded(), **STEPS).images) == pixels(expected)).all()
    with pytest.raises(ValueError, match="no text encoders: give prompt_embeds"):
        bare("a star")
    with pytest.raises(ValueError, match="without its text_encoder"):
        bare.save_pretrained(folder)


def test_bfloat16_keeps_float32_latents_and_vae(folder: Path) -> None:
    pipeline = KontextPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    latents = pipeline("a star", generator=seeded(), output_type="latent", **STEPS).images
    assert pipeline.vae.dtype == torch.float32 and pipeline.transformer.dtype == torch.bfloat16
    assert latents.dtype == torch.float32 and not torch.equal(latents, latents.bfloat16().float())


def test_adapter_folders_load_by_us_and_by_diffusers(tmp_path: Path, folder: Path) -> None:
    trained = KontextPipeline.from_pretrained(folder)
    attach_lora(trained.transformer, rank=4, alpha=8)
    state = {
        name: torch.randn(p.shape, generator=seeded()) * 0.3
        for name, p in adapter_parameters(trained.transformer).items()
    }
    load_adapter_state(trained.transformer, state)
    trained.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="save_merged_transformer"):
        trained.save_pretrained(tmp_path / "folder")
    images = {}
    for name in ("ours", "diffusers", "none"):
        fresh = KontextPipeline.from_pretrained(folder)
        if name == "ours":
            fresh.load_adapter(tmp_path)
        elif name == "diffusers":
            fresh.load_lora_weights(tmp_path / "diffusers")
        images[name] = fresh("a star", generator=seeded(), output_type="latent", **STEPS).images
    expected = trained("a star", generator=seeded(), output_type="latent", **STEPS).images
    assert torch.equal(images["ours"], expected)
    assert torch.equal(images["diffusers"], expected)
    assert not torch.equal(images["none"], expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({}, "give prompt or prompt_embeds"),
        ({"prompt": "a", "output_type": "jpeg"}, "none of pil"),
        ({"prompt": "a", "height": 30, "width": 32}, "multiples of 8"),
        ({"prompt": "a", "height": 32}, "or neither"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c"] * 3}, "3 negative_prompts"),
        ({"prompt": ["a", "b"], "image": [picture()] * 3}, "3 images do not fit 2 prompts"),
        ({"prompt": "a", "image": [[picture()]] * 2}, "2 lists of images do not fit 1 prompts"),
        ({"prompt": "a", "image": []}, "a list of references is empty"),
        ({"prompt": ["a", "b"], "image": [picture(), [picture()]]}, "mixes pictures and lists"),
        (
            {"prompt": ["a", "b"], "image": [[picture()], [picture()] * 2], "height": 32, "width": 32},
            r"shown at \[\(32, 32\)\], \[\(32, 32\), \(32, 32\)\] .* calls of their own",
        ),
        ({"prompt": "a", "image": [picture()] * 2, "reference_pixels": 1024}, "2 references in 1024 pixels"),
        ({"prompt": ["a", "b"], "image": [picture(), picture(64, 32)]}, "give height and width"),
        ({"prompt": "a", "latents": torch.zeros(1, 4, 4, 4)}, r"expected \(1, 4, 8, 8\)"),
        ({"prompt_embeds": torch.zeros(1, 24, 48)}, "given together"),
    ],
)
def test_contradictory_inputs_are_refused(pipeline: KontextPipeline, call: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(**call)


def test_missing_parts_and_unknown_components_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        KontextPipeline.from_pretrained(tmp_path / "absent")
    with pytest.raises(ValueError, match="unknown components .*'transfomer'"):
        KontextPipeline.from_pretrained(folder, transfomer=load_transformer(folder, dtype=torch.float32))
