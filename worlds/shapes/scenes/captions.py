"""Captions of the shapes world in GenEval's six tags, with the metadata that GenEval's rules read.

Beyond upstream's templates, counting and position captions may name colours, and any caption may name the
background, which is then one more include clause of the class `background`. The words "a photo of" are left
out: text length is most of the cost of a small model.

Split: a *core* is a caption without its background, up to order ("a circle left of a square" and "a square
right of a circle" are one core). In every family of captions a quarter of the cores, chosen by hash, is held
out, so no held-out combination of shapes, colours, relation and count is ever trained on, while each single
word is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from worlds.shapes.scenes.world import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Rng,
    Scene,
    cell_offset,
    layouts,
    place,
    sample_name,
)

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "heldout")
COUNT_WORDS = {2: "two", 3: "three"}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
DIRECTIONS = {"left of": (-2, 0), "right of": (2, 0), "above": (0, -2), "below": (0, 2)}
"""Relation to (columns, rows) from target to object; 0 stands for any."""

HELDOUT_SHARE = 4
"""One core in this many is held out."""

BACKGROUND_SHARE = 0.5
"""How often a sampled caption names the background."""


@dataclass(frozen=True)
class Caption:
    """What a caption says: `items` are (shape, colour or None); `relation` is of the first to the second."""

    tag: str
    items: tuple[tuple[str, str | None], ...]
    count: int = 1
    relation: str | None = None
    background: str | None = None

    @property
    def core(self) -> str:
        """Canonical form without the background: equal for captions that mean the same."""
        forms = [f"{'/'.join(f'{c} {s}' for s, c in self.items)} {self.count} {self.relation}"]
        if len(self.items) == 2:
            swapped = replace(
                self, items=self.items[::-1], relation=OPPOSITE[self.relation] if self.relation else None
            )
            forms.append(f"{'/'.join(f'{c} {s}' for s, c in swapped.items)} {self.count} {swapped.relation}")
        return f"{self.tag}: {min(forms)}"

    @property
    def text(self) -> str:
        if self.count > 1:
            ((shape, color),) = self.items
            words = " ".join(filter(None, (COUNT_WORDS[self.count], color, plural(shape))))
        else:
            joint = f" {self.relation or 'and'} "
            words = joint.join(noun(shape, color) for shape, color in self.items)
        return f"{words} on {self.background}" if self.background else words

    def metadata(self) -> dict[str, Any]:
        """The GenEval record: `tag`, `include`, `exclude` (counting only) and `prompt`."""
        include: list[dict[str, Any]] = []
        for shape, color in self.items:
            clause: dict[str, Any] = {"class": shape, "count": self.count}
            if color:
                clause["color"] = color
            include.append(clause)
        if self.relation:
            # As upstream: the clause that is placed refers back to the clause it is placed against.
            include.reverse()
            include[1]["position"] = [self.relation, 0]
        if self.background:
            include.append({"class": "background", "count": 1, "color": self.background})
        record: dict[str, Any] = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            record["exclude"] = [{"class": self.items[0][0], "count": self.count + 1}]
        return record | {"prompt": self.text}


def plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


def noun(shape: str, color: str | None) -> str:
    """The object with its indefinite article."""
    name = f"{color} {shape}" if color else shape
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _family(tag: str, colored: bool) -> Iterator[Caption]:
    """All captions of a tag without background, with or without colours."""
    colors: tuple[str | None, ...] = tuple(COLORS) if colored else (None,)
    if tag in ("single_object", "colors"):
        yield from (Caption(tag, ((s, c),)) for s in SHAPES for c in colors)
    elif tag == "counting":
        yield from (Caption(tag, ((s, c),), n) for s in SHAPES for c in colors for n in COUNT_WORDS)
    else:
        relations: tuple[str | None, ...] = tuple(OPPOSITE) if tag == "position" else (None,)
        pairs = itertools.product(itertools.permutations(SHAPES, 2), colors, colors, relations)
        for (first, second), c1, c2, relation in pairs:
            if tag != "color_attr" or c1 != c2:
                yield Caption(tag, ((first, c1), (second, c2)), relation=relation)


FAMILIES: dict[str, tuple[bool, ...]] = {
    "single_object": (False,),
    "two_object": (False,),
    "counting": (False, True),
    "colors": (True,),
    "position": (False, True),
    "color_attr": (True,),
}
"""For each tag, whether its captions come without (False) and with (True) colours."""


@cache
def captions(tag: str, colored: bool, split: str) -> tuple[Caption, ...]:
    """The captions of a family in a split, backgrounds apart.

    Raises ValueError for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    family = list(_family(tag, colored))
    cores = sorted({item.core for item in family}, key=lambda core: hashlib.sha256(core.encode()).hexdigest())
    heldout = set(cores[: max(1, len(cores) // HELDOUT_SHARE)])
    return tuple(item for item in family if (item.core in heldout) == (split == "heldout"))


def sample_caption(rng: np.random.Generator, split: str, tag: str | None = None) -> Caption:
    """A random caption of a split: tag (when None), family, caption and background are each drawn evenly."""
    tag = sample_name(rng, TAGS) if tag is None else tag
    families = FAMILIES[tag]
    options = captions(tag, families[int(rng.integers(len(families)))], split)
    caption = options[int(rng.integers(len(options)))]
    if rng.random() < BACKGROUND_SHARE:
        caption = replace(caption, background=sample_name(rng, BACKGROUNDS))
    return caption


@cache
def _placements(count: int, relation: str | None) -> tuple[tuple[int, ...], ...]:
    """Layouts in which the first object stands in `relation` to the second by GenEval's rule."""
    if relation is None:
        return layouts(count)
    wanted = DIRECTIONS[relation]
    return tuple(
        cells
        for cells in layouts(count)
        if all(w in (0, d) for w, d in zip(wanted, cell_offset(cells[0], cells[1]), strict=True))
    )


def scene_of(caption: Caption, rng: Rng) -> Scene:
    """A scene that shows exactly what the caption says; what it leaves open is drawn at random."""
    rng = np.random.default_rng(rng)
    items = [item for item in caption.items for _ in range(caption.count)]
    options = _placements(len(items), caption.relation)
    cells = options[int(rng.integers(len(options)))]
    objects = tuple(
        place(rng, shape, color or sample_name(rng, COLORS), cell)
        for (shape, color), cell in zip(items, cells, strict=True)
    )
    return Scene(caption.background or sample_name(rng, BACKGROUNDS), objects)


def sample_t2i(rng: Rng, split: str, tag: str | None = None) -> tuple[dict[str, Any], Scene]:
    """A GenEval metadata record (its `prompt` is the caption) and a scene that satisfies it."""
    rng = np.random.default_rng(rng)
    caption = sample_caption(rng, split, tag)
    return caption.metadata(), scene_of(caption, rng)
