"""What a generated PNG says of itself: one tEXt chunk of JSON from which the same picture can be made again.

The keys of `DECIDING` decide the picture; the others say where the parts were and on what it was made. Two pictures
with the same deciding keys are the same but for rounding on another device, library or number of threads.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from core.records import Record, json_object
from models.generate.jobs import Job
from models.generate.task_lines import check_record, kinds_of

KEY = "unipic-rl"

PLACES: dict[str, type] = {"model": str, "vlm": str, "adapter": str}
MADE_ON: dict[str, type] = {"device": str, "threads": int, "batch": int, "version": str, "libraries": dict}
WEIGHTS: dict[str, type] = {
    "model_sha256": str,
    "vlm_sha256": str,
    "adapter_sha256": str,
    "dtype": str,
    "max_sequence_length": int,
    "position_mode": str,
}
_JOB = kinds_of(Job)
DECIDING = tuple(key for key in (*_JOB, *WEIGHTS) if key not in ("image", "further_images"))
_MAY_BE_NULL = set(
    [
        "image",
        "image_sha256",
        "reference_pixels",
        "vlm",
        "vlm_sha256",
        "adapter",
        "adapter_sha256",
        "max_sequence_length",
        "position_mode",
    ]
)
_ONE_REFERENCE: Record = {"further_images": [], "further_sha256": [], "reference_pixels": None}
"""What a record says that was written before there were several."""


def png_bytes(pixels: np.ndarray, record: Record) -> bytes:
    """uint8 H W 3 as a PNG file that carries the record."""
    info = PngInfo()
    info.add_text(KEY, json.dumps(record, sort_keys=True))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_record(path: Path) -> Record:
    """The record that a PNG carries, checked; the pixels are decoded too, so that a damaged file is found.

    Raises:
        ValueError: naming a file that is damaged, or that carries no whole record.
    """
    try:
        with Image.open(path) as image:
            image.load()
            found = getattr(image, "text", {}).get(KEY)
    except Exception as error:  # on damaged files PIL's decoders raise more than they document
        raise ValueError(f"{path}: not a readable PNG ({error})") from error
    if found is None:
        raise ValueError(
            f"{path}: says nothing of how it was made (no {KEY!r} text), so it was not made here"
        )
    try:
        record = _ONE_REFERENCE | json_object(found)
    except ValueError as error:
        raise ValueError(f"{path}: its {KEY!r} text cannot be used: {error}") from error
    kinds = _JOB | WEIGHTS | PLACES | MADE_ON
    problems = check_record(record, kinds, [key for key in kinds if key not in _MAY_BE_NULL])
    problems += [f"key {key!r} is missing" for key in sorted(_MAY_BE_NULL - record.keys())]
    if problems:
        raise ValueError(f"{path}: its {KEY!r} text cannot be used: {'; '.join(problems)}")
    return record


def differences(found: Record, wanted: Record) -> list[str]:
    """The deciding keys in which two records differ, each with both values."""
    return [
        f"{key} {found[key]!r:.60}, now {wanted[key]!r:.60}" for key in DECIDING if found[key] != wanted[key]
    ]
