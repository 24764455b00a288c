"""Whatever a batch holds comes through, and whatever else arrives is refused by the one error that says so."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rewards.base import FatalRewardError, RewardOutput
from rewards.service.faults import error_of, read_output
from rewards.service.request import decode_request
from rewards.service.wire import MAGIC, PREFIX, Call, WireError, encode_request, encode_scores

LIMIT = 2**20
quick = settings(deadline=None, max_examples=100)
few = settings(deadline=None, max_examples=30)

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
keys = ("fingerprint", "timeout_s", "prompts", "metadata", "images", "references", "pictures")


sides = st.integers(1, 6)
colors = st.tuples(*[st.integers(0, 255)] * 3)
pictures = st.builds(
    lambda width, height, color: Image.new("RGB", (width, height), color), sides, sides, colors
)


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
        "references": many(st.none() | st.sampled_from(known)),
        "metadata": many(st.dictionaries(st.text(), plain, max_size=3)),
    }


calls = st.builds(Call, st.text(max_size=64), st.floats(1e-3, 86400))


def pixels(image):
    return image and (image.mode, image.size, image.tobytes())


@few
@given(batches(), calls, st.sampled_from(["png", "raw"]))
def test_any_batch_comes_through(batch, call, codec):
    back, found = decode_request(encode_request(call, **batch, codec=codec), LIMIT)
    assert back == call
    assert [found.prompts, found.metadata] == [batch["prompts"], batch["metadata"]]
    assert list(map(pixels, found.images)) == list(map(pixels, batch["images"]))
    assert list(map(pixels, found.references)) == list(map(pixels, batch["references"]))


def refused_or_sound(body):
    """Raises anything but the declared error."""
    try:
        _, batch = decode_request(body, LIMIT)
    except WireError as error:
        assert error.reasons
    else:
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
