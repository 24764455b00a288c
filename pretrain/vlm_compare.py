"""Where a picture's token is, and what was there in the picture before: asked inside the language model.

A tower without absolute positions cannot say where an empty place is; the language model can, from its multimodal
positions. Answers alone teach it that slowly, and comparing two pictures needs it at every token. A linear map,
thrown away after training, asks for it half-way up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.vision import cell_labels
from pretrain.vlm_batch import VlmBatch
from pretrain.vlm_pictures import GRID
from rewards.shapes.world import COLORS, SHAPES


class PictureComparer(nn.Module):
    """Tokens [N, P, H] -> logits of their place, and of shape and colour at that place in the first picture."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._sizes = [GRID**2, 1 + len(SHAPES), 1 + len(COLORS)]
        self.read = nn.Linear(width, sum(self._sizes))

    def loss(self, tokens: Tensor, batch: VlmBatch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the three cross-entropies, the share of tokens that know their place, and the share of the first
        pictures' objects that the second's tokens know."""
        if not batch.scenes:
            return tokens.sum() * 0.0, {}
        places, shapes, colors = self.read(tokens).split(self._sizes, dim=-1)
        own = torch.arange(GRID**2).expand(places.shape[:2])
        loss = F.cross_entropy(places.flatten(0, 1), own.flatten())
        figures = {"knows_place": (places.argmax(-1) == own).float().mean().item()}
        second = [n for n, first in enumerate(batch.first) if first is not None]
        if second:
            before = cell_labels([batch.scenes[n] for n in batch.first if n is not None])
            pairs = ((shapes[second], before.shapes), (colors[second], before.colors))
            known = before.shapes > 0
            for logits, wanted in pairs:
                loss = loss + F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
                known &= logits.argmax(-1) == wanted
            figures["knows_before"] = known.sum().item() / (before.shapes > 0).sum().item()
        return loss, figures
