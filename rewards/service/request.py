"""Checks a request to the last byte and makes a `RewardBatch` of it. Runs in the service only."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rewards.calling import RewardBatch
from rewards.service.wire import Call, WireError, split_frame

LARGEST_SIDE = 8192
MOST_SAMPLES, MOST_REFERENCES, MOST_PICTURES = 1024, 16, 4096
MOST_REASONS = 10
LONGEST_REASON = 200

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class Picture(BaseModel):
    """One picture of the frame: how it is coded, its size in pixels, and how many bytes it takes up."""

    model_config = _STRICT
    codec: Literal["png", "raw"]
    width: int = Field(ge=1, le=LARGEST_SIDE)
    height: int = Field(ge=1, le=LARGEST_SIDE)
    bytes: int = Field(ge=1)

    @property
    def decoded_bytes(self) -> int:
        return self.width * self.height * 3


class Header(BaseModel):
    """The JSON of a frame. `images` and `references` hold numbers of `pictures`, one entry per sample; `sources` hold
    numbers of `addresses`, those of the references, for a reward that asks for them."""

    model_config = _STRICT
    fingerprint: str = Field(max_length=64)
    timeout_s: float = Field(gt=0, le=86400, allow_inf_nan=False)
    prompts: list[str] = Field(min_length=1, max_length=MOST_SAMPLES)
    metadata: list[dict[str, Any]] = Field(max_length=MOST_SAMPLES)
    images: list[int] = Field(max_length=MOST_SAMPLES)
    references: list[Annotated[list[int], Field(max_length=MOST_REFERENCES)]] = Field(max_length=MOST_SAMPLES)
    addresses: list[str] = Field([], max_length=MOST_PICTURES)
    sources: list[Annotated[list[int], Field(max_length=MOST_REFERENCES)]] | None = Field(
        None, max_length=MOST_SAMPLES
    )
    pictures: list[Picture] = Field(min_length=1, max_length=MOST_PICTURES)


def decode_request(body: bytes | bytearray, largest_decoded: int) -> tuple[Call, RewardBatch]:
    """The batch of a frame. Raises WireError with every reason found.

    `largest_decoded`: bytes that all pictures together may take once decoded, which is what keeps a small PNG
    from growing into gigabytes. Samples that share a picture share the image object.
    """
    raw, rest = split_frame(body)
    _check_counts(raw)
    try:
        header = Header.model_validate(raw)
    except ValidationError as error:
        raise WireError([_reason(entry) for entry in error.errors()[:MOST_REASONS]]) from None
    problems = list(_problems(header, len(rest), largest_decoded))
    if problems:
        raise WireError(problems)
    pictures = _decode_pictures(header.pictures, rest)
    batch = RewardBatch(
        images=[pictures[number] for number in header.images],
        prompts=header.prompts,
        references=[[pictures[number] for number in numbers] for numbers in header.references],
        metadata=header.metadata,
        sources=None
        if header.sources is None
        else [[header.addresses[number] for number in row] for row in header.sources],
    )
    return Call(header.fingerprint, header.timeout_s), batch


def _reason(error: Any) -> str:
    """Where and what, without the value; a key may be as large as the request, too."""
    where = ".".join(str(part)[:LONGEST_REASON] for part in error["loc"]) or "header"
    return f"{where[:LONGEST_REASON]}: {error['msg']}"


def _check_counts(raw: Any) -> None:
    """Raises WireError. Pydantic makes an error of every entry that is wrong, at a hundred times the entry's size."""
    header = raw if isinstance(raw, dict) else {}
    lists = [value for value in header.values() if isinstance(value, list)]
    pictures = header.get("pictures")
    entries = [entry for entry in pictures if isinstance(entry, dict)] if isinstance(pictures, list) else []
    if any(len(value) > MOST_PICTURES for value in lists) or any(
        len(entry) > len(Header.model_fields) + MOST_REASONS for entry in [header, *entries[:MOST_PICTURES]]
    ):
        raise WireError([f"header: more than {MOST_SAMPLES} samples, or keys that this format does not have"])


def _problems(header: Header, rest: int, largest_decoded: int) -> Iterator[str]:
    lists = ("prompts", "metadata", "images", "references")
    counts = {name: len(getattr(header, name)) for name in lists}
    if header.sources is not None:
        counts["sources"] = len(header.sources)
    if len(set(counts.values())) != 1:
        yield f"every list needs one entry per sample, got {counts}"
    used = {*header.images, *chain.from_iterable(header.references)}
    if used != set(range(len(header.pictures))):
        yield f"images and references must use exactly the pictures 0 to {len(header.pictures) - 1}"
    if {*chain.from_iterable(header.sources or ())} != set(range(len(header.addresses))):
        yield "sources must use exactly the addresses that are there"
    for number, picture in enumerate(header.pictures):
        if picture.codec == "raw" and picture.bytes != picture.decoded_bytes:
            yield f"pictures.{number}: raw RGB of {picture.width}x{picture.height} takes {picture.decoded_bytes} bytes"
    sent = sum(picture.bytes for picture in header.pictures)
    if sent != rest:
        yield f"pictures take {sent} bytes by the header, {rest} were sent"
    decoded = sum(picture.decoded_bytes for picture in header.pictures)
    if decoded > largest_decoded:
        yield f"pictures would take {decoded} bytes once decoded, at most {largest_decoded} are allowed"


def _decode_pictures(pictures: Sequence[Picture], rest: memoryview) -> list[Image.Image]:
    images, start = [], 0
    for number, picture in enumerate(pictures):
        blob = rest[start : start + picture.bytes]
        start += picture.bytes
        size = (picture.width, picture.height)
        images.append(
            Image.frombytes("RGB", size, bytes(blob))
            if picture.codec == "raw"
            else _decode_png(blob, size, f"pictures.{number}")
        )
    return images


def _decode_png(blob: memoryview, size: tuple[int, int], where: str) -> Image.Image:
    """Size and mode are read from the file's head and compared before any pixel is decoded."""
    try:
        with Image.open(io.BytesIO(blob), formats=["PNG"]) as image:
            if image.size != size or image.mode != "RGB":
                raise WireError(
                    [f"{where}: an RGB picture of {size} was announced, found {image.mode} {image.size}"]
                )
            image.load()
            return image
    except WireError:
        raise
    except Exception as error:  # decoders raise many types on broken data
        raise WireError([f"{where}: not a sound PNG: {type(error).__name__}: {error}"]) from error
