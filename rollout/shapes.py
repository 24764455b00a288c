"""At which size a prompt's pictures are drawn and its references shown: what may share a batch. Needs no torch.

Sizes are (height, width) in px.
"""

from __future__ import annotations

import logging
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from core.pictures import upright_size
from core.prompts import Prompt
from core.seeds import derive_seed
from models.sizes import ModelGeometry, Size, check_size, geometry, longer_edge_size, reference_sizes

log = logging.getLogger(__name__)


class UnreadableError(ValueError):
    """A reference whose size cannot be read."""


@dataclass(frozen=True, order=True)
class Shape:
    """The size of the pictures that are drawn, and that at which each reference is shown."""

    size: Size
    references: tuple[Size, ...] = ()

    @property
    def pixels(self) -> int:
        """Of a picture and its references together."""
        return sum(height * width for height, width in (self.size, *self.references))


@dataclass(frozen=True)
class ShapeRule:
    """How sizes are chosen. A prompt's own `size` comes first, then for edits `longer_edge` in the proportions of the
    first reference, for text-to-image a draw among `choices`; else it is `fixed`.

    Attributes:
        folder: of the model, whose configs say which sizes it makes.
        weights: of the choices.
        reference_pixels: of all references of a prompt together.
    """

    folder: Path
    fixed: Size
    choices: tuple[Size, ...] = ()
    weights: tuple[float, ...] = ()
    longer_edge: int | None = None
    reference_pixels: int | None = None

    def possible(self, prompt: Prompt) -> tuple[Shape, ...]:
        """All shapes that the prompt may have, from the heads of its pictures. Raises UnreadableError for one, and
        ValueError where no size can be chosen."""
        if not prompt.references:
            sizes = (self.fixed,) if prompt.task == "edit" else self.choices or (self.fixed,)
            return tuple(map(Shape, sizes if prompt.size is None else (prompt.size,)))
        size = prompt.size or self.fixed
        if prompt.size is None and self.longer_edge is not None:
            height, width = _upright(prompt.references[0])
            try:
                size = longer_edge_size(width, height, self.longer_edge, self._model.step)
            except ValueError as error:
                raise ValueError(f'{error}, as "size": [height, width] of the line') from error
        if len(prompt.references) == 1:
            return (Shape(size, (size,)),)
        pictures = [_upright(source) for source in prompt.references]
        shown = reference_sizes(pictures, size, self._model.multiple, self.reference_pixels)
        return (Shape(size, tuple(shown)),)

    def check(self, prompt: Prompt) -> None:
        """Raise as `possible` does, and ValueError for a size that the model cannot make."""
        for shape in self.possible(prompt):
            for size in dict.fromkeys((shape.size, *shape.references)):
                check_size(self._model, *size)

    def of(self, prompt: Prompt, *draw: int | str) -> Shape:
        """The shape for one drawing of the prompt, a pure function of prompt and `draw`. Pictures that cannot be read
        are left to the encoder, which fails this prompt alone."""
        try:
            shapes = self.possible(prompt)
        except ValueError as error:
            log.warning("%s has no size of its own: %s", prompt.name, error)
            size = prompt.size or self.fixed
            return Shape(size, (size,) * len(prompt.references))
        if len(shapes) == 1:
            return shapes[0]
        return random.Random(derive_seed("size", *draw)).choices(shapes, self.weights or None)[0]

    @property
    def _model(self) -> ModelGeometry:
        try:
            return _geometry(self.folder)
        except (OSError, KeyError) as error:
            raise ValueError(f"{self.folder} does not say which sizes it makes: {error}") from error


_geometry = lru_cache(geometry)


@lru_cache(maxsize=2**17)
def _upright(source: str) -> Size:
    """`upright_size`, once a picture. Raises UnreadableError."""
    try:
        return upright_size(source)
    except ValueError as error:
        raise UnreadableError(str(error)) from error
