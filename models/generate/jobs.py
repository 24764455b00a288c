"""What the command line and a JSONL file ask for, as pictures to make; all that is wrong is said at once.

A line is `{"prompt": ..., "image": ..., "seed": ..., "output": ...}`, all but `prompt` optional, with
`negative_prompt`, `height`, `width`, `aspect_ratio`, `longer_edge`, `steps` and `guidance` as on the command line,
which gives what a line does not. `image` is a path relative to the file, or a data URI; `metadata`, which prompt sets
of recipes have, is passed over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from core.pictures import decode_picture, is_data_uri, picture_bytes, picture_name, unchanged_bytes
from core.records import parse_lines
from core.text import broken_texts
from models.generate.task_lines import Refused, check_record, kinds_of
from models.sizes import ModelGeometry, choose_size

MAX_SEED = 2**63 - 1

SIZE_KEYS = ("height", "width", "aspect_ratio", "longer_edge")


@dataclass(frozen=True)
class Options:
    """What the command line says of every picture; a line may say otherwise."""

    seed: int = 42
    negative_prompt: str = ""
    height: int | None = None
    width: int | None = None
    aspect_ratio: str | None = None
    longer_edge: int | None = None
    steps: int = 50
    guidance: float = 3.5


LINE_KEYS: dict[str, type] = {
    "prompt": str,
    "image": str,
    "output": str,
    "metadata": dict,
    **kinds_of(Options),
}


@dataclass(frozen=True)
class Job:
    """One picture: with the model, all that decides it.

    Attributes:
        image: absolute path or data URI of the picture to edit, None for text-to-image.
        image_sha256: of the encoded file.
    """

    prompt: str
    negative_prompt: str
    image: str | None
    image_sha256: str | None
    height: int
    width: int
    steps: int
    guidance: float
    seed: int

    @property
    def alike(self) -> tuple[Any, ...]:
        """Equal for jobs that can share a forward pass."""
        return self.height, self.width, self.image is None, self.steps, self.guidance


@dataclass(frozen=True)
class Order:
    """A picture and the file that it goes to; `origin` is where it was asked for."""

    job: Job
    output: Path
    origin: str


def orders_of_line(
    prompt: str,
    image: str | None,
    output: Path,
    options: Options,
    *,
    model: ModelGeometry,
    count: int = 1,
    origin: str,
) -> list[Order]:
    """`count` pictures of one prompt, with seeds `seed`, `seed + 1` and so on; of several, each name ends in its seed.

    Raises:
        Refused: every value that is out of range, an unusable picture, sizes that cannot be made.
    """
    problems = _value_problems(prompt, output, options, count)
    size = sha256 = None
    try:
        size, sha256 = _size(image, options, model)
    except ValueError as error:
        problems.append(str(error))
    if problems or size is None:
        raise Refused(problems)
    steps, guidance, seed = options.steps, float(options.guidance), options.seed
    job = Job(prompt, options.negative_prompt, image, sha256, *size, steps, guidance, seed)
    orders = []
    for seed in range(job.seed, job.seed + count):
        path = output if count == 1 else output.with_name(f"{output.stem}_{seed}{output.suffix}")
        orders.append(Order(replace(job, seed=seed), path, origin))
    return orders


def orders_of_file(
    path: Path, folder: Path, options: Options, *, model: ModelGeometry, count: int = 1
) -> list[Order]:
    """The pictures of a JSONL file, below `folder`; without `output` a line's number in the file is its name.

    Raises:
        Refused: every bad line, as `file:line: what`, and outputs that are asked for twice.
    """
    problems: list[str] = []

    def parse(number: int, record: dict[str, Any]) -> list[Order]:
        given = {key: value for key, value in record.items() if value is not None}
        wrong = check_record(record, LINE_KEYS, ("prompt",))
        if wrong:
            raise Refused(wrong)
        return orders_of_line(
            given["prompt"],
            _image(given.get("image"), path.parent),
            folder / given.get("output", f"{number:05d}.png"),
            _line_options(given, options),
            model=model,
            count=count,
            origin=f"{path}:{number}",
        )

    orders = [order for found in parse_lines(path, parse, problems) for order in found]
    problems += list(_twice(orders))
    if problems:
        raise Refused(problems)
    return orders


def job_picture(job: Job) -> bytes | None:
    """The encoded picture to edit. Raises ValueError when it is not the one that the job was made for."""
    if job.image is None or job.image_sha256 is None:
        return None
    return unchanged_bytes(job.image, job.image_sha256)


def _line_options(given: dict[str, Any], options: Options) -> Options:
    """A line that says anything of the size takes nothing of the size from the command line."""
    if any(key in given for key in SIZE_KEYS):
        options = replace(options, height=None, width=None, aspect_ratio=None, longer_edge=None)
    names = {field.name for field in fields(Options)}
    return replace(options, **{key: value for key, value in given.items() if key in names})


def _image(image: str | None, folder: Path) -> str | None:
    return image if image is None or is_data_uri(image) else str((folder / image).absolute())


def _size(image: str | None, options: Options, model: ModelGeometry) -> tuple[tuple[int, int], str | None]:
    """Height and width, and the sha256 of the picture to edit, which is decoded whole."""
    sha256 = picture = None
    if image is not None:
        data = picture_bytes(image)
        picture = decode_picture(data, picture_name(image)).size
        sha256 = hashlib.sha256(data).hexdigest()
    given = {key: getattr(options, key) for key in SIZE_KEYS}
    try:
        return choose_size(model, **given, picture=picture), sha256
    except ValueError as error:
        raise ValueError(str(error) if image is None else f"{picture_name(image)}: {error}") from error


def _value_problems(prompt: str, output: Path, options: Options, count: int) -> list[str]:
    checks = [
        (prompt.strip() != "", "the prompt is empty"),
        (0 <= options.seed <= MAX_SEED - count, f"seed {options.seed}: must be 0 or more and below 2^63"),
        (options.steps >= 1, f"steps {options.steps}: must be 1 or more"),
        (
            math.isfinite(options.guidance) and options.guidance >= 0,
            f"guidance {options.guidance:g}: must be a number that is not negative",
        ),
        (output.suffix.lower() == ".png", f"output {output}: pictures are PNG files, so give a name in .png"),
    ]
    texts = {"prompt": prompt, "negative_prompt": options.negative_prompt, "output": str(output)}
    broken = [f"{key} {problem}" for key, problem in broken_texts(texts)]
    return broken + [message for fine, message in checks if not fine]


def _twice(orders: list[Order]) -> Iterator[str]:
    first: dict[Path, str] = {}
    for order in orders:
        path = order.output.absolute()
        if path in first:
            yield f"{order.origin}: output {order.output} is that of {first[path]} too"
        first.setdefault(path, order.origin)
