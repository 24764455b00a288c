"""Between pixels and latents: training sizes, image tensors, VAE encoding and decoding."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from core.pictures import to_rgb
from models.sizes import vae_factor

# Width : height, the shapes of UniPic 2.0's Kontext training.
ASPECT_RATIOS: tuple[tuple[int, int], ...] = ((1, 1), (4, 3), (3, 4), (3, 2), (2, 3), (16, 9), (9, 16))

# Bounds the activations of one VAE call to a few GB in float32, whatever the batch.
_PIXELS_PER_CALL = 4 * 512 * 512


def aspect_sizes(area: int, *, multiple: int = 16) -> list[tuple[int, int]]:
    """(height, width) in pixels of every aspect ratio at about `area` pixels, each side a multiple.

    `multiple` is the VAE's factor times the transformer's patch size: 16 for SD3.5.
    """
    return [_size(columns / rows, area, multiple) for columns, rows in ASPECT_RATIOS]


def nearest_size(height: int, width: int, area: int, *, multiple: int = 16) -> tuple[int, int]:
    """The size of `aspect_sizes` whose aspect ratio is nearest (in log) to that of a height x width image."""
    return min(
        aspect_sizes(area, multiple=multiple),
        key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)),
    )


def image_to_tensor(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """An image of any mode and size, resized (Lanczos, aspect not kept): 3 H W float32 in [-1, 1]."""
    image = to_rgb(image)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(height, width, 3)
    return pixels.permute(2, 0, 1).float().div(127.5).sub(1.0).contiguous()


def latent_shape(vae: AutoencoderKL | Mapping[str, Any], height: int, width: int) -> tuple[int, int, int]:
    """(C, h, w) of the latents of a height x width image; takes the VAE or its config.

    Raises:
        ValueError: a side is not a multiple of the VAE's factor.
    """
    config: Any = vae if isinstance(vae, Mapping) else vae.config
    factor = vae_factor(config)
    if height % factor or width % factor:
        raise ValueError(f"image of {height} x {width} px: both sides must be multiples of {factor}")
    return config["latent_channels"], height // factor, width // factor


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """B 3 H W in [-1, 1] -> normalised latents B C h w, float32 on the VAE's device.

    Takes the mode of the posterior where training code elsewhere draws from it: a reference image must
    encode to the same latents in every worker. The VAE runs in its own dtype, float32 by `load_vae`.
    """
    latent_shape(vae, *images.shape[-2:])
    parts = [
        vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mode()
        for part in _parts(images, *images.shape[-2:])
    ]
    return (torch.cat(parts).float() - _shift(vae)) * vae.config["scaling_factor"]


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents B C h w -> images B H W 3, uint8 on the CPU.

    The latents are denormalised in float32 before they are cast to the VAE's dtype.
    """
    factor = vae_factor(vae.config)
    raw = latents.float() / vae.config["scaling_factor"] + _shift(vae)
    height, width = latents.shape[-2] * factor, latents.shape[-1] * factor
    images = []
    for part in _parts(raw, height, width):
        decoded = vae.decode(part.to(vae.device, vae.dtype), return_dict=False)[0].float()
        pixels = (decoded / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        images.append(pixels.permute(0, 2, 3, 1).cpu())
    return torch.cat(images).contiguous()


def _shift(vae: AutoencoderKL) -> float:
    """diffusers writes null for a VAE that is scaled only."""
    return vae.config["shift_factor"] or 0.0


def _parts(batch: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, ...]:
    return batch.split(max(1, _PIXELS_PER_CALL // (height * width)))


def _size(aspect: float, area: int, multiple: int) -> tuple[int, int]:
    """Height and width nearest to `area` and `aspect` (width / height) in whole multiples."""
    height, width = math.sqrt(area / aspect), math.sqrt(area * aspect)
    return max(1, round(height / multiple)) * multiple, max(1, round(width / multiple)) * multiple
