"""Sizes, image conversion and the VAE's normalisation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.components import load_vae
from models.latents import (
    ASPECT_RATIOS,
    aspect_sizes,
    decode_latents,
    encode_images,
    image_to_tensor,
    latent_shape,
    nearest_size,
)


def test_aspect_sizes_keep_the_area_and_the_ratio() -> None:
    sizes = dict(zip(ASPECT_RATIOS, aspect_sizes(512 * 512), strict=True))
    assert sizes[1, 1] == (512, 512)
    assert sizes[4, 3] == (448, 592)
    assert sizes[9, 16] == (688, 384)
    for (columns, rows), (height, width) in sizes.items():
        assert height % 16 == width % 16 == 0
        assert abs(height * width / 512**2 - 1) < 0.03
        assert abs((width / height) / (columns / rows) - 1) < 0.03
        assert sizes[rows, columns] == (width, height), "a transposed ratio has the transposed size"


def test_nearest_size_is_nearest_in_log_ratio() -> None:
    assert nearest_size(1080, 1920, 512 * 512) == aspect_sizes(512 * 512)[5]
    assert nearest_size(600, 610, 512 * 512) == (512, 512)
    assert nearest_size(1000, 10, 32 * 32, multiple=8) == (40, 24)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_mode_becomes_a_tensor(mode: str) -> None:
    tensor = image_to_tensor(Image.new("RGB", (20, 10), "white").convert(mode), 8, 16)
    assert tensor.shape == (3, 8, 16) and tensor.dtype == torch.float32
    torch.testing.assert_close(tensor, torch.ones(3, 8, 16))


def test_16_bit_grey_is_scaled_and_32_bits_are_refused() -> None:
    torch.testing.assert_close(image_to_tensor(Image.new("I;16", (4, 4), 65535), 4, 4), torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="32 bits a pixel"):
        image_to_tensor(Image.new("F", (4, 4)), 4, 4)


def test_pixels_map_to_minus_one_and_one() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    tensor = image_to_tensor(Image.fromarray(pixels), 8, 16)
    np.testing.assert_allclose(tensor.permute(1, 2, 0).numpy(), pixels / 127.5 - 1, atol=1e-6)


def test_encoding_is_the_normalised_mode_and_repeats(folder: Path) -> None:
    vae = load_vae(folder)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_images(vae, images)
    with torch.no_grad():
        mean = vae.encode(images).latent_dist.mean
    torch.testing.assert_close(latents, (mean - 0.0609) * 1.5305)
    assert latents.shape == (3, *latent_shape(vae, 32, 32)) == (3, 4, 8, 8)
    assert torch.equal(latents, encode_images(vae, images)), (
        "a reference must encode to the same latents each time"
    )


def test_decoding_undoes_the_normalisation(folder: Path) -> None:
    vae = load_vae(folder)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = decode_latents(vae, latents)
    with torch.no_grad():
        decoded = vae.decode(latents / 1.5305 + 0.0609).sample
    expected = ((decoded.permute(0, 2, 3, 1).numpy() + 1) * 127.5).clip(0, 255).round()
    assert images.dtype == torch.uint8 and images.shape == (2, 32, 32, 3)
    assert np.abs(images.numpy() - expected).max() <= 1


def test_large_batches_are_split_without_changing_the_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = load_vae(folder)
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = encode_images(vae, images)
    monkeypatch.setattr("models.latents._PIXELS_PER_CALL", 2 * 32 * 32)
    torch.testing.assert_close(encode_images(vae, images), whole)
    assert decode_latents(vae, whole).shape == (5, 32, 32, 3)


def test_bfloat16_vae_still_gives_float32_latents(folder: Path) -> None:
    vae = load_vae(folder).to(torch.bfloat16)
    latents = encode_images(vae, torch.zeros(1, 3, 32, 32))
    assert latents.dtype == torch.float32
    assert decode_latents(vae, latents).dtype == torch.uint8


def test_sizes_off_the_grid_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="30 x 32 px: both sides must be multiples of 4"):
        encode_images(load_vae(folder), torch.zeros(1, 3, 30, 32))
