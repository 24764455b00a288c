"""The inverse of the grammars of `edits.py` and `captions.py`: from words back to the structured edit or caption.

A judge is given words and pictures, no metadata; so the edit is read from the instruction and the source scene.
A colour may be left out where the shape alone names one object, and "a" may stand before a background.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace

from worlds.shapes.scenes.captions import COUNT_WORDS, OPPOSITE, Caption
from worlds.shapes.scenes.edits import Edit, moved
from worlds.shapes.scenes.world import BACKGROUNDS, COLORS, GRID, PLACES, SHAPES, Scene, Shape, free_of


class UnknownRequest(ValueError):
    """Words outside the grammar, or about an object that the source does not show."""


def _any(names: Iterable[str]) -> str:
    return "|".join(sorted(names, key=len, reverse=True))


_COLOR, _SHAPE, _GROUND, _PLACE = map(_any, (COLORS, SHAPES, BACKGROUNDS, PLACES))
_THE = rf"the (?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE})"
_A = rf"an? (?P<new_color>{_COLOR}) (?P<new_shape>{_SHAPE})"
_THING = rf"an? (?:(?P<color{{0}}>{_COLOR}) )?(?P<shape{{0}}>{_SHAPE})"
_CAPTION = re.compile(
    rf"(?:(?P<count>{_any(COUNT_WORDS.values())}) (?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE})e?s"
    rf"|{_THING.format(1)}(?: (?P<joint>and|{_any(OPPOSITE)}) {_THING.format(2)})?)"
    rf"(?: on (?:an? )?(?P<ground>{_GROUND})(?: background)?)?"
)


def parse_caption(text: str) -> Caption:
    """The caption that says this. Raises UnknownRequest."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        raise UnknownRequest(f"{text!r} is not a caption of the shapes world")
    ground, joint = match["ground"], match["joint"]
    if match["count"]:
        count = next(number for number, word in COUNT_WORDS.items() if word == match["count"])
        return Caption("counting", ((match["shape"], match["color"]),), count, background=ground)
    items = [(match["shape1"], match["color1"])]
    if joint:
        items.append((match["shape2"], match["color2"]))
    if joint in OPPOSITE:
        return Caption("position", tuple(items), relation=joint, background=ground)
    colored = any(color for _, color in items)
    tag = ("color_attr" if colored else "two_object") if joint else ("colors" if colored else "single_object")
    return Caption(tag, tuple(items), background=ground)


def parse_edit(text: str, source: Scene) -> Edit:
    """The edit that the instruction asks for on this scene.

    A stated place of a new object is its cell's centre, from which the one that was drawn is half a pixel off at
    most; an open one is the first free cell. Raises UnknownRequest.
    """
    for pattern, read in _FORMS:
        match = pattern.fullmatch(text.strip())
        if match is not None:
            return read(match, source)
    raise UnknownRequest(f"{text!r} is not an edit instruction of the shapes world")


def _background(match: re.Match[str], source: Scene) -> Edit:
    return Edit("background", background=match["ground"])


def _recolour(match: re.Match[str], source: Scene) -> Edit:
    index, item = _named(match, source)
    return Edit("recolour", index, replace(item, color=match["to"]))


def _replace(match: re.Match[str], source: Scene) -> Edit:
    index, item = _named(match, source)
    return Edit("replace", index, replace(item, shape=match["new_shape"], color=match["new_color"]))


def _remove(match: re.Match[str], source: Scene) -> Edit:
    return Edit("remove", _named(match, source)[0])


def _move(match: re.Match[str], source: Scene) -> Edit:
    index, item = _named(match, source)
    return Edit("move", index, moved(item, PLACES.index(match["place"])))


def _add(match: re.Match[str], source: Scene) -> Edit:
    taken = [item.cell for item in source.objects]
    free = (cell for cell in range(len(PLACES)) if free_of(cell, taken))
    cell = PLACES.index(match["place"]) if match["place"] else next(free, None)
    if cell is None:
        raise UnknownRequest("the source has no room for another object")
    item = Shape(match["new_shape"], match["new_color"], GRID[cell % 3], GRID[cell // 3])
    return Edit("add", result=item, anywhere=match["place"] is None)


_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], Scene], Edit]], ...] = (
    (re.compile(rf"make the background (?P<ground>{_GROUND})"), _background),
    (re.compile(rf"make {_THE} (?P<to>{_COLOR})"), _recolour),
    (re.compile(rf"replace {_THE} with {_A}"), _replace),
    (re.compile(rf"remove {_THE}"), _remove),
    (re.compile(rf"move {_THE} to the (?P<place>{_PLACE})"), _move),
    (re.compile(rf"add {_A}(?: at the (?P<place>{_PLACE}))?"), _add),
)


def _named(match: re.Match[str], source: Scene) -> tuple[int, Shape]:
    """The one object of the source that the words mean, and its index."""
    color, shape = match["color"], match["shape"]
    meant = [
        (index, item)
        for index, item in enumerate(source.objects)
        if item.shape == shape and color in (None, item.color)
    ]
    if len(meant) != 1:
        words = f"{color} {shape}" if color else shape
        raise UnknownRequest(f"the source shows {len(meant)} objects that are a {words}, where one is meant")
    return meant[0]
