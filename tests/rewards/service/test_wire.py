"""Pictures and scores come through bit for bit, and nothing but a sound request comes through at all."""

import io
import json
import math
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from rewards.service.request import LARGEST_SIDE, decode_request
from rewards.service.wire import (
    MAGIC,
    PREFIX,
    Call,
    WireError,
    decode_scores,
    encode_request,
    encode_scores,
    fingerprint,
)

CALL = Call("f" * 64, 2.5)
LIMIT = 2**20


def noise(seed, width=5, height=3):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def frame(codec="raw", count=3, **changes):
    given = {
        "images": [noise(k) for k in range(count)],
        "prompts": ["ein grüner Kreis"] * count,
        "references": [None] * count,
        "metadata": [{"tag": "colors", "share": 0.1, "parts": [1, {"a": None}]}] * count,
    }
    return encode_request(CALL, **{**given, **changes}, codec=codec)


def header_of(body):
    _, length = PREFIX.unpack_from(body)
    return json.loads(body[PREFIX.size : PREFIX.size + length]), body[PREFIX.size + length :]


def with_header(body, **changes):
    """The frame with keys of its header changed; None takes a key out."""
    header, rest = header_of(body)
    header = {key: value for key, value in (header | changes).items() if value is not None}
    text = json.dumps(header).encode()
    return PREFIX.pack(MAGIC, len(text)) + text + rest


@pytest.mark.parametrize("codec", ["png", "raw"])
def test_a_batch_comes_through_bit_for_bit(codec):
    images = [noise(1), noise(2, 7, 2), noise(3, 1, 1)]
    references = [noise(4), None, noise(5, 64, 48)]
    call, batch = decode_request(frame(codec, images=images, references=references), LIMIT)
    assert call == CALL
    assert [image.tobytes() for image in batch.images] == [image.tobytes() for image in images]
    assert [image.size for image in batch.images] == [(5, 3), (7, 2), (1, 1)]
    assert [r and r.tobytes() for r in batch.references] == [r and r.tobytes() for r in references]
    assert {image.mode for image in batch.images} == {"RGB"}
    assert list(batch.prompts) == ["ein grüner Kreis"] * 3
    assert batch.metadata[0] == {"tag": "colors", "share": 0.1, "parts": [1, {"a": None}]}


def test_the_reference_of_a_group_is_sent_once():
    images = [noise(k, 64, 64) for k in range(16)]
    one = frame(count=16, images=images, references=[noise(99, 64, 64)] * 16)
    copies = frame(count=16, images=images, references=[noise(99, 64, 64) for _ in range(16)])
    assert one == copies
    header, rest = header_of(one)
    assert len(header["pictures"]) == 17 and len(rest) == 17 * 64 * 64 * 3
    assert header["references"] == [header["references"][0]] * 16


def test_scores_come_through_bit_for_bit_with_every_kind_of_missing():
    scores = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, None, math.nan, math.inf, -math.inf, 1.0]
    text = json.dumps(encode_scores(scores), allow_nan=False)
    back = decode_scores(json.loads(text))
    assert [None if s is None else struct.pack("<d", s) for s in back] == [
        None if s is None else struct.pack("<d", s) for s in scores
    ]


@pytest.mark.parametrize("values", [None, "nan", [True], ["0.5"], [[1.0]], [{"a": 1}], ["NaN"]])
def test_other_things_than_scores_are_refused(values):
    with pytest.raises(WireError):
        decode_scores(values)


def test_the_fingerprint_follows_name_and_params():
    same = fingerprint("a", {"x": 1, "y": [0.5, None]})
    assert fingerprint("a", {"y": [0.5, None], "x": 1}) == same and len(same) == 64
    others = [
        fingerprint("b", {"x": 1, "y": [0.5, None]}),
        fingerprint("a", {}),
        fingerprint("a", {"x": 1.5}),
    ]
    assert same not in others
    with pytest.raises(ValueError, match="Out of range float"):
        fingerprint("a", {"x": math.nan})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"images": [Image.new("L", (2, 2))] * 3}, "must be RGB, got mode 'L'"),
        ({"metadata": [{"x": math.nan}] * 3}, "must be plain JSON"),
        ({"metadata": [{"x": {1, 2}}] * 3}, "must be plain JSON"),
    ],
)
def test_what_cannot_travel_is_refused_where_it_starts(changes, expected):
    with pytest.raises(WireError, match=expected):
        frame(**changes)


def picture(**changes):
    return [{"codec": "raw", "width": 5, "height": 3, "bytes": 45} | changes]


CASES = {
    "empty": (b"", "must start with RWB1"),
    "other magic": (b"RWB2" + frame()[4:], "must start with RWB1"),
    "header beyond the body": (PREFIX.pack(MAGIC, 999) + b"{}", "header of 999 bytes"),
    "endless header": (PREFIX.pack(MAGIC, 2**32 - 1) + b"{}", "at most 16777216"),
    "no JSON": (PREFIX.pack(MAGIC, 2) + b"{]", "header is not JSON"),
    "no text": (PREFIX.pack(MAGIC, 2) + b"\xff\xfe", "header is not JSON"),
    "NaN": (PREFIX.pack(MAGIC, 3) + b"NaN", "NaN is not JSON"),
    "nested without end": (PREFIX.pack(MAGIC, 200_000) + b"[" * 200_000, "header is not JSON"),
    "a list": (PREFIX.pack(MAGIC, 2) + b"[]", "header: "),
    "unknown key": (with_header(frame(), pickle="x"), "pickle: Extra inputs are not permitted"),
    "missing key": (with_header(frame(), prompts=None), "prompts: Field required"),
    "no samples": (with_header(frame(), prompts=[], metadata=[], images=[], references=[]), "prompts: .*at least 1"),
    "counts differ": (with_header(frame(), prompts=["a"]), "one entry per sample, got .*'prompts': 1"),
    "text for a number": (with_header(frame(), images=["0", "1", "2"]), "images.0: .*valid integer"),
    "a number for text": (with_header(frame(), prompts=[1, 2, 3]), "prompts.0: .*valid string"),
    "metadata": (with_header(frame(), metadata=[[], [], []]), "metadata.0: .*valid dict"),
    "time limit": (with_header(frame(), timeout_s=0), "timeout_s: .*greater than 0"),
    "endless time limit": (with_header(frame(), timeout_s=1e300), "timeout_s: .*less than or equal"),
    "picture out of range": (with_header(frame(), images=[0, 1, 3]), "exactly the pictures 0 to 2"),
    "negative picture": (with_header(frame(), images=[0, 1, -1]), "exactly the pictures"),
    "unused picture": (with_header(frame(), images=[0, 1, 1]), "exactly the pictures"),
    "codec": (with_header(frame(count=1), pictures=picture(codec="gif")), "pictures.0.codec: .*'png' or 'raw'"),
    "raw size": (with_header(frame(count=1), pictures=picture(width=6)), "5x3|6x3 takes 54 bytes"),
    "no width": (with_header(frame(count=1), pictures=picture(width=0)), "pictures.0.width"),
    "a side too long": (with_header(frame(count=1), pictures=picture(width=LARGEST_SIDE + 1)), "pictures.0.width"),
    "bytes missing": (frame()[:-1], "take 135 bytes by the header, 134 were sent"),
    "bytes too many": (frame() + b"x", "take 135 bytes by the header, 136 were sent"),
    "no PNG": (with_header(frame(count=1), pictures=picture(codec="png")), "pictures.0: not a sound PNG"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_malformed_request_is_refused_with_its_reason(case):
    body, expected = CASES[case]
    with pytest.raises(WireError, match=f"(?s){expected}"):
        decode_request(body, LIMIT)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width, height):
    """A small, well-formed PNG of one colour."""
    rows = zlib.compress(bytes(height * (1 + 3 * width)), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("announced", "expected"),
    [
        ((2000, 2000), "would take 12000000 bytes once decoded"),
        ((5, 3), "an RGB picture of .5, 3. was announced"),
    ],
)
def test_a_picture_that_would_grow_is_refused_before_it_does(announced, expected):
    blob = bomb(2000, 2000)
    assert len(blob) < 20_000
    width, height = announced
    body = with_header(
        frame(count=1), pictures=picture(codec="png", width=width, height=height, bytes=len(blob))
    )
    header, _ = header_of(body)
    with pytest.raises(WireError, match=expected):
        decode_request(with_header(frame(count=1), **header)[:-45] + blob, LIMIT)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_a_png_that_is_not_rgb_is_refused(mode):
    buffer = io.BytesIO()
    Image.new(mode, (5, 3)).save(buffer, "PNG")
    blob = buffer.getvalue()
    body = with_header(frame(count=1), pictures=picture(codec="png", bytes=len(blob)))
    with pytest.raises(WireError, match="an RGB picture of"):
        decode_request(body[:-45] + blob, LIMIT)


def test_damage_anywhere_ends_in_a_refusal_or_a_sound_batch():
    rng, sound = random.Random(0), frame("png", references=[noise(7)] * 3)
    refused = 0
    for _ in range(600):
        body = bytearray(sound)
        for _ in range(rng.randint(1, 3)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        if rng.random() < 0.3:
            del body[rng.randrange(len(body)) :]
        try:
            _, batch = decode_request(bytes(body), LIMIT)
        except WireError:
            refused += 1
        else:
            assert len(batch.images) == 3 and all(image.mode == "RGB" for image in batch.images)
    assert 300 < refused < 600
