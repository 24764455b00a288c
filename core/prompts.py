"""Prompt sets as JSONL.

A text-to-image line is `{"prompt": ..., "metadata": {...}}`; an editing line adds `"image"`, a path relative to the
file or a `data:image/png;base64,` URI, or `"references"`, a list of them in the order in which the prompt speaks of
them. `"size": [height, width]` in px is that of the pictures drawn for this line. Every other top-level key joins the
metadata, so official GenEval files load unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.records import parse_lines

if TYPE_CHECKING:
    from PIL import Image

Task = Literal["t2i", "edit"]
TASKS: tuple[Task, ...] = ("edit", "t2i")
MOST_SHAPES = 5
"""Lines that are named whose references or sizes do not do."""
_DATA_URI = "data:image/"


class PromptFileError(ValueError):
    """A prompt file has bad lines; `problems` holds one `file:line: what` entry for each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt set. `references` are absolute paths or data URIs, one or more for editing, else none; the
    first is the picture to edit. `size`: height and width in px that the line asks for. `origin` is the `file:line`
    that it was read from, for messages.
    """

    index: int
    task: Task
    prompt: str
    references: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    origin: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """What messages call it: file and line, or its place where it came from no file."""
        return self.origin or f"prompt {self.index}"


def load_prompts(path: str | Path, task: Task) -> list[Prompt]:
    """Read a prompt set; raises `PromptFileError` with every bad line as `file:line: problem`."""
    problems: list[str] = []
    folder = Path(path).parent
    prompts = parse_lines(
        Path(path),
        lambda line, record: replace(_parse_record(record, task, folder), origin=f"{path}:{line}"),
        problems,
        what="prompts",
    )
    if problems:
        raise PromptFileError(problems)
    return [replace(prompt, index=index) for index, prompt in enumerate(prompts)]


def _parse_record(record: dict[str, Any], task: Task, folder: Path) -> Prompt:
    text = record.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("key 'prompt' must be a non-empty string")
    size = _size(record.pop("size", None))
    metadata = record.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"key 'metadata' must be an object, found {type(metadata).__name__}")
    given: dict[str, Any] = {key: record.pop(key) for key in ("image", "references") if key in record}
    if task == "t2i" and given:
        raise ValueError(
            f"key {next(iter(given))!r} belongs to editing prompts; this set is used for text-to-image"
        )
    references = () if task == "t2i" else _references(given, folder)
    return Prompt(0, task, text, references, {**record, **metadata}, size)


def _references(given: dict[str, Any], folder: Path) -> tuple[str, ...]:
    if len(given) == 2:
        raise ValueError(
            "keys 'image' and 'references' exclude each other: list all pictures in 'references'"
        )
    if "references" not in given:
        return (_reference("key 'image'", given.get("image"), folder),)
    listed = given["references"]
    if not isinstance(listed, list) or not listed:
        raise ValueError("key 'references' must be a list of one or more pictures (paths or data URIs)")
    return tuple(_reference(f"references[{i}]", one, folder) for i, one in enumerate(listed))


def _reference(key: str, image: object, folder: Path) -> str:
    if not isinstance(image, str) or not image:
        raise ValueError(f"{key} must name the reference image (a path or a data URI)")
    if image.startswith(_DATA_URI):
        return image
    path = (folder / image).absolute()
    if not path.is_file():
        raise ValueError(f"reference image {path} does not exist")
    return str(path)


def _size(size: object) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = size if isinstance(size, list) else []
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"key 'size' is {size!r}: write [height, width] in pixels")
    return sides[0], sides[1]


def load_references(prompt: Prompt) -> list[Image.Image]:
    """The reference images as upright RGB, transparency over white, as large as they are. Raises ValueError naming an
    unusable one."""
    from core.pictures import picture_name, read_picture

    return [
        read_picture(source, f"reference image {picture_name(source)} of {prompt.name}")
        for source in prompt.references
    ]


def reference_problems(
    prompts: Sequence[Prompt], drawn: tuple[int, int] | None, remedy: str
) -> tuple[list[str], list[str]]:
    """References that cannot be read, and pictures to edit of other proportions than those that are drawn, where the
    line does not ask for its size: they would be squashed. Reads every picture.

    Args:
        drawn: width and height in px, None where they are not known, or chosen for each picture.
        remedy: what to do about the second kind, beside changing the picture.
    """

    def size_of(prompt: Prompt) -> tuple[int, int] | str:
        try:
            return load_references(prompt)[0].size
        except ValueError as error:
            return str(error)

    unreadable, squashed = [], []
    with ThreadPoolExecutor() as readers:
        for prompt, size in zip(prompts, readers.map(size_of, prompts), strict=True):
            if isinstance(size, str):
                unreadable.append(size)
            # One side is off by a pixel or more where the other fits.
            elif drawn and prompt.size is None and abs(size[0] * drawn[1] - size[1] * drawn[0]) >= min(size):
                squashed.append(
                    f"{prompt.name}: its reference image is {size[0]} x {size[1]} px (width x height) and pictures are "
                    f"drawn at {drawn[0]} x {drawn[1]}, so it would be squashed: crop or pad it to these proportions, "
                    f"or {remedy}"
                )
    return unreadable, few(squashed, "references more of other proportions")


def few(problems: list[str], what: str) -> list[str]:
    """The first `MOST_SHAPES`, and how many more there are."""
    more = len(problems) - MOST_SHAPES
    return problems[:MOST_SHAPES] + [f"and {more} {what}"] * (more > 0)
