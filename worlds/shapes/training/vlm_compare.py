"""What stood at a token's place in the picture before: asked inside the language model.

To judge an edit is to compare two pictures place by place. Answers alone teach it slowly: one word speaks for
thirty-two tokens. A linear map, thrown away after training, asks every token of a second picture for it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worlds.shapes.scenes.world import COLORS, SHAPES
from worlds.shapes.training.vision import cell_labels
from worlds.shapes.training.vlm_batch import VlmBatch


class PictureComparer(nn.Module):
    """Tokens [N, P, H] -> logits of shape and colour at the same place in the first picture, and of a difference."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._sizes = [1 + len(SHAPES), 1 + len(COLORS), 2]
        self.read = nn.Linear(width, sum(self._sizes))

    def loss(self, tokens: Tensor, batch: VlmBatch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the three cross-entropies over the tokens of second pictures, and the share of the objects, gone
        or come, of which a difference is seen."""
        second = [n for n, first in enumerate(batch.first) if first is not None]
        if not second:
            return tokens.sum() * 0.0, {}
        now = cell_labels([batch.scenes[n] for n in second])
        before = cell_labels([batch.scenes[n] for n in batch.first if n is not None])
        differs = (now.shapes != before.shapes) | (now.colors != before.colors)
        wanted = (before.shapes, before.colors, differs.long())
        logits = self.read(tokens[second]).split(self._sizes, dim=-1)
        pairs = zip(logits, wanted, strict=True)
        loss = torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in pairs]).sum()
        seen = logits[-1].argmax(-1)[differs].float()
        return loss, {"differences_seen": seen.mean().item()} if len(seen) else {}
