"""`mode: inprocess`: the same numbers from transformers, in the reward worker."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import torch
from PIL import Image

from rewards.editreward.model import load_model
from rewards.editreward.model_folder import ModelCard
from rewards.editreward.processing import EditProcessor, Encoded, InputError

log = logging.getLogger(__name__)


class LocalModel:
    """The exported model in memory, in the type it was exported in. Not for several threads at once."""

    def __init__(self, card: ModelCard, device: str, batch_size: int) -> None:
        """Loads the weights. Raises ValueError or FileNotFoundError for a folder that is not whole."""
        config = json.loads((card.folder / "config.json").read_text(encoding="utf-8"))
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self._batch_size = batch_size
        self._processor = EditProcessor(card.folder, card.settings)
        self._model = load_model(
            card.folder,
            len(card.settings.dimensions),
            dtype=getattr(torch, config["dtype"]),
            device=self.device,
        )

    def outputs(self, edits: Sequence[tuple[Image.Image, Image.Image, str]]) -> list[list[float] | None]:
        """K raw outputs for each (source, result, instruction); None for what the model cannot be shown."""
        found: list[list[float] | None] = [None] * len(edits)
        shown = [(index, encoded) for index, edit in enumerate(edits) if (encoded := self._encode(*edit))]
        for start in range(0, len(shown), self._batch_size):
            part = shown[start : start + self._batch_size]
            for (index, _), row in zip(part, self._forward([encoded for _, encoded in part]), strict=True):
                found[index] = row
        return found

    def _encode(self, source: Image.Image, result: Image.Image, instruction: str) -> Encoded | None:
        try:
            return self._processor.encode(source, result, instruction)
        except InputError as error:
            log.warning("editreward: the edit %r is not scored: %s", instruction[:80], error)
            return None

    @torch.no_grad()
    def _forward(self, samples: list[Encoded]) -> list[list[float] | None]:
        raw = self._model(self._processor.collate(samples).to(self.device)).cpu()
        finite = torch.isfinite(raw).all(1).tolist()
        if not all(finite):
            log.warning("editreward: %d edits have outputs that are not finite", finite.count(False))
        return [row if fine else None for row, fine in zip(raw.tolist(), finite, strict=True)]
