"""Stage `vision`: the vision tower of a small Qwen2.5-VL on pictures of the shapes world, and how it sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionBlock,
    apply_rotary_pos_emb_vision,
)

from core.seeds import numpy_generator
from core.training.randomness import torch_generator
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene
from worlds.shapes.training.config import Disturbance, VisionModel, VisionRecipe
from worlds.shapes.training.loop import Stage, StageLoss
from worlds.shapes.training.vlm_questions import scene_of_split

VLM_SIZE = 28
"""Pixels a side at which the model sees a picture of 32: 28/32 of it (DESIGN section 4)."""
PATCH_SIZE, MERGE_SIZE, TEMPORAL_PATCH = 7, 1, 2
GRID = VLM_SIZE // PATCH_SIZE
"""Patches and tokens a side: one for each 8 x 8 px of the world."""
MIN_PIXELS, MAX_PIXELS = VLM_SIZE**2, 30 * 30
"""The image processor's limits, which make 28 x 28 of a picture of 28 or of 32 (it would round to 35 x 35)."""

_SCENES, _NOISE = 107, 108
_PROBE_STEP = 1 << 30
_CHUNK = 250
_CELLS = 3
_CODE_SEED = 0
_NOTHING, _UNASKED = 0, -100


class VisionStage(Stage):
    """Each token tells the object whose centre is at its lower right corner, that object's place, and the background.

    A tower that starts from random weights learns little from answers alone: the language model must first guess
    which of its features matter. A linear map shared by all tokens, thrown away after training, asks for the
    features themselves.
    """

    def __init__(self, recipe: VisionRecipe) -> None:
        self.recipe = recipe
        self.visual = Qwen2_5_VisionTransformerPretrainedModel(vision_config(recipe.model))
        self.codes = CellCodes(recipe.model.token_width)
        self.modules = [self.visual, self.codes]

    def loss(self, step: int) -> StageLoss:
        loss, right = self._read(step, self.recipe.batch_size, "train")
        return StageLoss(loss, {"cells_right": right})

    def export(self, folder: Path) -> dict[str, float]:
        """Write `visual/`; probe what it tells of held-out pictures."""
        rounded = Qwen2_5_VisionTransformerPretrainedModel(self.visual.config)
        rounded.load_state_dict(self.visual.state_dict())
        rounded.to(getattr(torch, self.recipe.export_dtype)).save_pretrained(folder / "visual")
        chunks = range(-(-self.recipe.probe_pictures // _CHUNK))
        shares = [self._read(_PROBE_STEP + chunk, _CHUNK, "heldout")[1] for chunk in chunks]
        parameters = sum(p.numel() for p in rounded.parameters())
        return {"heldout_cells_right": sum(shares) / len(shares), "parameters": float(parameters)}

    def _read(self, step: int, count: int, split: str) -> tuple[Tensor, float]:
        rng = numpy_generator(self.recipe.seed, step, _SCENES)
        scenes = [scene_of_split(rng, split) for _ in range(count)]
        pixels = shown(scenes, self.recipe.disturbance, torch_generator(self.recipe.seed, step, _NOISE))
        return self.codes.loss(vision_features(self.visual, pixels), cell_labels(scenes))


@dataclass(frozen=True)
class CellLabels:
    """shapes, colors [N, P] (0: nothing, then the world's names in order), places [N, P] (of objects alone, else
    -100), backgrounds [N]."""

    shapes: Tensor
    colors: Tensor
    places: Tensor
    backgrounds: Tensor


def cell_labels(scenes: Sequence[Scene]) -> CellLabels:
    """A picture has one token more a side than cells; the tokens beyond hold nothing."""
    shapes, colors = (torch.full((len(scenes), GRID, GRID), _NOTHING) for _ in range(2))
    places = torch.full_like(shapes, _UNASKED)
    for n, scene in enumerate(scenes):
        for item in scene.objects:
            row, column = divmod(item.cell, _CELLS)
            shapes[n, row, column] = 1 + SHAPES.index(item.shape)
            colors[n, row, column] = 1 + tuple(COLORS).index(item.color)
            places[n, row, column] = item.cell
    backgrounds = torch.tensor([tuple(BACKGROUNDS).index(scene.background) for scene in scenes])
    return CellLabels(shapes.flatten(1), colors.flatten(1), places.flatten(1), backgrounds)


class CellCodes(nn.Module):
    """What a token should be: the sum of one fixed code for each thing it tells, all codes at right angles.

    So shapes, colours, places and backgrounds are as plain in a token as words are in a text's embeddings.
    """

    code: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self._sizes = [1 + len(SHAPES), 1 + len(COLORS), len(PLACES), len(BACKGROUNDS)]
        random = torch.randn(width, sum(self._sizes), generator=torch.Generator().manual_seed(_CODE_SEED))
        self.register_buffer("code", torch.linalg.qr(random).Q.T.contiguous())

    def loss(self, tokens: Tensor, labels: CellLabels) -> tuple[Tensor, float]:
        """Squared distance of tokens [N, P, H] from their codes, objects and empty tokens alike in weight; and the
        share of objects of which the nearest codes tell everything right."""
        backgrounds = labels.backgrounds[:, None].expand(tokens.shape[:2])
        wanted = (labels.shapes, labels.colors, labels.places, backgrounds)
        logits = (tokens @ self.code.T).split(self._sizes, dim=-1)
        target = torch.zeros_like(tokens)
        for label, code in zip(wanted, self.code.split(self._sizes), strict=True):
            target = target + code[label.clamp(min=0)] * (label >= 0)[..., None]
        objects = labels.shapes != _NOTHING
        error = (tokens - target).square().sum(-1)
        right = [x.argmax(-1) == y for x, y in zip(logits, wanted, strict=True)]
        share = torch.stack(right).all(0)[objects].float().mean().item()
        return error[objects].mean() + error[~objects].mean(), share


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


def vision_config(model: VisionModel) -> Qwen2_5_VLVisionConfig:
    """Every block sees its whole picture: there are no windows of 28 pixels."""
    return Qwen2_5_VLVisionConfig(
        depth=model.layers,
        hidden_size=model.width,
        intermediate_size=model.mlp_width,
        num_heads=model.heads,
        out_hidden_size=model.token_width,
        fullatt_block_indexes=list(range(model.layers)),
        patch_size=PATCH_SIZE,
        spatial_merge_size=MERGE_SIZE,
        temporal_patch_size=TEMPORAL_PATCH,
    )


def vision_features(visual: Qwen2_5_VisionTransformerPretrainedModel, pixels: Tensor) -> Tensor:
    """What `visual` gives for pictures of one size: pixels [N, P, D] -> tokens [N, P, H].

    The tower's own forward attends picture by picture in a Python loop; here all of them are one batch.
    """
    n, count = pixels.shape[:2]
    places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
    hidden = visual.patch_embed(pixels.reshape(n * count, -1)).view(n, count, -1)
    rotary = visual.rotary_pos_emb(hidden, places)
    for module in visual.blocks:
        block = cast(Qwen2_5_VLVisionBlock, module)
        attention = block.attn
        states = attention.qkv(block.norm1(hidden)).view(n, count, 3, attention.num_heads, -1)
        query, key, value = states.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        )
        hidden = hidden + attention.proj(mixed.transpose(1, 2).reshape(n, count, -1))
        hidden = hidden + block.mlp(block.norm2(hidden))
    return visual.merger(hidden.view(n * count, -1)).view(n, count, -1)
