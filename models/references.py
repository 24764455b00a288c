"""What a model is shown of a prompt's reference images: one rule for what encodes them and what judges the result.

Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from models.sizes import Size, reference_sizes


def shown_references(
    pictures: Sequence[Image.Image], drawn: Size, multiple: int, budget: int | None = None
) -> list[Image.Image]:
    """The references resized (Lanczos) to their `reference_sizes`; one that has its size is returned as it is.

    Args:
        pictures: upright RGB, as `core.prompts.load_references` gives them.
        drawn: height and width in px of the picture that is drawn.

    Raises:
        ValueError: as `reference_sizes` does.
    """
    sizes = reference_sizes([(one.height, one.width) for one in pictures], drawn, multiple, budget)
    return [
        one if one.size == (width, height) else one.resize((width, height), Image.Resampling.LANCZOS)
        for one, (height, width) in zip(pictures, sizes, strict=True)
    ]
