"""Pictures of a run: a grid of fixed prompts and seeds at each step, and the before-and-after sheet of a run.

Beside every PNG stands a JSON index with the prompt, seed, reward and place of each sample, from which a
report can cut the samples out again. Captions are drawn in Pillow's own font, which covers Latin script; the
index has the whole text of every prompt, also where the picture had to shorten it.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from core.files import atomic_write_bytes, atomic_write_json

Picture = NDArray[np.uint8]
Box = tuple[int, int, int, int]

MIN_SIDE = 128
"""Images with a shorter long side are enlarged by a whole factor, without smoothing."""
MAX_SIDE = 256
"""Images with a longer long side are shrunk to this."""
GAP = 8
PAIR_GAP = 2
LINE = 15
CAPTION_LINES = 4
PROMPT_WIDTH = 150
BACKGROUND, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


@dataclass(frozen=True)
class GallerySample:
    """One generated image, uint8 [H, W, 3], and for editing the reference it was made from.

    `reward` None means not scored.
    """

    prompt: str
    seed: int
    image: Picture
    reward: float | None
    reference: Picture | None = None

    def __post_init__(self) -> None:
        for name, picture in (("image", self.image), ("reference", self.reference)):
            if picture is None:
                continue
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
                found = f"{picture.dtype} {list(picture.shape)}"
                raise ValueError(f"{name} of {self.prompt!r} must be uint8 [H, W, 3], not {found}")


def save_grid(
    samples: Sequence[GallerySample],
    path: str | Path,
    *,
    step: int,
    stage: str,
    columns: int = 4,
    log_image: Callable[..., None] | None = None,
) -> None:
    """Draw the samples of one task in reading order to `path` (PNG), its index beside it in `.json`.

    Editing samples are drawn as pairs, reference on the left. The index is `{"step", "stage", "samples":
    [{"prompt", "seed", "reward", "box", "reference_box"}]}`, boxes in pixels x0 y0 x1 y1 of the PNG.
    `log_image` is `MetricsWriter.log_image`; the tag is the name of the folder that `path` lies in, so that a
    task's steps form one series. Raises ValueError when there is no sample.
    """
    path = Path(path)
    if not samples:
        raise ValueError(f"{path}: a grid needs at least one sample")
    image, boxes = _draw_grid(samples, columns)
    _save_png(image, path)
    index: dict[str, Any] = {"step": step, "stage": stage, "samples": []}
    for sample, (reference_box, box) in zip(samples, boxes, strict=True):
        index["samples"].append(
            {
                "prompt": sample.prompt,
                "seed": sample.seed,
                "reward": sample.reward,
                "box": box,
                "reference_box": reference_box,
            }
        )
    atomic_write_json(path.with_suffix(".json"), index)
    if log_image is not None:
        log_image(f"samples/{path.parent.name}", np.asarray(image), step=step, stage=stage)


def before_after_sheet(columns: Mapping[str, Sequence[GallerySample]], path: str | Path) -> None:
    """Draw a row per prompt and a column per moment of the run ("before", "after edit") to `path` (PNG).

    The prompt stands on the left, then the reference where the samples have one, then each moment's image
    with its reward. Raises ValueError unless every column holds the same prompts and seeds in the same order,
    since otherwise the sheet would compare different draws.
    """
    path = Path(path)
    moments = list(columns.items())
    if not moments or not moments[0][1]:
        raise ValueError(f"{path}: a sheet needs at least one column with one sample")
    first_title, first = moments[0]
    for title, samples in moments[1:]:
        if [(s.prompt, s.seed) for s in samples] != [(s.prompt, s.seed) for s in first]:
            raise ValueError(
                f"{path}: column {title!r} has other prompts or seeds than column {first_title!r}"
            )
    titles = [title for title, _ in moments]
    rows: list[list[tuple[Image.Image | None, str]]] = [
        [(_fitted(samples[row].image), _reward_text(samples[row].reward)) for _, samples in moments]
        for row in range(len(first))
    ]
    if any(sample.reference is not None for sample in first):
        titles.insert(0, "reference")
        for sample, cells in zip(first, rows, strict=True):
            cells.insert(0, (None if sample.reference is None else _fitted(sample.reference), ""))
    _save_png(_draw_sheet(titles, [sample.prompt for sample in first], rows), path)


def _draw_grid(
    samples: Sequence[GallerySample], columns: int
) -> tuple[Image.Image, list[tuple[Box | None, Box]]]:
    """The grid and, per sample, the boxes of reference and image."""
    pictures = [
        (None if sample.reference is None else _fitted(sample.reference), _fitted(sample.image))
        for sample in samples
    ]
    flat = [picture for pair in pictures for picture in pair if picture is not None]
    width, height = max(p.width for p in flat), max(p.height for p in flat)
    paired = any(reference is not None for reference, _ in pictures)
    cell = 2 * width + PAIR_GAP if paired else width
    captions = [_wrap(sample.prompt, cell, CAPTION_LINES) for sample in samples]
    cell_height = height + LINE * (1 + max(len(lines) for lines in captions))
    columns = min(columns, len(samples))
    canvas, draw = _canvas(
        GAP + columns * (cell + GAP), GAP + math.ceil(len(samples) / columns) * (cell_height + GAP)
    )
    boxes = []
    for i, (sample, (reference, picture), lines) in enumerate(zip(samples, pictures, captions, strict=True)):
        x, y = GAP + i % columns * (cell + GAP), GAP + i // columns * (cell_height + GAP)
        # Bottom edges line up, so that the text stands right under images of any aspect ratio.
        reference_box = None if reference is None else _paste(canvas, reference, x, y + height)
        boxes.append((reference_box, _paste(canvas, picture, x + cell - width, y + height)))
        _write(draw, [_reward_text(sample.reward)], x, y + height, FAINT)
        _write(draw, lines, x, y + height + LINE, INK)
    return canvas, boxes


def _draw_sheet(
    titles: list[str], prompts: list[str], rows: list[list[tuple[Image.Image | None, str]]]
) -> Image.Image:
    pictures = [picture for cells in rows for picture, _ in cells if picture is not None]
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    wrapped_titles = [_wrap(title, width, 2) for title in titles]
    top = GAP + LINE * max(len(lines) for lines in wrapped_titles)
    row_height = height + LINE + GAP
    left = 2 * GAP + PROMPT_WIDTH
    canvas, draw = _canvas(left + len(titles) * (width + GAP), top + len(rows) * row_height + GAP)
    for column, lines in enumerate(wrapped_titles):
        _write(draw, lines, left + column * (width + GAP), GAP - 2, INK)
    for row, (prompt, cells) in enumerate(zip(prompts, rows, strict=True)):
        y = top + GAP + row * row_height
        _write(draw, _wrap(prompt, PROMPT_WIDTH, max(1, height // LINE)), GAP, y, INK)
        for column, (picture, text) in enumerate(cells):
            x = left + column * (width + GAP)
            if picture is not None:
                _paste(canvas, picture, x, y + height)
            _write(draw, [text], x, y + height, FAINT)
    return canvas


def _fitted(picture: Picture) -> Image.Image:
    """The picture at a size to look at: pixels of small ones stay squares, large ones are averaged."""
    image = Image.fromarray(picture)
    side = max(image.size)
    if side < MIN_SIDE:
        factor = math.ceil(MIN_SIDE / side)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if side > MAX_SIDE:
        size = (max(1, round(image.width * MAX_SIDE / side)), max(1, round(image.height * MAX_SIDE / side)))
        return image.resize(size, Image.Resampling.LANCZOS)
    return image


def _wrap(text: str, width: int, max_lines: int) -> list[str]:
    """Break `text` into lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    font = _font()
    lines: list[str] = []
    line = ""
    for word in text.split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width:
            fits = next((n for n in range(len(word), 1, -1) if font.getlength(word[:n]) <= width), 1)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines.append(line)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        while lines[-1] and font.getlength(lines[-1] + "…") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = lines[-1].rstrip() + "…"
    return lines


@lru_cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=12)


def _reward_text(reward: float | None) -> str:
    return "not scored" if reward is None else f"reward {reward:.3f}"


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (width, height), BACKGROUND)
    return canvas, ImageDraw.Draw(canvas)


def _paste(canvas: Image.Image, picture: Image.Image, left: int, bottom: int) -> Box:
    top = bottom - picture.height
    canvas.paste(picture, (left, top))
    return (left, top, left + picture.width, bottom)


def _write(draw: ImageDraw.ImageDraw, lines: list[str], x: int, y: int, fill: tuple[int, int, int]) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * LINE), line, fill=fill, font=_font())


def _save_png(image: Image.Image, path: Path) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    atomic_write_bytes(path, buffer.getvalue())
