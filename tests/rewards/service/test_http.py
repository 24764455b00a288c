"""A service over real HTTP: same scores as in process, same errors, and nothing let in that should not be."""

import asyncio
import dataclasses
import math
import textwrap

import httpx
import numpy as np
import pytest
from PIL import Image

from rewards.base import FatalRewardError, RewardContractError, RewardSet, RewardSpec
from rewards.calling import RewardBatch, call_reward
from rewards.loading import load_reward
from rewards.scoring import score_group
from rewards.service.wire import MEDIA_TYPE, Call, encode_request, fingerprint
from tests.fakes.service_process import ServiceThread, served
from worlds.shapes.scenes.captions import sample_t2i
from worlds.shapes.scenes.edits import sample_edit
from worlds.shapes.scenes.render import render

ODD = """
    import asyncio, time
    from rewards.base import *

    def odd(*, images, prompts, references, metadata):
        what = prompts[0]
        if what == "missing":
            scores = [0.1 + 0.2, None, float("nan"), float("inf")]
            return RewardOutput(scores, {"part": [float("-inf"), None, 5e-324, float("nan")]})
        if what == "retryable":
            raise RetryableRewardError("upstream says 503", retry_after_s=7.5)
        if what == "fatal":
            raise FatalRewardError("quota exhausted")
        if what == "exception":
            raise KeyError("no such colour \\udcff")
        if what == "contract":
            return [1.0]
        if what == "timeout":
            time.sleep(0.6)
        return RewardOutput([float(len({id(r) for pictures in references for r in pictures}))] * len(images))
"""


@pytest.fixture(scope="module")
def odd_name(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "odd_reward.py"
    path.write_text(textwrap.dedent(ODD))
    return f"{path}:odd"


@pytest.fixture(scope="module")
def service(odd_name):
    def trial(task, name):
        metadata = shapes_batch(task, 1).metadata[0]
        return RewardSet(name, task, [RewardSpec(name)], example_metadata=metadata, height=32, width=32)

    trials = [trial("t2i", "geneval_shapes"), trial("t2i", odd_name), trial("edit", "edit_shapes")]
    running = ServiceThread(*trials, max_request_mb=1, token_env="SERVICE_TOKEN")
    yield running.ready()
    running.stop()


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    for variable in ("SERVICE_TOKEN", "CLIENT_TOKEN"):
        monkeypatch.setenv(variable, "open-sesame")


@pytest.fixture
def http(service):
    with httpx.Client(
        base_url=service.url, trust_env=False, headers={"authorization": "Bearer open-sesame"}
    ) as client:
        yield client


def behind(service, spec, **settings):
    return load_reward(served(spec, service.url, token_env="CLIENT_TOKEN", **settings))


def shapes_batch(task, count=16):
    """Right pictures, and mixtures with other ones, with their metadata."""
    rng = np.random.default_rng(3)
    if task == "t2i":
        metadata, scenes = zip(*[sample_t2i(rng, "heldout") for _ in range(count)], strict=True)
        sources = [[]] * count
    else:
        examples = [sample_edit(rng, "heldout") for _ in range(count)]
        metadata = [example.metadata for example in examples]
        scenes = [example.target for example in examples]
        sources = [[Image.fromarray(render(example.source))] for example in examples]
    pictures = [Image.fromarray(render(scene)) for scene in scenes]
    mixed = [Image.blend(pictures[k], pictures[k - 1], 0.05 * (k % 8)) for k in range(count)]
    return RewardBatch(mixed, ["p"] * count, sources, list(metadata))


def odd_batch(what):
    images = [Image.new("RGB", (8, 8), (k, k, k)) for k in range(4)]
    return RewardBatch(images, [what] * 4, [[]] * 4, [{}] * 4)


async def no_sleep(_):
    pass


def group_of(loaded, batch):
    group = asyncio.run(score_group(0, [loaded], batch, sleep=no_sleep))
    return dataclasses.replace(group, seconds={})


@pytest.mark.parametrize("codec", ["png", "raw"])
@pytest.mark.parametrize(("name", "task"), [("geneval_shapes", "t2i"), ("edit_shapes", "edit")])
def test_scores_and_components_are_those_of_the_reward_in_process(service, name, task, codec):
    spec, batch = RewardSpec(name), shapes_batch(task)
    here = group_of(load_reward(spec), batch)
    there = group_of(behind(service, spec, codec=codec), batch)
    assert there == here
    assert len(set(here.rewards)) > 2 and len(here.components) >= 3


def test_every_sample_gets_its_own_copy_of_a_shared_reference(service, odd_name):
    reference = Image.new("RGB", (8, 8), (9, 9, 9))
    batch = dataclasses.replace(odd_batch("fine"), references=[[reference], [reference] * 2, [], [reference]])
    assert group_of(behind(service, RewardSpec(odd_name)), batch).rewards == [4.0] * 4


def test_a_reward_that_asks_for_the_addresses_of_references_gets_them(reward_file):
    code = """
        def asks(*, images, prompts, references, metadata, sources):
            return [float(len("+".join(addresses))) for addresses in sources]
    """
    spec = RewardSpec(f"{reward_file(code)}:asks")
    running = ServiceThread(RewardSet("edit", "edit", [spec], height=8, width=8))
    try:
        loaded = load_reward(served(spec, running.ready().url))
        one = Image.new("RGB", (8, 8))
        rest = {
            "references": [[one], [one, one], [], [one]],
            "sources": [["/a"], ["/a", "/bc"], [], ["data:"]],
        }
        batch = dataclasses.replace(odd_batch("fine"), **rest)
        with pytest.raises(FatalRewardError, match="asks for the sources of references"):
            group_of(loaded, batch)  # nobody has looked what it takes
        assert asyncio.run(loaded.owner.readiness()) == []
        assert (
            group_of(loaded, batch).rewards
            == group_of(load_reward(spec), batch).rewards
            == [2.0, 6.0, 0.0, 5.0]
        )
    finally:
        running.stop()


@pytest.mark.parametrize("what", ["missing", "retryable", "exception", "timeout"])
def test_a_missing_score_is_missing_in_the_same_way_as_in_process(service, odd_name, what):
    spec = RewardSpec(odd_name, attempts=2, timeout_s=0.25 if what == "timeout" else 20.0)
    here = group_of(load_reward(spec), odd_batch(what))
    there = group_of(behind(service, spec), odd_batch(what))
    assert there == here and here.failures


def test_none_nan_and_infinity_are_told_apart(service, odd_name):
    loaded = behind(service, RewardSpec(odd_name))
    output = asyncio.run(call_reward(loaded, odd_batch("missing")))
    number, none, nan, inf = output.scores
    assert number == 0.1 + 0.2 and none is None and math.isnan(nan) and inf == math.inf
    assert output.components["part"][:3] == [-math.inf, None, 5e-324]


@pytest.mark.parametrize(
    ("what", "kind", "text"),
    [
        ("fatal", FatalRewardError, "quota exhausted"),
        ("contract", RewardContractError, "1 scores for 4 images"),
    ],
)
def test_a_fatal_error_is_fatal_through_http(service, odd_name, what, kind, text):
    loaded = behind(service, RewardSpec(odd_name, attempts=5))
    with pytest.raises(kind, match=text) as raised:
        asyncio.run(call_reward(loaded, odd_batch(what)))
    assert type(raised.value) is kind and service.url in str(raised.value)
    with pytest.raises(FatalRewardError, match="stops the run"):
        group_of(loaded, odd_batch(what))


def test_a_caller_who_hangs_up_in_the_queue_has_nothing_scored(tmp_path):
    """A blocking reward takes one call after the other; the second caller leaves while it waits."""
    path = tmp_path / "gated.py"
    path.write_text(
        "import threading\nseen, gate = [], threading.Event()\n"
        "def gated(*, images, prompts, references, metadata):\n"
        "    if images[0].size == (8, 8):\n"
        "        seen.append(prompts[0])\n"
        "        gate.wait(30)\n"
        "    return [1.0] * len(images)\n"
    )
    name = f"{path}:gated"
    running = ServiceThread(RewardSet("set", "t2i", [RewardSpec(name)], height=32, width=32)).ready()
    state = load_reward(RewardSpec(name)).function.__globals__
    loaded = load_reward(served(RewardSpec(name), running.url))

    async def leave():
        first = asyncio.ensure_future(call_reward(loaded, odd_batch("first")))
        while not state["seen"]:
            await asyncio.sleep(0.01)
        second = asyncio.ensure_future(call_reward(loaded, odd_batch("second")))
        await asyncio.sleep(0.3)
        second.cancel()
        await asyncio.sleep(0.2)
        state["gate"].set()
        return await first, await call_reward(loaded, odd_batch("third"))

    answers = asyncio.run(leave())
    running.stop()
    assert [answer.scores for answer in answers] == [[1.0] * 4] * 2
    assert state["seen"] == ["first", "third"]


def body_for(name, what="fine", *, timeout_s=20.0, size=8):
    batch = odd_batch(what)
    images = [image.resize((size, size)) for image in batch.images]
    call = Call(fingerprint(name, {}), timeout_s)
    given = {"prompts": batch.prompts, "references": batch.references, "metadata": batch.metadata}
    return encode_request(call, images=images, **given, codec="raw")


def post(http, label, body, **headers):
    return http.post(f"/v1/score/{label}", content=body, headers={"content-type": MEDIA_TYPE} | headers)


@pytest.mark.parametrize(
    ("what", "status", "fatal"),
    [
        ("retryable", 503, False),
        ("exception", 500, False),
        ("timeout", 504, False),
        ("fatal", 500, True),
        ("contract", 500, True),
    ],
)
def test_what_a_failure_looks_like_on_the_wire(http, odd_name, what, status, fatal):
    response = post(http, "odd", body_for(odd_name, what, timeout_s=0.25 if what == "timeout" else 20.0))
    error = response.json()["error"]
    cause = "infrastructure" if what == "retryable" else what
    assert (response.status_code, error["cause"], error["fatal"]) == (status, cause, fatal)
    assert response.headers.get("retry-after") == ("8" if what == "retryable" else None)
    assert error["retry_after_s"] == (7.5 if what == "retryable" else 0.0)


@pytest.mark.parametrize(
    ("label", "change", "status", "cause", "text"),
    [
        ("geneval", {}, 404, "unknown_reward", "served: ['edit_shapes', 'geneval_shapes', 'odd']"),
        ("edit_shapes", {}, 409, "other_reward", "the service scores with edit_shapes {}"),
        ("odd", {"body": b"{}"}, 422, "malformed", "must start with RWB1"),
        ("odd", {"type": "application/json"}, 422, "malformed", f"content-type must be {MEDIA_TYPE}"),
        ("odd", {"type": "application/python-pickle"}, 422, "malformed", "content-type"),
        ("odd", {"size": 512}, 413, "too_large", "larger than 1048576 bytes (--max-request-mb)"),
    ],
)
def test_a_request_that_cannot_be_scored_says_why(http, odd_name, label, change, status, cause, text):
    body = change.get("body", body_for(odd_name, size=change.get("size", 8)))
    response = post(http, label, body, **{"content-type": change.get("type", MEDIA_TYPE)})
    error = response.json()["error"]
    assert (response.status_code, error["cause"], error["fatal"]) == (status, cause, True)
    assert text in error["message"]


def test_the_size_limit_holds_for_a_body_that_does_not_tell_its_size(http):
    response = post(http, "odd", (bytes(2**16) for _ in range(1024)))
    assert "content-length" not in response.request.headers
    assert response.status_code == 413 and response.json()["error"]["cause"] == "too_large"


def test_a_small_png_of_a_large_picture_is_refused(http, odd_name):
    batch = {
        "images": [Image.new("RGB", (700, 700))],
        "prompts": ["p"],
        "references": [[]],
        "metadata": [{}],
    }
    body = encode_request(Call(fingerprint(odd_name, {}), 20.0), **batch, codec="png")
    assert len(body) < 2**14
    response = post(http, "odd", body)
    assert response.status_code == 422 and "once decoded" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "given", [None, "Bearer open-sesam", "Basic open-sesame", "open-sesame", "Bearer sésame"]
)
def test_without_the_token_there_is_only_the_state_of_health(service, odd_name, given):
    headers = {} if given is None else {"authorization": given.encode()}
    with httpx.Client(base_url=service.url, trust_env=False, headers=headers) as stranger:
        assert post(stranger, "odd", body_for(odd_name)).status_code == 401
        assert stranger.get("/v1/rewards").status_code == 401
        assert stranger.get("/metrics").status_code == 401
        assert stranger.get("/readyz").json() == {"ready": True}
        assert stranger.get("/healthz").json() == {"status": "alive"}
        assert stranger.get("/docs").status_code == stranger.get("/openapi.json").status_code == 404


def test_a_wrong_token_stops_the_run_and_is_never_told(service, odd_name, monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("CLIENT_TOKEN", "secret-of-another")
    loaded = behind(service, RewardSpec(odd_name))
    with pytest.raises(FatalRewardError, match="token is missing or wrong") as raised:
        group_of(loaded, odd_batch("fine"))
    (problem,) = asyncio.run(loaded.owner.readiness())
    assert "token is missing or wrong" in problem
    seen = f"{raised.value!r} {problem} {loaded!r} {vars(loaded.owner)} {caplog.text}"
    assert "not scored (unauthorized)" in seen, "the service's own log is in it"
    assert "secret-of-another" not in seen and "open-sesame" not in seen


def test_what_is_served_is_listed(http, odd_name):
    listed = http.get("/v1/rewards").json()
    assert listed["max_request_bytes"] == 2**20 and sorted(listed["rewards"]) == [
        "edit_shapes",
        "geneval_shapes",
        "odd",
    ]
    odd = listed["rewards"]["odd"]
    source = load_reward(RewardSpec(odd_name)).source
    assert (odd["name"], odd["params"], odd["ready"]) == (odd_name, {}, True)
    assert (odd["path"], odd["sha256"]) == (source.path, source.sha256)
    assert odd["fingerprint"] == fingerprint(odd_name, {})


def counts(http):
    lines = [line.rsplit(" ", 1) for line in http.get("/metrics").text.splitlines() if line[0] != "#"]
    return {name: float(value) for name, value in lines}


def test_metrics_count_requests_images_failures_and_missing(http, odd_name):
    before = counts(http)
    for what in ("fine", "missing", "fatal", "retryable"):
        post(http, "odd", body_for(odd_name, what))
    post(http, "nobody", b"")
    after = counts(http)
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    grown = {name: value for name, value in grown.items() if "created" not in name and "_sum" not in name}
    assert {name: value for name, value in grown.items() if "bucket" not in name} == {
        'reward_requests_total{reward="odd"}': 4,
        'reward_requests_total{reward=""}': 1,
        'reward_images_total{reward="odd"}': 8,
        'reward_seconds_count{reward="odd"}': 2,
        'reward_missing_images_total{cause="none",reward="odd"}': 1,
        'reward_missing_images_total{cause="nan",reward="odd"}': 1,
        'reward_missing_images_total{cause="inf",reward="odd"}': 1,
        'reward_failures_total{cause="fatal",reward="odd"}': 1,
        'reward_failures_total{cause="infrastructure",reward="odd"}': 1,
        'reward_failures_total{cause="unknown_reward",reward=""}': 1,
    }
    assert after['reward_requests_in_flight{reward="odd"}'] == 0
