"""What the command line and a JSONL file ask for, as pictures to make; all that is wrong is said at once.

A line is `{"prompt": ..., "image": ..., "seed": ..., "output": ...}`, all but `prompt` optional, with
`negative_prompt`, `height`, `width`, `aspect_ratio`, `longer_edge`, `reference_pixels`, `steps` and `guidance` as on
the command line, which gives what a line does not. `image` is a path relative to the file, or a data URI;
`references`, a list of them, stands in its place, the picture to edit first. `metadata`, which prompt sets of recipes
have, is passed over.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from core.pictures import decode_picture, is_data_uri, picture_bytes, picture_name, unchanged_bytes
from core.records import parse_lines
from core.text import broken_texts
from models.generate.task_lines import Refused, check_record, kinds_of
from models.sizes import ModelGeometry, Size, choose_size, reference_sizes

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
    reference_pixels: int | None = None
    steps: int = 50
    guidance: float = 3.5


LINE_KEYS: dict[str, type] = {
    "prompt": str,
    "image": str,
    "references": list,
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
        further_images, further_sha256: the same of the references after it, in order.
        reference_pixels: the budget of all references where there are several.
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
    further_images: list[str] = field(default_factory=list)
    further_sha256: list[str] = field(default_factory=list)
    reference_pixels: int | None = None

    @property
    def images(self) -> list[str]:
        """All references, the picture to edit first; empty for text-to-image."""
        return [] if self.image is None else [self.image, *self.further_images]

    @property
    def alike(self) -> tuple[Any, ...]:
        """Equal for jobs that can share a forward pass; references after the first are then the same."""
        further = (self.reference_pixels, *self.further_sha256)
        return self.height, self.width, self.image is None, self.steps, self.guidance, further


@dataclass(frozen=True)
class Order:
    """A picture and the file that it goes to; `origin` is where it was asked for."""

    job: Job
    output: Path
    origin: str


def orders_of_line(
    prompt: str,
    images: Sequence[str],
    output: Path,
    options: Options,
    *,
    model: ModelGeometry,
    count: int = 1,
    origin: str,
) -> list[Order]:
    """`count` pictures of one prompt and its references (none for text-to-image), with seeds `seed`, `seed + 1` and so
    on; of several, each name ends in its seed.

    Raises:
        Refused: every value that is out of range, an unusable picture, sizes that cannot be made.
    """
    problems = _value_problems(prompt, output, options, count)
    size, hashes = None, list[str]()
    try:
        size, hashes = _size(images, options, model)
    except ValueError as error:
        problems.append(str(error))
    if problems or size is None:
        raise Refused(problems)
    job = Job(
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        image=images[0] if images else None,
        image_sha256=hashes[0] if images else None,
        height=size[0],
        width=size[1],
        steps=options.steps,
        guidance=float(options.guidance),
        seed=options.seed,
        further_images=list(images[1:]),
        further_sha256=hashes[1:],
        reference_pixels=options.reference_pixels if len(images) > 1 else None,
    )
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
            _images(given, path.parent),
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


def job_pictures(job: Job) -> list[bytes]:
    """The encoded references. Raises ValueError for one that is not what the job was made for."""
    hashes = [] if job.image_sha256 is None else [job.image_sha256, *job.further_sha256]
    if len(job.images) != len(hashes):
        raise ValueError(
            f"{len(job.images)} references are given, and the picture was made from {len(hashes)}"
        )
    return [unchanged_bytes(image, sha256) for image, sha256 in zip(job.images, hashes, strict=True)]


def _line_options(given: dict[str, Any], options: Options) -> Options:
    """A line that says anything of the size takes nothing of the size from the command line."""
    if any(key in given for key in SIZE_KEYS):
        options = replace(options, height=None, width=None, aspect_ratio=None, longer_edge=None)
    names = {field.name for field in fields(Options)}
    return replace(options, **{key: value for key, value in given.items() if key in names})


def _images(given: dict[str, Any], folder: Path) -> list[str]:
    if "image" in given and "references" in given:
        raise ValueError(
            "keys 'image' and 'references' exclude each other: list all pictures in 'references'"
        )
    listed = given.get("references", [given["image"]] if "image" in given else [])
    if "references" in given and not listed:
        raise ValueError("key 'references' is empty: leave it out for text-to-image")
    return [image if is_data_uri(image) else str((folder / image).absolute()) for image in listed]


def _size(images: Sequence[str], options: Options, model: ModelGeometry) -> tuple[Size, list[str]]:
    """Height and width, and the sha256 of each reference, which is decoded whole."""
    pictures, hashes = [], []
    for image in images:
        data = picture_bytes(image)
        pictures.append(decode_picture(data, picture_name(image)).size)
        hashes.append(hashlib.sha256(data).hexdigest())
    given = {key: getattr(options, key) for key in SIZE_KEYS}
    try:
        size = choose_size(model, **given, picture=pictures[0] if pictures else None)
    except ValueError as error:
        raise ValueError(f"{picture_name(images[0])}: {error}" if images else str(error)) from error
    reference_sizes(
        [(height, width) for width, height in pictures], size, model.multiple, options.reference_pixels
    )
    return size, hashes


def _value_problems(prompt: str, output: Path, options: Options, count: int) -> list[str]:
    checks = [
        (prompt.strip() != "", "the prompt is empty"),
        (0 <= options.seed <= MAX_SEED - count, f"seed {options.seed}: must be 0 or more and below 2^63"),
        (
            options.reference_pixels is None or options.reference_pixels >= 1,
            f"reference_pixels {options.reference_pixels}: must be 1 or more",
        ),
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
