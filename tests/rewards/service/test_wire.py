"""Pictures and scores come through bit for bit, and nothing but a sound request comes through at all."""

import io
import json
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rewards.base import FatalRewardError, RewardOutput
from rewards.service.faults import error_of, read_output
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
        "references": [[]] * count,
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


def test_the_reference_of_a_group_is_sent_once():
    images = [noise(k, 64, 64) for k in range(16)]
    one = frame(count=16, images=images, references=[[noise(99, 64, 64), images[1]]] * 16)
    copies = frame(
        count=16, images=images, references=[[noise(99, 64, 64), noise(1, 64, 64)] for _ in range(16)]
    )
    assert one == copies
    header, rest = header_of(one)
    assert len(header["pictures"]) == 17 and len(rest) == 17 * 64 * 64 * 3
    assert header["references"] == [[16, 1]] * 16


def test_the_addresses_of_a_groups_references_are_sent_once_and_where_wanted_alone():
    header, _ = header_of(frame(sources=[["/a.png", "/b.png"], ["/b.png"], []]))
    assert (header["addresses"], header["sources"]) == (["/a.png", "/b.png"], [[0, 1], [1], []])
    assert not {"addresses", "sources"} & header_of(frame())[0].keys()


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
    "reference out of range": (with_header(frame(), references=[[], [0, 3], []]), "exactly the pictures 0 to 2"),
    "address out of range": (with_header(frame(), addresses=["a"], sources=[[0], [1], []]), "exactly the addresses"),
    "unused address": (with_header(frame(), addresses=["a"]), "exactly the addresses"),
    "too few sources": (with_header(frame(), addresses=["a"], sources=[[0]]), "per sample, got .*'sources': 1"),
    "a reference by itself": (with_header(frame(), references=[[], 0, []]), "references.1: .*valid list"),
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


# Whatever a batch holds comes through, and whatever else arrives is refused by the one error that says so.

quick = settings(deadline=None, max_examples=100)
few = settings(deadline=None, max_examples=30)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
keys = ("fingerprint", "timeout_s", "prompts", "metadata", "images", "references", "pictures")


sides = st.integers(1, 6)
pictures = st.builds(noise, st.integers(0, 99), sides, sides)


@st.composite
def batches(draw):
    """Lists of one length; a sample may share its picture with others."""
    known = draw(st.lists(pictures, min_size=1, max_size=4))
    count = draw(st.integers(1, 5))

    def many(entry):
        return draw(st.lists(entry, min_size=count, max_size=count))

    return {
        "images": many(st.sampled_from(known)),
        "prompts": many(st.text()),
        "references": many(st.lists(st.sampled_from(known), max_size=3)),
        "metadata": many(st.dictionaries(st.text(), plain, max_size=3)),
        "sources": draw(st.none() | st.just(many(st.lists(st.text(), max_size=3)))),
    }


calls = st.builds(Call, st.text(max_size=64), st.floats(1e-3, 86400))


def pixels(image):
    return image.mode, image.size, image.tobytes()


@few
@given(batches(), calls, st.sampled_from(["png", "raw"]))
def test_any_batch_comes_through(batch, call, codec):
    back, found = decode_request(encode_request(call, **batch, codec=codec), LIMIT)
    assert back == call
    assert [found.prompts, found.metadata] == [batch["prompts"], batch["metadata"]]
    assert found.sources == batch["sources"]
    assert list(map(pixels, found.images)) == list(map(pixels, batch["images"]))
    sent, came = (
        [list(map(pixels, shown)) for shown in shown_each]
        for shown_each in (batch["references"], found.references)
    )
    assert came == sent


def refused_or_sound(body):
    """Raises anything but the declared error."""
    try:
        _, batch = decode_request(body, LIMIT)
    except WireError as error:
        assert error.reasons
    else:
        assert {image.mode for image in batch.images} == {"RGB"}
        assert len(batch.images) == len(batch.prompts) == len(batch.references) == len(batch.metadata) > 0


@quick
@given(st.binary() | st.binary().map(lambda rest: MAGIC + rest))
def test_any_bytes_are_refused_by_name(body):
    refused_or_sound(body)


@quick
@given(plain | st.dictionaries(st.sampled_from(keys), plain), st.binary(max_size=40))
def test_any_header_is_refused_by_name(header, rest):
    text = json.dumps(header).encode()
    refused_or_sound(PREFIX.pack(MAGIC, len(text)) + text + rest)


@few
@given(batches(), st.sampled_from(["png", "raw"]), st.data())
def test_a_damaged_frame_is_refused_by_name_or_sound(batch, codec, data):
    body = bytearray(encode_request(Call("f", 1.0), **batch, codec=codec))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    refused_or_sound(bytes(body[: data.draw(st.integers(0, len(body)))]))
    refused_or_sound(bytes(body))


scores = st.lists(st.none() | st.floats(), max_size=6)


@quick
@given(scores, st.dictionaries(st.text(), scores, max_size=3))
def test_any_scores_come_through(values, components):
    answer = {
        "scores": encode_scores(values),
        "components": {k: encode_scores(v) for k, v in components.items()},
    }
    output, _ = read_output(json.loads(json.dumps(answer, allow_nan=False)), "http://h:1")
    assert repr(output) == repr(RewardOutput(values, components))  # NaN is not equal to itself


@quick
@given(
    plain | st.fixed_dictionaries({"scores": plain, "components": plain, "error": plain}),
    st.integers(100, 599),
)
def test_any_answer_is_scores_or_a_declared_error(answer, status):
    assert isinstance(error_of(answer, status, "http://h:1"), Exception)
    try:
        assert isinstance(read_output(answer, "http://h:1")[0], RewardOutput)
    except FatalRewardError as error:
        assert "answered what no reward service does" in str(error)


def test_a_score_beyond_every_float_is_refused():
    with pytest.raises(FatalRewardError, match="no float can hold"):
        read_output({"scores": [10**400], "components": {}}, "http://h:1")
