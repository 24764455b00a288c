"""Clients that are slow, silent, endless or hostile: an answer in time, bounded memory, and no harm to the others."""

import asyncio
import gzip
import json
import socket
import struct
import time
import zlib
from pathlib import Path

import httpx
import pytest
from PIL import Image
from starlette.requests import Request

from rewards import base
from rewards.base import FatalRewardError, RewardSet, RewardSpec
from rewards.calling import RewardBatch, call_reward
from rewards.editreward import client_replicas
from rewards.editreward.client_replicas import Replicas
from rewards.loading import load_reward
from rewards.service import bodies, listening
from rewards.service.bodies import Bodies
from rewards.service.wire import MAGIC, MEDIA_TYPE, PREFIX, Call, encode_request, fingerprint
from tests.fakes.hostile_endpoint import HostileEndpoint
from tests.fakes.service_process import Service, ServiceThread, served, write_recipe

FAST = """
def fast(*, images, prompts, references, metadata):
    return [image.getpixel((0, 0))[0] / 255 for image in images]
"""
MB = 2**20
LIMIT_MB = 4
ANSWER_S = 5.0


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "fast_reward.py"
    path.write_text(FAST)
    return f"{path}:fast"


@pytest.fixture(scope="module")
def service(tmp_path_factory, name):
    """A process, whose memory can be measured."""
    recipe = write_recipe(tmp_path_factory.mktemp("service"), {"t2i": [{"name": name}]})
    running = Service(
        recipe, "--max-request-mb", str(LIMIT_MB), "--token-env", "SERVICE_TOKEN", SERVICE_TOKEN="sesame"
    )
    yield running.ready()
    running.stop()


@pytest.fixture
def impatient(name, monkeypatch):
    """A service that waits for nobody."""
    monkeypatch.setattr(listening, "WAIT_S", 0.3)
    monkeypatch.setattr(bodies, "BODY_S", 0.3)
    monkeypatch.setenv("SERVICE_TOKEN", "sesame")
    trial = RewardSet("set", "t2i", [RewardSpec(name)], height=8, width=8)
    running = ServiceThread(trial, token_env="SERVICE_TOKEN")
    yield running.ready()
    running.stop()


def port_of(service):
    return int(service.url.rpartition(":")[2])


def head(length, **changes):
    headers = {"host": "x", "content-type": MEDIA_TYPE, "authorization": "Bearer sesame"}
    headers |= {"content-length": str(length)} | {key.replace("_", "-"): v for key, v in changes.items()}
    lines = [f"{key}: {value}" for key, value in headers.items() if value is not None]
    return "\r\n".join(["POST /v1/score/fast HTTP/1.1", *lines, "", ""]).encode()


def good_body(name):
    images = [Image.new("RGB", (8, 8), (k, k, k)) for k in range(4)]
    given = {"prompts": ["p"] * 4, "references": [[]] * 4, "metadata": [{}] * 4}
    return encode_request(Call(fingerprint(name, {}), 20.0), images=images, **given, codec="raw")


async def say(port, *parts, pause_s=0.0):
    """What comes back, up to the end of the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = asyncio.ensure_future(reader.read())
    try:
        for part in parts:
            if answer.done():
                break
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(pause_s)
        return (await answer).decode(errors="replace")
    except ConnectionError:  # the server answers and closes without having read all
        return ""
    finally:
        answer.cancel()
        writer.close()


def flood():
    line = b"x-%d: " + b"y" * 1000 + b"\r\n"
    yield b"POST /v1/score/fast HTTP/1.1\r\n"
    for number in range(500):
        yield line % number


def test_a_hundred_bad_clients_cost_a_good_one_nothing(service, name):
    """Half-open, dripping and flooding ones, and bodies that stop half-way in more places than there are slots."""

    def peak_mb():
        status = Path(f"/proc/{service.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024

    async def attack():
        half = good_body(name)[:100]
        chunk = b"10000\r\n" + bytes(2**16) + b"\r\n"
        endless = head(0, content_length=None, transfer_encoding="chunked"), *[chunk] * 100
        kinds = [
            [b""],
            [head(9)[:60]],
            [head(MB), half],
            [head(MB), *[b"R"] * 1000],
            [head(MB, authorization="Bearer wrong"), half],
            list(flood()),
            endless,
        ]
        pauses = [0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0]
        return [
            asyncio.ensure_future(say(service.port, *kinds[k % 7], pause_s=pauses[k % 7])) for k in range(105)
        ]

    async def score_meanwhile():
        bad = await attack()
        headers = {"content-type": MEDIA_TYPE, "authorization": "Bearer sesame"}
        async with httpx.AsyncClient(trust_env=False, timeout=ANSWER_S, headers=headers) as client:
            for _ in range(20):
                answer = await client.post(f"{service.url}/v1/score/fast", content=good_body(name))
                assert answer.json()["scores"] == [k / 255 for k in range(4)]
        for task in bad:
            task.cancel()
        await asyncio.gather(*bad, return_exceptions=True)

    before = peak_mb()
    asyncio.run(score_meanwhile())
    assert peak_mb() < before + 60, "15 endless bodies are 100 MB"


def frame(header, rest=b"abc"):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return PREFIX.pack(MAGIC, len(text)) + text + rest


def header(name, metadata="{}", **changes):
    picture = {"codec": "raw", "width": 1, "height": 1, "bytes": 3}
    found = {"fingerprint": fingerprint(name, {}), "timeout_s": 5.0, "prompts": ["p"], "metadata": ["@"]}
    found |= {"images": [0], "references": [[]], "pictures": [picture]} | changes
    return json.dumps(found).replace('"@"', metadata).encode()


def png(name, width, height, announced, text=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", size), *([(b"zTXt", b"k\0\0" + text)] if text else [])]
    parts += [(b"IDAT", zlib.compress(bytes(MB))), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)
    entry = {"codec": "png", "width": announced[0], "height": announced[1], "bytes": len(data)}
    return frame(header(name, pictures=[entry]), data)


MALFORMED = {
    "bad JSON": (lambda n: frame(b"{nope"), 422, "header is not JSON"),
    "NaN": (lambda n: frame(header(n, timeout_s=float("nan"))), 422, "NaN is not JSON"),
    "nested without end": (lambda n: frame(b"[" * 200_000), 422, "recursion"),
    "nested deeply": (lambda n: frame(header(n, '{"a":' * 200 + "1" + "}" * 200)), 422, "nests deeper than 64"),
    "wrong shapes": (lambda n: frame(header(n, images=[0, 1], pictures="x")), 422, "pictures: "),
    "many keys": (lambda n: frame(b"{%s}" % b",".join(b'"%d":0' % k for k in range(100_000))), 422, "keys that"),
    "many wrong entries": (lambda n: frame(header(n, prompts=[1] * 200_000)), 422, "more than 1024 samples"),
    "many values": (lambda n: frame(header(n, '{"a":[' + "[]," * 10**6 + "1]}")), 422, "more than 262144 values"),
    "a long key": (lambda n: frame(header(n, **{"k" * 3 * MB: 1})), 422, "Extra inputs are not permitted"),
    "a large PNG": (lambda n: png(n, 100_000, 100_000, (8, 8)), 422, "pictures.0: "),
    "a large PNG, announced": (lambda n: png(n, 100_000, 100_000, (100_000, 100_000)), 422, "pictures.0.width"),
    "a PNG with text": (lambda n: png(n, 8, 8, (8, 8), zlib.compress(bytes(4 * MB))), 422, "not a sound PNG"),
    "gzip": (lambda n: gzip.compress(bytes(20 * MB), 1), 422, "must start with RWB1"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_body_is_refused_at_once_in_a_sentence(service, name, case):
    make, status, text = MALFORMED[case]
    headers = {"content-type": MEDIA_TYPE, "authorization": "Bearer sesame"}
    body, start = make(name), time.monotonic()
    answer = httpx.post(
        f"{service.url}/v1/score/fast", content=body, headers=headers, timeout=ANSWER_S, trust_env=False
    )
    message = answer.json()["error"]["message"]
    assert answer.status_code == status and text in message and len(message) < 500
    assert time.monotonic() - start < ANSWER_S
    assert (
        int(Path(f"/proc/{service.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]) < 4e5
    )


def test_a_declared_body_that_is_too_large_is_refused_unread(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=ANSWER_S) as client:
        client.sendall(head(10**12))
        answer = b""
        while b"}}" not in answer:
            answer += client.recv(1000)
    assert answer.startswith(b"HTTP/1.1 413 ") and b"larger than 4194304 bytes" in answer


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([b""], "HTTP/1.1 408 "),
        ([head(9)[:60]], "HTTP/1.1 408 "),
        ([bytes([byte]) for byte in head(9)], "HTTP/1.1 408 "),
        ([head(99), b"RWB1"], "the request did not arrive within"),
        ([head(99), *[b"R"] * 98], "the request did not arrive within"),
        ([head(99, authorization="Basic x"), b"RWB1"], "HTTP/1.1 401 "),
        ([head(99)[:60] + b"".join(b"x-%d: y\r\n" % k for k in range(9999))], "HTTP/1.1 400 "),
    ],
    ids=["nothing", "head", "dripping head", "body", "dripping body", "no token", "head without end"],
)
def test_what_does_not_come_is_waited_for_no_longer(impatient, parts, expected):
    """And the connection ends, whoever holds it open."""

    async def ask():
        async with asyncio.timeout(ANSWER_S):
            return await say(port_of(impatient), *parts, pause_s=0.05)

    assert expected in asyncio.run(ask())


def test_who_takes_no_answers_is_cut_off(impatient):
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port_of(impatient)))
        client.settimeout(ANSWER_S)
        ask = b"GET /metrics HTTP/1.1\r\nhost: x\r\nauthorization: Bearer sesame\r\n\r\n" * 1000
        with pytest.raises(ConnectionError):
            for _ in range(1000):
                client.sendall(ask)


def test_large_bodies_that_come_at_once_are_read_one_after_the_other():
    """Ten of 100 bytes with room for 150 in all: nobody waits for ever, and never more than 250 are held."""
    held, most = [0], [0]

    async def read_all():
        room = Bodies(100, 150)

        def client():
            left = iter(range(10))

            async def receive():
                await asyncio.sleep(0)
                held[0] += 10
                most[0] = max(most[0], held[0])
                return {"type": "http.request", "body": bytes(10), "more_body": next(left) < 9}

            return Request({"type": "http", "headers": [(b"content-type", MEDIA_TYPE.encode())]}, receive)

        async def one():
            async with room.read(client()) as body:
                await asyncio.sleep(0.01)
                held[0] -= len(body)
                return len(body)

        async with asyncio.timeout(ANSWER_S):
            return await asyncio.gather(*(one() for _ in range(10)))

    assert asyncio.run(read_all()) == [100] * 10
    assert most[0] <= 250 + 10 * 10, "the part in hand of each comes on top"


# What the clients meet.

REASONS = {
    "endless": "larger than 8388608 bytes",
    "gzip bomb": "content-encoding 'gzip', which was not asked for",
    "nested": "no JSON",
    "redirect": "HTTP 307",
    "redirect for ever": "HTTP 307",
}


@pytest.mark.parametrize("kind", REASONS)
@pytest.mark.parametrize("whose", ["service", "editreward"])
def test_a_hostile_endpoint_stops_the_run_in_time_and_learns_no_token(monkeypatch, whose, kind):
    monkeypatch.setenv("CLIENT_TOKEN", "sesame")
    with HostileEndpoint("nested") as other, HostileEndpoint(kind, _elsewhere(kind, other)) as endpoint:
        start = time.monotonic()
        with pytest.raises(FatalRewardError, match=REASONS[kind]):
            asyncio.run(_ask(whose, endpoint.url))
        assert time.monotonic() - start < 2 * ANSWER_S
        assert endpoint.sent < len(endpoint.asked) * 24 * MB, "8 MiB, and what the kernel holds"
    assert other.asked == []


@pytest.mark.parametrize("whose", ["service", "editreward"])
def test_an_answer_a_byte_at_a_time_ends_with_the_call(monkeypatch, whose):
    monkeypatch.setattr(base, "LONGEST_QUEUE_S", 0.0)
    monkeypatch.setattr(client_replicas, "LIST_S", 0.3)
    with HostileEndpoint("dripping") as endpoint:
        start = time.monotonic()
        with pytest.raises((TimeoutError, FatalRewardError)):
            asyncio.run(_ask(whose, endpoint.url))
        assert time.monotonic() - start < ANSWER_S


def _elsewhere(kind, other):
    return other.url if kind == "redirect" else None


async def _ask(whose, url):
    if whose == "editreward":
        limits = {"outputs": 1, "concurrency": 4, "timeout_s": 0.5, "unavailable_s": 0.3}
        return await Replicas([url], "model", **limits).classify({})
    spec = served(RewardSpec("a:reward", timeout_s=0.5), url, unavailable_s=0.3, token_env="CLIENT_TOKEN")
    batch = RewardBatch([Image.new("RGB", (8, 8))], ["p"], [[]], [{}])
    return await call_reward(load_reward(spec), batch)
