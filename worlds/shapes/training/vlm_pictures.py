"""Pictures of the shapes world as a Qwen2.5-VL sees them, rendered and disturbed as functions of a generator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import Scene
from worlds.shapes.training.config import Disturbance

VLM_SIZE = 28
"""Pixels a side at which the model sees a picture of 32: 28/32 of it (DESIGN section 4)."""
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH = 7, 1, 2
GRID = VLM_SIZE // PATCH_SIZE
"""Patches and tokens a side: one for each 8 x 8 px of the world."""
MIN_PIXELS, MAX_PIXELS = VLM_SIZE**2, 30 * 30
"""The image processor's limits, which make 28 x 28 of a picture of 28 or of 32 (it would round to 35 x 35)."""


def shrink(images: np.ndarray) -> np.ndarray:
    """uint8 [N, 32, 32, 3] -> uint8 [N, 28, 28, 3], by PIL as the image processor does it."""
    size = (VLM_SIZE, VLM_SIZE)
    return np.stack([np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC)) for i in images])


def disturb(pictures: Tensor, settings: Disturbance, generator: torch.Generator) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1]; a share of them gets blur and noise of random strength, as drawn ones have."""
    shape = (len(pictures), 1, 1, 1)
    hit = (torch.rand(shape, generator=generator) < settings.share).float()
    blur = hit * settings.blur * torch.rand(shape, generator=generator)
    noise = hit * settings.noise * torch.rand(shape, generator=generator)
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    mixed = torch.lerp(pictures, F.avg_pool2d(padded, 3, stride=1), blur)
    return (mixed + noise * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


def patches(pictures: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] -> normalised patches [N, P, 3 * 2 * 7 * 7].

    A patch holds its picture twice, a still as two frames: the layout of transformers' `Qwen2VLImageProcessor`.
    """
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    cells = ((pictures - mean) / std).view(len(pictures), 3, GRID, PATCH_SIZE, GRID, PATCH_SIZE)
    cells = cells.permute(0, 2, 4, 1, 3, 5).unsqueeze(4)
    return cells.expand(-1, -1, -1, -1, TEMPORAL_PATCH, -1, -1).reshape(len(pictures), GRID**2, -1)


def shown(scenes: Sequence[Scene], disturbance: Disturbance, generator: torch.Generator) -> Tensor:
    """Patches [N, P, D] of the scenes, a share of them disturbed."""
    pictures = torch.from_numpy(shrink(render_batch(scenes))).permute(0, 3, 1, 2).float() / 255
    return patches(disturb(pictures, disturbance, generator))
