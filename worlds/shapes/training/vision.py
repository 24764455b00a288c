"""Stage `vision`: the vision tower of a small Qwen2.5-VL on pictures of the shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from core.seeds import numpy_generator
from core.training.randomness import torch_generator
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene
from worlds.shapes.training.config import VisionRecipe
from worlds.shapes.training.stage import StageLoss
from worlds.shapes.training.vlm_model import vision_config, vision_features
from worlds.shapes.training.vlm_pictures import GRID, shown
from worlds.shapes.training.vlm_questions import scene_of_split

_SCENES, _NOISE = 107, 108
_PROBE_STEP = 1 << 30
_CHUNK = 250
_CELLS = 3
_CODE_SEED = 0
_NOTHING, _UNASKED = 0, -100


class VisionStage:
    """Each token tells the object whose centre is at its lower right corner, that object's place, and the background.

    A tower that starts from random weights learns little from answers alone: the language model must first guess
    which of its features matter. A linear map shared by all tokens, thrown away after training, asks for the
    features themselves.
    """

    def __init__(self, recipe: VisionRecipe) -> None:
        self.recipe = recipe
        self.visual = Qwen2_5_VisionTransformerPretrainedModel(vision_config(recipe.model))
        self.codes = CellCodes(recipe.model.token_width)
        self.modules: list[nn.Module] = [self.visual, self.codes]

    def loss(self, step: int) -> StageLoss:
        loss, right = self._read(step, self.recipe.batch_size, "train")
        return StageLoss(loss, {"cells_right": right})

    def sample_grid(self) -> None:
        """There is nothing to look at."""

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
