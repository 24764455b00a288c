"""Prompt sets as JSONL.

A text-to-image line is `{"prompt": ..., "metadata": {...}}`; an editing line adds `"image"`, a path relative
to the file or a `data:image/png;base64,` URI. Every other top-level key joins the metadata, so official
GenEval files load unchanged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL import Image


Task = Literal["t2i", "edit"]


TASKS: tuple[Task, ...] = ("edit", "t2i")


_DATA_URI = "data:image/"


class PromptFileError(ValueError):
    """A prompt file has bad lines; `problems` holds one `file:line: what` entry for each."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt set. `reference` is an absolute path or a data URI (editing), else None."""

    index: int
    task: Task
    prompt: str
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def load_prompts(path: str | Path, task: Task) -> list[Prompt]:
    """Read a prompt set; raises `PromptFileError` with every bad line as `file:line: problem`."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON strings may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise PromptFileError([f"{path}: cannot be read ({error})"]) from error
    prompts: list[Prompt] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_parse_line(line, len(prompts), task, path.parent))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if not prompts and not problems:
        problems.append(f"{path}: holds no prompts")
    if problems:
        raise PromptFileError(problems)
    return prompts


def _parse_line(line: str, index: int, task: Task, folder: Path) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    text = record.pop("prompt", None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError("key 'prompt' must be a non-empty string")
    metadata = record.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise ValueError(f"key 'metadata' must be an object, found {type(metadata).__name__}")
    image = record.pop("image", None)
    if task == "t2i":
        if image is not None:
            raise ValueError("key 'image' belongs to editing prompts; this set is used for text-to-image")
        reference = None
    else:
        reference = _reference(image, folder)
    return Prompt(index, task, text, reference, {**record, **metadata})


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
        raise ValueError(f"prompt {prompt.index} ({prompt.prompt!r}) has no reference image")
    shown = picture_name(prompt.reference)
    return read_picture(prompt.reference, f"reference image {shown} of prompt {prompt.index}")
