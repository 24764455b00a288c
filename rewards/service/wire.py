"""What a reward service and its client say to each other; the format is written out in this folder's README.

A request is one binary frame: magic, length of the header, the header as JSON, then the bytes of the pictures, each
picture once however many samples use it. An answer is JSON. Nothing is pickled, and since JSON has no NaN and no
infinity, scores that are one travel by name.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Any

from PIL import Image

from rewards.base import FatalRewardError

MEDIA_TYPE = "application/x-reward-batch"
MAGIC = b"RWB1"
CODECS = ("png", "raw")
PREFIX = struct.Struct("<4sI")  # magic, bytes of the header
LONGEST_HEADER = 16 * 2**20
MOST_VALUES = 2**18
"""Of a header's JSON: each takes up to 70 bytes once parsed, and holds up the service a microsecond."""
DEEPEST = 64

_NAMED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class WireError(ValueError):
    """A message that is not what this format says. `reasons` hold one sentence each."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = list(reasons)


class Cause(StrEnum):
    """Why a request was not scored.

    UNAVAILABLE: the reward is not ready yet, or the service is stopping; wait, or ask another. INFRASTRUCTURE,
    TIMEOUT and EXCEPTION happened to this call, and the next may succeed. All others are fatal.
    """

    UNAVAILABLE = "unavailable"
    INFRASTRUCTURE = "infrastructure"
    TIMEOUT = "timeout"
    EXCEPTION = "exception"
    FATAL = "fatal"
    CONTRACT = "contract"
    UNAUTHORIZED = "unauthorized"
    UNKNOWN_REWARD = "unknown_reward"
    OTHER_REWARD = "other_reward"
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"


@dataclass(frozen=True)
class Call:
    """What goes with the samples of a request: which reward is meant, and the time limit of the call in seconds."""

    fingerprint: str
    timeout_s: float


def fingerprint(name: str, params: Mapping[str, Any]) -> str:
    """sha256 over a reward's name and params. Raises TypeError or ValueError for params that JSON cannot hold."""
    identity = {"name": name, "params": params}
    text = json.dumps(identity, sort_keys=True, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def encode_request(
    call: Call,
    *,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    references: Sequence[Sequence[Image.Image]],
    metadata: Sequence[Mapping[str, Any]],
    sources: Sequence[Sequence[str]] | None = None,
    codec: str,
) -> bytes:
    """The frame for one batch of RGB images, with the addresses of references unless they are None.

    Raises WireError for another mode or metadata that JSON cannot hold.
    """
    sheet = _Sheet(codec)
    header = {
        "fingerprint": call.fingerprint,
        "timeout_s": call.timeout_s,
        "prompts": list(prompts),
        "metadata": [dict(entry) for entry in metadata],
        "images": [sheet.place(image) for image in images],
        "references": [[sheet.place(image) for image in pictures] for pictures in references],
        "pictures": sheet.entries,
    }
    if sources is not None:
        addresses = {
            address: number for number, address in enumerate(dict.fromkeys(chain.from_iterable(sources)))
        }
        header["addresses"] = list(addresses)
        header["sources"] = [[addresses[one] for one in row] for row in sources]
    try:
        text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError([f"prompts and metadata of a served reward must be plain JSON: {error}"]) from error
    return b"".join([PREFIX.pack(MAGIC, len(text)), text, *sheet.blobs])


class _Sheet:
    """The distinct pictures of a request, in the order of their first use."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.entries: list[dict[str, Any]] = []
        self.blobs: list[bytes] = []
        self._places: dict[tuple[tuple[int, int], bytes], int] = {}

    def place(self, image: Image.Image) -> int:
        """The number of the picture. Equal pixels are one picture: a group shares one reference."""
        if image.mode != "RGB":
            raise WireError([f"pictures of a served reward must be RGB, got mode {image.mode!r}"])
        pixels = image.tobytes()
        key = image.size, pixels
        if key not in self._places:
            blob = pixels if self.codec == "raw" else encode_png(image)
            self._places[key] = len(self.blobs)
            self.blobs.append(blob)
            width, height = image.size
            entry = {"codec": self.codec, "width": width, "height": height, "bytes": len(blob)}
            self.entries.append(entry)
        return self._places[key]


def encode_png(image: Image.Image) -> bytes:
    """Level 1 with run lengths only: a third faster than level 1 alone, and no larger on photographs."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1, compress_type=3)
    return buffer.getvalue()


def split_frame(body: bytes | bytearray) -> tuple[Any, memoryview]:
    """The header as parsed JSON and the bytes behind it. Raises WireError."""
    if len(body) < PREFIX.size or not body.startswith(MAGIC):
        raise WireError([f"the body must start with {MAGIC.decode()} and the length of its header"])
    _, length = PREFIX.unpack_from(body)
    end = PREFIX.size + length
    if length > LONGEST_HEADER or end > len(body):
        raise WireError([f"header of {length} bytes: at most {LONGEST_HEADER}, and no more than were sent"])
    text = bytes(body[PREFIX.size : end])
    if sum(map(text.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise WireError([f"header of more than {MOST_VALUES} values"])
    try:
        header = json.loads(text.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError([f"header is not JSON: {error}"]) from error
    if _deeper_than(DEEPEST, header):
        raise WireError([f"header nests deeper than {DEEPEST} levels"])
    return header, memoryview(body)[end:]


def _deeper_than(levels: int, value: Any) -> bool:
    level = [value]
    for _ in range(levels):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [child for children in inner for child in children]
    return bool(level)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def encode_scores(values: Sequence[float | None]) -> list[float | str | None]:
    """Scores for JSON: NaN and the infinities as "nan", "inf" and "-inf"."""
    return [value if value is None or math.isfinite(value) else str(value) for value in values]


def decode_scores(values: Any) -> list[float | None]:
    """The scores back, bit for bit. Raises WireError for anything else."""
    if not isinstance(values, list):
        raise WireError([f"scores must be a list, got a {type(values).__name__}"])
    return [_decode_score(value) for value in values]


def _decode_score(value: Any) -> float | None:
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise WireError([f"a score is a number, null, nan, inf or -inf, got {str(value)[:40]!r}"])
    try:
        return None if value is None else float(value)
    except OverflowError as error:
        raise WireError(["a score is a whole number that no float can hold"]) from error


def read_token(variable: str) -> str:
    """The bearer token: read where it is used, and kept nowhere.

    Raises FatalRewardError, which never shows the value, when no header could carry it.
    """
    if not variable.isidentifier():  # most likely the token itself
        raise FatalRewardError("no name of an environment variable; put the token into one and give its name")
    token = os.environ.get(variable, "")
    if not token:
        raise FatalRewardError(
            f"the environment variable {variable}, which holds the bearer token, is not set"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise FatalRewardError(
            f"the environment variable {variable} holds a space, a line end or another character that no bearer "
            "token has"
        )
    return token
