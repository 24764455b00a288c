"""A run lives through what happens to its reward services, and stops by name when they are gone for good."""

import asyncio
import dataclasses
import signal
import socket
import textwrap
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from PIL import Image

from core.prompts import Prompt
from rewards import worker
from rewards.base import FatalRewardError, RewardLoadError, RewardSet, RewardSpec
from rewards.calling import RewardBatch, call_reward
from rewards.checks import check_rewards
from rewards.loading import load_reward
from rewards.scoring import score_group
from rewards.service import client
from rewards.worker import RewardScorer
from tests.fakes.service_process import Service, ServiceThread, served, write_recipe

SLOW = """
    import asyncio

    async def slow(*, images, prompts, references, metadata, scale=1.0):
        await asyncio.sleep(0.15)
        return [scale * image.getpixel((0, 0))[0] / 255 for image in images]
"""
GROUPS, SIZE = 24, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("services")


@pytest.fixture(scope="module")
def slow_name(folder):
    path = folder / "slow_reward.py"
    path.write_text(textwrap.dedent(SLOW))
    return f"{path}:slow"


@pytest.fixture(scope="module")
def start(folder, slow_name):
    """Starts services of the slow reward; what is left of them is ended with the module."""
    running = []

    def start_service(port=0):
        recipe = write_recipe(folder, {"t2i": [{"name": slow_name}]}, f"{len(running)}.yaml")
        running.append(Service(recipe, port=port))
        return running[-1].ready()

    yield start_service
    for service in running:
        service.stop()


@pytest.fixture(scope="module")
def start_thread(slow_name):
    """Starts services in this process, where none has to die as processes do."""
    running = []

    def start_service(reward=None, **trial):
        running.append(ServiceThread(RewardSet("set", "t2i", [reward or RewardSpec(slow_name)], **trial)))
        return running[-1]

    yield start_service
    for service in running:
        service.stop()


@pytest.fixture(scope="module")
def steady(start_thread):
    """A service that no test ends."""
    return start_thread().ready()


def groups():
    levels = np.random.default_rng(0).integers(0, 256, (GROUPS, SIZE))
    images = [[Image.new("RGB", (16, 16), (int(level),) * 3) for level in row] for row in levels]
    return [RewardBatch(row, ["p"] * SIZE, [[]] * SIZE, [{}] * SIZE) for row in images]


def expected():
    levels = np.random.default_rng(0).integers(0, 256, (GROUPS, SIZE))
    return (levels / 255).tolist()


async def score_all(loaded, after=None):
    """All groups, four at a time, as a reward worker does; `after` is run when the sixth has been scored."""
    slots, done, happening = asyncio.Semaphore(4), [], []

    async def one(number, batch):
        async with slots:
            group = await score_group(number, [loaded], batch)
        done.append(number)
        if len(done) == 6 and after is not None:
            happening.append(asyncio.create_task(asyncio.to_thread(after)))
        return group

    async with asyncio.timeout(60):
        scored = await asyncio.gather(*(one(k, batch) for k, batch in enumerate(groups())))
        await asyncio.gather(*happening)
    return scored


def assert_undisturbed(scored):
    assert [group.rewards for group in scored] == expected()
    assert all(group.failures == {} and list(group.attempts.values()) == [1] for group in scored)


def test_two_services_share_the_work_and_the_death_of_one_loses_nothing(start, steady, slow_name):
    mortal, before = start(), requests_of(steady)
    loaded = load_reward(served(RewardSpec(slow_name), steady.url, mortal.url))
    assert asyncio.run(loaded.owner.readiness()) == []
    assert_undisturbed(asyncio.run(score_all(loaded, after=mortal.stop)))
    assert GROUPS / 2 < requests_of(steady) - before < GROUPS


def requests_of(service):
    lines = httpx.get(f"{service.url}/metrics", trust_env=False).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("reward_requests_total"))


def test_a_restart_on_the_same_port_is_waited_for(start, slow_name):
    first = start()
    loaded = load_reward(served(RewardSpec(slow_name), first.url))

    def restart():
        first.stop()
        start(port=first.port)

    assert_undisturbed(asyncio.run(score_all(loaded, after=restart)))


def test_a_service_gone_for_good_stops_the_run_within_the_stated_time(start_thread, slow_name):
    mortal, nobody = start_thread().ready(), f"http://127.0.0.1:{free_port()}"
    loaded = load_reward(served(RewardSpec(slow_name), mortal.url, nobody, unavailable_s=1.5))
    with pytest.raises(FatalRewardError) as raised:
        asyncio.run(score_all(loaded, after=mortal.stop))
    assert "no service answered for service.unavailable_s=1.5 s" in str(raised.value)
    assert f"{mortal.url} (" in str(raised.value) and f"{nobody} (ConnectError" in str(raised.value)


def test_a_service_that_hangs_is_noticed(start, steady, slow_name, monkeypatch):
    for name, seconds in (("WATCH_S", 0.4), ("ALIVE_S", 0.5), ("ASK_S", 0.5)):
        monkeypatch.setattr(client, name, seconds)
    frozen = start()
    alone = load_reward(served(RewardSpec(slow_name), frozen.url, unavailable_s=1.0))
    both = load_reward(served(RewardSpec(slow_name), frozen.url, steady.url))
    frozen.send(signal.SIGSTOP)
    try:
        with pytest.raises(FatalRewardError, match=r"no answer to /(healthz|v1/rewards) in 0.5 s"):
            asyncio.run(score_all(alone))
        assert_undisturbed(asyncio.run(score_all(both)))
    finally:
        frozen.send(signal.SIGCONT)


def test_one_reward_serves_several_event_loops(steady, slow_name):
    loaded, batch = load_reward(served(RewardSpec(slow_name), steady.url)), groups()[0]
    results = [asyncio.run(call_reward(loaded, batch)) for _ in range(2)]
    threads = [
        threading.Thread(target=lambda: results.append(asyncio.run(call_reward(loaded, batch))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert [result.scores for result in results] == [expected()[0]] * 5


def test_a_reward_worker_scores_the_same_with_a_served_reward(start_thread, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spec = RewardSpec("geneval_shapes", weight=0.5, params={"credit": "strict"}, label="rules")
    wanted = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    service = start_thread(spec, example_metadata=wanted, height=32, width=32)
    prompts = [Prompt(0, "t2i", "a red circle", (), wanted)] * 6
    images = np.stack([disc(radius) for radius in range(6)])

    def score(reward):
        rewards = RewardSet("set", "t2i", [reward], example_metadata=wanted, height=32, width=32)
        scorer = RewardScorer([rewards])
        info = asyncio.run(scorer.ready())
        assert info.sources["set"]["rules"].name == "geneval_shapes"
        group = asyncio.run(scorer.score((4, 2), "set", prompts, images[:4], images[4:]))
        assert group.seconds["rules"] > 0
        return dataclasses.replace(group, seconds={})

    here, there = score(spec), score(served(spec, service.url))
    assert there == here and set(here.rewards) == {0.0, 0.5}


def disc(radius):
    """A red disc on grey, 32 x 32."""
    y, x = np.mgrid[0:32, 0:32]
    image = np.full((32, 32, 3), 128, np.uint8)
    image[(x - 16) ** 2 + (y - 16) ** 2 <= (2 * radius) ** 2] = (220, 40, 40)
    return image


# What is found before the first sample.


def problems(spec, probe=True):
    return check_rewards(RewardSet("set", "t2i", [spec]), probe=probe)


def test_another_reward_than_the_recipe_means_is_named_with_both(steady, slow_name):
    other = problems(served(RewardSpec(slow_name, params={"scale": 2.0}), steady.url))
    assert len(other) == 1
    for part in (
        steady.url,
        f"'slow' as {slow_name} with params {{}}",
        f"means {slow_name} with params {{'scale': 2.0}}",
    ):
        assert part in other[0]
    (absent,) = problems(served(RewardSpec("a:fast"), steady.url))
    assert "does not serve reward 'fast'; it serves ['slow']" in absent


def test_a_batch_that_cannot_travel_stops_the_run(steady, slow_name):
    batch = dataclasses.replace(groups()[0], metadata=[{"x": {1, 2}}] * SIZE)
    with pytest.raises(FatalRewardError, match="'slow' cannot be served: prompts and metadata .* plain JSON"):
        asyncio.run(call_reward(load_reward(served(RewardSpec(slow_name), steady.url)), batch))


def test_every_service_that_is_not_there_is_named(steady, slow_name):
    closed = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    found = problems(served(RewardSpec(slow_name), closed[0], steady.url, closed[1], unavailable_s=0.2))
    assert [
        url in problem and "was not ready within" in problem
        for url, problem in zip(closed, found, strict=True)
    ]
    assert len(found) == 2


def test_a_restarted_worker_needs_one_service_and_names_the_others(steady, slow_name, monkeypatch, caplog):
    """One refuses, one takes connections and says nothing; all must answer at a run's start."""
    monkeypatch.setattr(client, "ASK_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        away = [f"http://127.0.0.1:{free_port()}", f"http://127.0.0.1:{hung.getsockname()[1]}"]
        spec = served(RewardSpec(slow_name), *away, steady.url, unavailable_s=1.0)
        scorer = RewardScorer([RewardSet("set", "t2i", [spec], "a disc", {}, 4, 4)])
        with pytest.raises(RewardLoadError) as refused:
            asyncio.run(scorer.ready())
        assert [line.split()[2] for line in str(refused.value).splitlines()] == away
        monkeypatch.setattr(worker, "_restarted", lambda: True)
        asyncio.run(scorer.ready())
        assert all(f"{url} is away" in caplog.text for url in away)
        image = np.full((2, 4, 4, 3), 255, np.uint8)
        score = asyncio.run(scorer.score(0, "set", [Prompt(0, "t2i", "a disc")] * 2, image))
        assert score.rewards == [1.0, 1.0]
    alone = served(RewardSpec(slow_name), away[0], unavailable_s=0.2)
    with pytest.raises(RewardLoadError, match=away[0]):
        asyncio.run(RewardScorer([RewardSet("set", "t2i", [alone], "a disc", {}, 4, 4)]).ready())


def test_a_reward_that_fails_its_trial_is_not_ready_and_says_why(start_thread, folder):
    broken = folder / "broken_reward.py"
    broken.write_text(
        "def broken(*, images, prompts, references, metadata):\n    raise OSError('no weights')\n"
    )
    service = start_thread(RewardSpec(f"{broken}:broken"))
    (problem,) = problems(served(RewardSpec(f"{broken}:broken"), service.url, unavailable_s=0.5))
    assert "was not ready within" in problem and "OSError: no weights" in problem


def test_services_that_run_another_file_are_told_apart(start_thread, folder, slow_name, steady):
    path = folder / "slow_reward.py"
    path.write_text(path.read_text() + "\n# another file now\n")
    try:
        second = start_thread().ready()
    finally:
        path.write_text(textwrap.dedent(SLOW))
    loaded = load_reward(served(RewardSpec(slow_name), steady.url, second.url))
    (problem,) = asyncio.run(loaded.owner.readiness())
    assert "is another file at" in problem and steady.url in problem and second.url in problem
    unchecked = load_reward(served(RewardSpec(slow_name), steady.url, second.url))
    with pytest.raises(FatalRewardError, match="is another file at"):
        asyncio.run(score_all(unchecked))


# What is no reward service at all.


@contextmanager
def answering(status, body):
    """A server that gives every request one answer."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(timeout=10)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (502, b"<html>Bad Gateway</html>", "no service answered .*HTTP 502"),
        (404, b"<html>Not Found</html>", "answered HTTP 404, which no reward service does"),
        (302, b"", "answered HTTP 302"),
        (200, b"<html>Welcome</html>", "what no reward service does"),
        (200, b'{"scores": [NaN], "components": []}', "what no reward service does"),
        (200, b'{"scores": ["high"], "components": {}}', "a score is a number"),
        (200, b'{"scores": [1.0], "components": {}}', "returned 1 scores for 4 images"),
    ],
)
def test_an_answer_from_something_else_stops_the_run(status, body, expected):
    with answering(status, body) as url:
        loaded = load_reward(served(RewardSpec("a:reward"), url, unavailable_s=0.3))
        with pytest.raises(FatalRewardError, match=expected):
            asyncio.run(call_reward(loaded, groups()[0]))


# Which endpoint is next.


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]
