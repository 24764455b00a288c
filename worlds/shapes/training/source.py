"""The shapes world as a source of pre-training data (`kind: shapes`)."""

from functools import lru_cache

import numpy as np
from PIL import Image

from pretrain.data.config import SourceConfig
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import SIZE
from worlds.shapes.training.shapes import edit_batch, t2i_batch


class ShapesSource:
    """The procedural world's training split: sample n is a function of (seed, n)."""

    known_corrupt = 0

    def __init__(self, config: SourceConfig) -> None:
        self._config = config
        self.widths = np.full(config.samples, SIZE, dtype=np.int32)
        self.heights = self.widths
        self.digest = f"shapes-{config.task}-{config.seed}-{config.samples}"
        self._drawn = lru_cache(maxsize=1024)(self._draw)

    def __len__(self) -> int:
        return self._config.samples

    def name(self, ordinal: int) -> tuple[str, str]:
        return f"shapes world, seed {self._config.seed}", str(ordinal)

    def texts(self, ordinal: int) -> tuple[str, ...]:
        return (self._drawn(ordinal)[0],)

    def pictures(self, ordinal: int) -> tuple[Image.Image, ...]:
        return self._drawn(ordinal)[1]

    def _draw(self, ordinal: int) -> tuple[str, tuple[Image.Image, ...]]:
        if self._config.task == "t2i":
            t2i = t2i_batch(self._config.seed, ordinal, 1)
            prompt, scenes = t2i.prompts[0], t2i.scenes
        else:
            edit = edit_batch(self._config.seed, ordinal, 1)
            prompt, scenes = edit.prompts[0], [edit.sources[0], edit.targets[0]]
        return prompt, tuple(Image.fromarray(picture) for picture in render_batch(scenes))
