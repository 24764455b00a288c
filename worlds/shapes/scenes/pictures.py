"""PIL pictures as the arrays that both scorers of the shapes world read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from worlds.shapes.scenes.world import SIZE


def stack(images: Sequence[Image.Image]) -> np.ndarray:
    """Pictures as uint8 [B, H, W, 3]. Raises ValueError for a size that is not the world's."""
    for index, image in enumerate(images):
        if image.size != (SIZE, SIZE):
            raise ValueError(
                f"image {index} is {image.width} x {image.height} px, the shapes world {SIZE} x {SIZE}; "
                "set the recipe's height and width to that"
            )
    if not images:
        return np.empty((0, SIZE, SIZE, 3), np.uint8)
    return np.stack([np.asarray(image.convert("RGB"), np.uint8) for image in images])
