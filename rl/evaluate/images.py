"""The pictures of an evaluation on disk: in the benchmark's own layout, none of them ever made twice.

A batch counts as generated from the moment its one file is in `spool/`; from there its pictures are laid out, and
the file goes. A kill in between leaves the file, and the next start lays it out.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from core.files import atomic_write_bytes, file_sha256
from rewards.benchmarks.items import Item
from rewards.benchmarks.layouts import Layout, Picture
from rl.evaluate.plan import Batch

log = logging.getLogger(__name__)


class ImageStore:
    """Pictures below `folder`; `spool` None for pictures of somebody else, to which nothing is added."""

    def __init__(self, layout: Layout, folder: Path, count: int, spool: Path | None):
        self.layout, self.folder, self.count, self.spool = layout, folder, count, spool
        self._hashes: dict[Path, str] = {}

    def recover(self, batches: Sequence[Batch]) -> None:
        """Lay out what a killed run had generated. `batches` by index."""
        if self.spool is None or not self.spool.is_dir():
            return
        for path in sorted(self.spool.glob("[0-9]*.npz")):
            self._lay_out(batches[int(path.stem)], path)
            log.info("laid out batch %s, which an earlier run had generated", path.stem)

    def pictures(self, item: Item) -> list[Picture | None]:
        """`count` entries, None for what is absent."""
        return self.layout.find(self.folder, item, self.count)

    def lacks(self, batch: Batch) -> bool:
        """Whether any picture of the batch is absent."""
        return any(None in self.pictures(item) for item in batch.items)

    def commit(self, batch: Batch, images: np.ndarray) -> None:
        """Keep a generated batch, uint8 [items * count, H, W, 3] in the order of its items."""
        if self.spool is None:
            raise ValueError(f"{self.folder} holds somebody else's pictures; none are added to it")
        wanted = len(batch.items) * self.count
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) != wanted:
            raise ValueError(
                f"batch {batch.index} needs uint8 [{wanted}, H, W, 3], got {images.dtype} {images.shape}"
            )
        buffer = io.BytesIO()
        np.savez(buffer, images=images)
        path = self.spool / f"{batch.index:06d}.npz"
        atomic_write_bytes(path, buffer.getvalue())
        self._lay_out(batch, path)

    def sha256(self, picture: Picture) -> str:
        """Of the file; a grid's quarters have that of the grid."""
        if picture.path not in self._hashes:
            self._hashes[picture.path] = file_sha256(picture.path)
        return self._hashes[picture.path]

    def _lay_out(self, batch: Batch, path: Path) -> None:
        with np.load(path, allow_pickle=False) as stored:
            images = stored["images"]
        for place, item in enumerate(batch.items):
            mine = images[place * self.count : (place + 1) * self.count]
            self.layout.write(self.folder, item, [Image.fromarray(image) for image in mine])
        path.unlink()
