"""Transformers to measure: two sizes, with random weights made in place, so that no file is needed."""

from __future__ import annotations

from typing import Any

import torch

from models.kontext import KontextTransformer
from models.sd35_medium import sd35_medium_config

SIZES = ("tiny", "sd35m")
DEFAULT_RESOLUTION = {"tiny": 128, "sd35m": 512}
VAE_FACTOR = 8
"""Pixels per latent in height and width, for both sizes; the autoencoder itself is not measured."""


def transformer_config(size: str) -> dict[str, Any]:
    """Arguments of `KontextTransformer`. `tiny` has every kind of block in 0.5 M parameters."""
    if size == "sd35m":
        return sd35_medium_config()
    return {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 96,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 80,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    }


def random_transformer(
    config: dict[str, Any], *, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> KontextTransformer:
    """Built without memory, then filled on `device`: matrices N(0, .02²), norms 1, biases 0.

    Speed does not depend on the values as long as they are finite; memory at the peak is the weights alone.
    """
    with torch.device("meta"):
        transformer = KontextTransformer(**config)
    torch.nn.Module.to(
        transformer, dtype
    )  # diffusers overrides `to` with a warning about nothing kept in float32
    transformer = transformer.to_empty(device=device)
    fill(transformer, seed)
    return transformer


@torch.no_grad()
def fill(module: torch.nn.Module, seed: int) -> None:
    """Every parameter and buffer in place: matrices N(0, .02²), vectors 1, biases 0, position numbers counted up."""
    device = next(module.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.shape[-1]))
        elif tensor.ndim > 1:
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
