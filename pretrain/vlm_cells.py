"""What stands in each cell, read off a picture's tokens: the signal that teaches the vision tower to see.

A vision tower that starts from random weights learns little from answers alone: the language model must first
guess which of its features matter. A linear map shared by all tokens, thrown away after training, asks for the
features themselves: the object whose centre is at a token's lower right corner, its place, and the background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rewards.shapes.world import BACKGROUNDS, COLORS, PLACES, SHAPES, Scene

CELLS = 3
"""Cells a side; a picture has one token more a side, and the tokens beyond hold nothing."""
_NOTHING, _UNASKED = 0, -100


@dataclass(frozen=True)
class CellLabels:
    """shapes, colors [N, P] (0: nothing, then the world's names in order), places [N, P] (of objects alone, else
    -100), backgrounds [N]."""

    shapes: Tensor
    colors: Tensor
    places: Tensor
    backgrounds: Tensor


def cell_labels(scenes: Sequence[Scene]) -> CellLabels:
    side = CELLS + 1
    shapes, colors = (torch.full((len(scenes), side, side), _NOTHING) for _ in range(2))
    places = torch.full_like(shapes, _UNASKED)
    for n, scene in enumerate(scenes):
        for item in scene.objects:
            row, column = divmod(item.cell, CELLS)
            shapes[n, row, column] = 1 + SHAPES.index(item.shape)
            colors[n, row, column] = 1 + tuple(COLORS).index(item.color)
            places[n, row, column] = item.cell
    backgrounds = torch.tensor([tuple(BACKGROUNDS).index(scene.background) for scene in scenes])
    return CellLabels(shapes.flatten(1), colors.flatten(1), places.flatten(1), backgrounds)


class CellReader(nn.Module):
    """Tokens [N, P, H] -> logits of shape, colour, place and background for each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._sizes = [1 + len(SHAPES), 1 + len(COLORS), len(PLACES), len(BACKGROUNDS)]
        self.read = nn.Linear(width, sum(self._sizes))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return self.read(tokens).split(self._sizes, dim=-1)

    def loss(self, tokens: Tensor, labels: CellLabels) -> tuple[Tensor, float]:
        """The sum of the four cross-entropies, and the share of objects of which everything is right."""
        logits = self(tokens)
        backgrounds = labels.backgrounds[:, None].expand(tokens.shape[:2])
        wanted = (labels.shapes, labels.colors, labels.places, backgrounds)
        pairs = zip(logits, wanted, strict=True)
        loss = torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in pairs]).sum()
        right = [x.argmax(-1) == y for x, y in zip(logits, wanted, strict=True)]
        return loss, torch.stack(right).all(0)[labels.shapes != _NOTHING].float().mean().item()
