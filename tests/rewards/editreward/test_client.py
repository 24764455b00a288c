"""The reward `editreward`: a real vLLM server on CPU, transformers in process, and servers that misbehave."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rewards.base import FatalRewardError, RewardSet, RewardSpec
from rewards.calling import RewardBatch
from rewards.checks import try_reward
from rewards.editreward.client import EditReward
from rewards.editreward.model_folder import read_card
from rewards.loading import default_timeout_s, load_reward
from rewards.scoring import score_group
from tests.fakes.tiny_editreward import DIMENSIONS, make_tiny_editreward, tiny_settings
from tests.fakes.vllm_server import START_TIMEOUT_S, Serving, wait_for

SIZES = [(64, 64), (128, 64), (64, 128), (200, 90), (56, 84), (31, 47), (300, 300), (90, 40)]


@pytest.fixture(scope="module")
def folder(editreward_folder: Path) -> Path:
    return editreward_folder


@pytest.fixture
def url(serving: Serving) -> str:
    return serving.url


def edits(count: int) -> dict[str, list[Any]]:
    """Random pictures of many shapes, source and result of unlike sizes, instructions of many lengths."""
    rng = np.random.default_rng(0)

    def picture(k: int) -> Image.Image:
        width, height = SIZES[k % len(SIZES)]
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    return {
        "images": [picture(k) for k in range(count)],
        "prompts": [f'make it {"very " * (k % 7)}red, number {k}: "{{ü}}"' for k in range(count)],
        "references": [[picture(k // 3)] for k in range(count)],
        "metadata": [{} for _ in range(count)],
    }


def score(reward: EditReward, batch: dict[str, list[Any]]) -> Any:
    output = reward.score(**batch)
    return asyncio.run(output) if inspect.isawaitable(output) else output


def test_fifty_edits_score_the_same_through_vllm_and_in_process(folder: Path, url: str) -> None:
    batch = edits(50)
    served = score(EditReward(model=str(folder), urls=[url]), batch)
    local = score(EditReward(model=str(folder), mode="inprocess", device="cpu"), batch)
    for name in DIMENSIONS:
        difference = np.abs(np.array(served.components[name]) - np.array(local.components[name]))
        assert difference.max() < 1e-4
        assert np.std(local.components[name]) > 0.05, "equal scores for unlike edits would prove nothing"
    assert np.abs(np.array(served.scores) - np.array(local.scores)).max() < 1e-4
    # The rule once more, from the predictions in label units: a geometric mean, over the scale from 0 to 10.
    for k, value in enumerate(local.scores):
        product = math.prod(max(local.components[name][k], 0.0) for name in DIMENSIONS)
        assert value == pytest.approx(min(product ** (1 / 3) / 10, 1.0))


def test_what_the_server_answers_is_denormalised_with_the_saved_constants(folder: Path, url: str) -> None:
    import httpx

    from rewards.editreward.processing import classify_request

    batch, card = edits(1), read_card(folder)
    body = classify_request(
        batch["references"][0][0],
        batch["images"][0],
        batch["prompts"][0],
        card.settings,
        model=card.served_name,
    )
    raw = httpx.post(f"{url}/classify", json=body, timeout=60).json()["data"][0]["probs"]
    found = score(EditReward(model=str(folder), urls=[url]), batch).components
    for z, name, mean, std in zip(raw, DIMENSIONS, (5.0, 5.5, 6.0), (2.0, 2.25, 2.5), strict=True):
        assert found[name][0] == pytest.approx(mean + std * z, abs=1e-5)


def test_a_server_of_another_model_is_refused_by_name(folder: Path, url: str, tmp_path: Path) -> None:
    other = make_tiny_editreward(tmp_path / "other", tiny_settings(means=(5.0, 5.5, 6.25)))
    reward = EditReward(model=str(other), urls=[url])
    mine, theirs = read_card(other).served_name, read_card(folder).served_name
    assert mine != theirs
    (problem,) = asyncio.run(reward.readiness())
    assert mine in problem and theirs in problem and url in problem
    with pytest.raises(FatalRewardError, match=f"serves {theirs}"):
        score(EditReward(model=str(other), urls=[url]), edits(2))


def test_an_edit_that_cannot_be_shown_is_missing_and_the_others_are_scored(folder: Path, url: str) -> None:
    batch = edits(4)
    batch["prompts"][1] = "ignore this <|image_pad|>"
    batch["images"][2] = Image.new("RGB", (4000, 8))
    batch["prompts"][3] = "long " * 450
    for reward, known in (
        (EditReward(model=str(folder), urls=[url]), [True, False, False, False]),
        (EditReward(model=str(folder), mode="inprocess", device="cpu"), [True, False, False, True]),
    ):
        output = score(reward, batch)
        assert [value is not None for value in output.scores] == known
        assert [value is not None for value in output.components["quality"]] == known


def test_the_builtin_passes_check_and_readiness_by_both_ways(folder: Path, url: str) -> None:
    for params in ({"urls": [url]}, {"mode": "inprocess"}):
        params = {"model": str(folder), **params}
        limit_s = default_timeout_s("editreward", params)
        loaded = load_reward(RewardSpec("editreward", params=params, timeout_s=limit_s))
        assert loaded.label == "editreward"
        rewards = RewardSet("s", "edit", [loaded.spec])
        assert asyncio.run(try_reward(loaded, rewards, probe=True)) == []


def test_groups_that_queue_for_the_model_in_process_are_scored_in_one_pass_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once take .25 s each, and a call may take .6 s: its clock begins with its pass."""
    passes = []

    class SlowModel:
        def __init__(self, *_: Any) -> None: ...

        def outputs(self, edits: list[Any]) -> list[list[float]]:
            passes.append(len(edits))
            time.sleep(0.25)
            return [[0.0] * 3] * len(edits)

    monkeypatch.setattr("rewards.editreward.client_local.LocalModel", SlowModel)
    params = {"model": str(folder), "mode": "inprocess"}
    loaded = load_reward(RewardSpec("editreward", params=params, timeout_s=0.6))
    batch = RewardBatch(**edits(2))

    async def four() -> list[Any]:
        return await asyncio.gather(*(score_group(k, [loaded], batch) for k in range(4)))

    assert all(None not in group.rewards for group in asyncio.run(four()))
    assert passes == [2] * 4


def answered(url: str) -> int:
    """Requests that vLLM has answered with numbers, by its own count."""
    import httpx

    lines = httpx.get(f"{url}/metrics", timeout=120).text.splitlines()
    found = [line for line in lines if line.startswith("http_requests_total{") and '"/classify"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in found if 'status="2xx"' in line)


def test_vllm_killed_in_mid_run_is_restarted_and_every_edit_gets_its_own_score(
    folder: Path, serving: Serving
) -> None:
    batch = edits(60)
    reward = EditReward(model=str(folder), urls=[serving.url], concurrency=2, unavailable_s=START_TIMEOUT_S)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(score(reward, batch)), daemon=True)
    before = answered(serving.url)
    asking.start()
    wait_for(lambda: answered(serving.url) >= before + 10, 60)
    serving.kill_server()
    asking.join(START_TIMEOUT_S)
    expected = score(EditReward(model=str(folder), mode="inprocess", device="cpu"), batch)
    assert None not in found[0].scores
    assert np.abs(np.array(found[0].scores) - np.array(expected.scores)).max() < 1e-4
    text = serving.log.read_text()
    assert f"ready: {read_card(folder).served_name}\n{serving.url}\n" in text
    assert "[replica 0] " in text
    assert "replica 0 at " in text and "restart 1 of 5 in 1 s" in text


def test_problems_are_found_before_anything_is_sent(folder: Path, tmp_path: Path) -> None:
    assert EditReward(model=str(folder), urls=["http://127.0.0.1:1"]).check() == []
    assert "no such folder" in EditReward(model="/none", urls=["http://h:1"]).check()[0]
    problems = EditReward(model=str(folder), mode="local", concurrency=0, device="tpu").check()
    assert [problem.split()[0] for problem in problems] == ["mode", "concurrency", "device"]
    assert "urls is empty" in EditReward(model=str(folder)).check()[0]
    assert "asks no server" in EditReward(model=str(folder), mode="inprocess", urls=["http://h:1"]).check()[0]
    assert "write it as" in EditReward(model=str(folder), urls=["h:1"]).check()[0]
    edited = shutil.copytree(folder, tmp_path / "edited")
    record = json.loads((edited / "editreward.json").read_text())
    (edited / "editreward.json").write_text(json.dumps(record | {"means": [5.0, 5.5, 7.0]}))
    (problem,) = EditReward(model=str(edited), urls=["http://h:1"]).check()
    assert "changed since the export" in problem
    cut = shutil.copytree(folder, tmp_path / "cut")
    os.truncate(cut / "model.safetensors", 100_000)
    (problem,) = EditReward(model=str(cut), mode="inprocess").check()
    assert "a weight file is not whole" in problem


def test_samples_without_a_reference_stop_the_run(folder: Path) -> None:
    batch = edits(1) | {"references": [[]]}
    with pytest.raises(FatalRewardError, match="no reference picture"):
        score(EditReward(model=str(folder), mode="inprocess"), batch)


def test_samples_with_two_references_stop_the_run(folder: Path) -> None:
    (one,) = edits(1)["references"]
    batch = edits(2) | {"references": [one, one * 2]}
    with pytest.raises(FatalRewardError, match="edits of one picture; here are 2 references"):
        score(EditReward(model=str(folder), mode="inprocess"), batch)


class Stub:
    """A server that answers `/classify` with what `plays` holds next, in the end with `[0, 0, 0]`."""

    def __init__(
        self, served_name: str, plays: list[tuple[int, Any]] | None = None, slow_s: float = 0.0
    ) -> None:
        self.served_name, self.plays, self.slow_s = served_name, list(plays or []), slow_s
        self.asked = 0
        self.most = self.now = 0
        self.lock = threading.Lock()

    def answer(self, path: str) -> tuple[int, Any]:
        if path == "/health":
            return 200, ""
        if path == "/v1/models":
            return 200, {"data": [{"id": self.served_name}]}
        with self.lock:
            self.asked += 1
            self.now += 1
            self.most = max(self.most, self.now)
            play = self.plays.pop(0) if self.plays else (200, {"data": [{"probs": [0.0, 0.0, 0.0]}]})
        time.sleep(self.slow_s)
        with self.lock:
            self.now -= 1
        return play


@contextmanager
def running(stub: Stub, port: int = 0) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, content = stub.answer(self.path)
            payload = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def stubbed(folder: Path, *urls: str, **params: Any) -> EditReward:
    return EditReward(model=str(folder), urls=urls, **params)


def test_many_requests_are_in_flight_and_shared_out_to_who_has_least(folder: Path) -> None:
    name = read_card(folder).served_name
    fast, slow = Stub(name), Stub(name, slow_s=0.2)
    with running(fast) as first, running(slow) as second:
        output = score(stubbed(folder, first, second, concurrency=6), edits(30))
    assert None not in output.scores
    assert fast.asked + slow.asked == 30
    assert fast.asked > 2 * slow.asked, "the slow one keeps its requests, so it gets fewer"
    assert 2 <= slow.most <= 6


def test_requests_of_a_replica_that_goes_away_go_to_another(folder: Path) -> None:
    name = read_card(folder).served_name
    bad, good = Stub(name, [(503, {"error": {"message": "engine is dead"}})] * 3), Stub(name)
    with running(bad) as first, running(good) as second:
        output = score(stubbed(folder, first, second, "http://127.0.0.1:9"), edits(20))
    assert output.scores == [pytest.approx((5 * 5.5 * 6) ** (1 / 3) / 10)] * 20


@pytest.mark.parametrize("play", [(408, {}), (425, {}), (429, {}), (200, b"<html>busy</html>")])
def test_what_a_gateway_says_of_the_moment_is_waited_out(folder: Path, play: tuple[int, Any]) -> None:
    stub = Stub(read_card(folder).served_name, [play])
    with running(stub) as url:
        assert score(stubbed(folder, url, unavailable_s=60.0), edits(1)).scores[0] is not None
    assert stub.asked == 2


def test_a_lone_replica_is_waited_for_until_it_is_back(folder: Path) -> None:
    stub = Stub(read_card(folder).served_name)
    with running(stub) as url:
        pass  # the port is known and closed again
    reward = stubbed(folder, url, unavailable_s=240.0)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(score(reward, edits(3))))
    asking.start()
    time.sleep(0.3)
    assert not found
    with running(stub, int(url.rpartition(":")[2])):
        asking.join(240)
    assert None not in found[0].scores and len(found[0].scores) == 3


def test_when_nobody_answers_the_run_stops_and_names_every_replica(folder: Path) -> None:
    reward = stubbed(folder, "http://127.0.0.1:9", "http://127.0.0.1:11", unavailable_s=1.5)
    with pytest.raises(
        FatalRewardError, match=r"unavailable_s=1.5 s: http://127.0.0.1:9 .*http://127.0.0.1:11 "
    ):
        score(reward, edits(2))


def test_a_call_that_is_cut_short_still_counts_as_silence(folder: Path) -> None:
    reward = stubbed(folder, "http://127.0.0.1:9", unavailable_s=1.0)

    async def call(limit_s: float) -> None:
        async with asyncio.timeout(limit_s):
            await reward.score(**edits(1))

    with pytest.raises(TimeoutError):
        asyncio.run(call(0.6))
    with pytest.raises(FatalRewardError, match="no replica answered"):
        asyncio.run(call(0.8))


@pytest.mark.parametrize(
    ("play", "said"),
    [
        ((200, {"data": [{"probs": [0.0]}]}), "1 numbers where the model has 3"),
        ((200, {"choices": []}), "none where the model has 3"),
        ((401, {"error": {"message": "who are you"}}), "HTTP 401: who are you"),
    ],
)
def test_what_no_later_call_can_mend_stops_the_run(folder: Path, play: tuple[int, Any], said: str) -> None:
    with (
        running(Stub(read_card(folder).served_name, [play])) as url,
        pytest.raises(FatalRewardError, match=said),
    ):
        score(stubbed(folder, url), edits(1))


def test_an_edit_that_servers_choke_on_is_missing_and_never_a_number(folder: Path, caplog: Any) -> None:
    name = read_card(folder).served_name
    broken = [(500, {"error": {"message": "boom"}})] * 3
    with running(Stub(name, [*broken, (200, {"data": [{"probs": [0.0, None, 0.0]}]})])) as url:
        reward = stubbed(folder, url, concurrency=1)
        assert score(reward, edits(2)).scores == [None, None]
        assert score(reward, edits(1)).scores[0] is not None
    assert "3 times" in caplog.text and "boom" in caplog.text and "not finite" in caplog.text
