"""Prompt sets as JSONL.

A text-to-image line is `{"prompt": ..., "metadata": {...}}`; an editing line adds `"image"`, a path relative
to the file or a `data:image/png;base64,` URI. Every other top-level key joins the metadata, so official
GenEval files load unchanged.
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
"""References of other proportions that are named."""
_DATA_URI = "data:image/"


class PromptFileError(ValueError):
    """A prompt file has bad lines; `problems` holds one `file:line: what` entry for each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt set. `reference` is an absolute path or a data URI (editing), else None; `origin` is the
    `file:line` that it was read from, for messages.
    """

    index: int
    task: Task
    prompt: str
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
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
    metadata = record.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"key 'metadata' must be an object, found {type(metadata).__name__}")
    image = record.pop("image", None)
    if task == "t2i" and image is not None:
        raise ValueError("key 'image' belongs to editing prompts; this set is used for text-to-image")
    reference = None if task == "t2i" else _reference(image, folder)
    return Prompt(0, task, text, reference, {**record, **metadata})


def _reference(image: object, folder: Path) -> str:
    if not isinstance(image, str) or not image:
        raise ValueError("key 'image' must name the reference image (a path or a data URI)")
    if image.startswith(_DATA_URI):
        return image
    path = (folder / image).absolute()
    if not path.is_file():
        raise ValueError(f"reference image {path} does not exist")
    return str(path)


def load_reference(prompt: Prompt) -> Image.Image:
    """The reference image as upright RGB, transparency over white. Raises ValueError naming an unusable image."""
    from core.pictures import picture_name, read_picture

    if prompt.reference is None:
        raise ValueError(f"{prompt.name} ({prompt.prompt!r}) has no reference image")
    shown = picture_name(prompt.reference)
    return read_picture(prompt.reference, f"reference image {shown} of {prompt.name}")


def reference_problems(
    prompts: Sequence[Prompt], drawn: tuple[int, int] | None, keys: str
) -> tuple[list[str], list[str]]:
    """References that cannot be read, and those of other proportions than the pictures that are drawn: the policy is
    shown them at that size, and rewards as they are. Reads every picture.

    Args:
        drawn: width and height in px, None where they are not known.
        keys: which keys of the recipe set them.
    """

    def size_of(prompt: Prompt) -> tuple[int, int] | str:
        try:
            return load_reference(prompt).size
        except ValueError as error:
            return str(error)

    unreadable, squashed = [], []
    with ThreadPoolExecutor() as readers:
        for prompt, size in zip(prompts, readers.map(size_of, prompts), strict=True):
            if isinstance(size, str):
                unreadable.append(size)
            # One side is off by a pixel or more where the other fits.
            elif drawn and abs(size[0] * drawn[1] - size[1] * drawn[0]) >= min(size):
                squashed.append(
                    f"{prompt.name}: its reference image is {size[0]} x {size[1]} px (width x height) and pictures are "
                    f"drawn at {drawn[0]} x {drawn[1]}: the policy would see it squashed, the reward as it is; crop or "
                    f"pad it to these proportions, or set {keys} to its own"
                )
    more = len(squashed) - MOST_SHAPES
    return unreadable, squashed[:MOST_SHAPES] + [f"and {more} references more of other proportions"] * (
        more > 0
    )
