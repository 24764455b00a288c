"""An OpenAI-compatible endpoint on a real port that judges pictures by their pixels, and misbehaves on demand.

In a test, in a thread:
    with JudgeServer(plays=[Play("rate_limited", headers={"retry-after": "0.1"}), Play("ok")]) as server:
        ... server.base_url, server.records, server.high_water
As a process, to be killed and started again on the same port:
    python -m tests.fakes.judge_server --port 8123 --script plays.json --grade my_grades.py:grade

A request gets the first play left whose `when` occurs in its text, and a good answer when there is none: a grade
for every name the text asks for, or one digit, by `grade(images, text)` in [0, 1].
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import hashlib
import io
import json
import runpy
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse
from PIL import Image

from tests.fakes.judge_plays import PLAYS, Asked, Grade, Play, Score, error

START_TIMEOUT_S = 120.0
MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True)
class Record:
    """One request as it arrived; of the token only the hash of what was sent.

    images: sha256 of the decoded pixels (mode, size, bytes) in order. mimes, magics: as declared, and as the
    first bytes say. parts: "text" and "image" in order. attempt: 1 for the first request with these messages.
    """

    play: str
    model: str
    text: str
    system: str
    parts: tuple[str, ...]
    images: tuple[str, ...]
    mimes: tuple[str, ...]
    magics: tuple[str, ...]
    arguments: dict[str, Any]
    headers: dict[str, str]
    token_sha256: str | None
    attempt: int


def brightness(images: list[Image.Image], text: str) -> float:
    """The default grade: mean of the last picture's channels."""
    return float(np.asarray(images[-1].convert("RGB"), dtype=np.float64).mean() / 255) if images else 0.5


class _PromptServer(uvicorn.Server):
    """Ends at once, where uvicorn looks ten times a second whether it shall and waits for answers under way."""

    async def main_loop(self) -> None:
        await self.on_tick(0)
        while not self.should_exit:
            await asyncio.sleep(0.005)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        for task in self.server_state.tasks:
            task.cancel()


class JudgeServer:
    """The endpoint, in a thread. `stop` and `start` again keep the port, the plays left and the records."""

    def __init__(
        self,
        plays: Sequence[Play] = (),
        *,
        grade: Grade = brightness,
        score: Score | None = None,
        port: int = 0,
        token: str | None = None,
    ) -> None:
        self.plays = [[play, play.times] for play in plays]
        self.grade, self.score, self.token, self.port = grade, score, token, port
        self.records: list[Record] = []
        self.high_water = 0
        self._in_flight = 0
        self._attempts: collections.Counter[str] = collections.Counter()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> JudgeServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; returns when requests are answered."""
        listener = socket.create_server(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(self.app(), log_level="critical", lifespan="off", http="h11")
        self._server = _PromptServer(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._server.started:
            if time.monotonic() > deadline:
                raise RuntimeError("the judge server did not start")
            time.sleep(0.002)

    def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(START_TIMEOUT_S)
        self._server = self._thread = None

    def run(self) -> None:
        """Serve in this thread until interrupted."""
        self._server = uvicorn.Server(
            uvicorn.Config(self.app(), port=self.port, log_level="warning", http="h11")
        )
        self._server.run()

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/health")
        async def health() -> dict[str, str]:
            return {"status": "ok"}

        @app.get("/records")
        async def records() -> dict[str, Any]:
            return {"high_water": self.high_water, "records": [asdict(record) for record in self.records]}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            self._in_flight += 1
            self.high_water = max(self.high_water, self._in_flight)
            try:
                return await self._answer(request)
            finally:
                self._in_flight -= 1

        return app

    async def _answer(self, request: Request) -> Response:
        body = await request.json()
        images, record = self._read(request, body)
        play = self._next(record.text)
        self.records.append(replace(record, play=play.kind))
        await asyncio.sleep(play.seconds)
        sent = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.token is not None and sent != self.token:
            return error(401, f"Incorrect API key provided: {sent}", "invalid_api_key", play)
        if play.kind in ("reset", "reset_in_body"):
            return self._reset(request, in_body=play.kind == "reset_in_body")
        return PLAYS[play.kind](Asked(self.grade, self.score, body, images, record.text, play))

    def _next(self, text: str) -> Play:
        for entry in self.plays:
            play, left = entry
            if play.when in text and (left > 0 or play.times == 0):
                entry[1] -= 1
                return play
        return Play("ok")

    def _read(self, request: Request, body: dict[str, Any]) -> tuple[list[Image.Image], Record]:
        system = "".join(turn["content"] for turn in body["messages"] if turn["role"] == "system")
        (user,) = (turn for turn in body["messages"] if turn["role"] == "user")
        kinds, texts, mimes, magics, images = [], [], [], [], []
        for part in user["content"]:
            kinds.append("text" if part["type"] == "text" else "image")
            if part["type"] == "text":
                texts.append(part["text"])
                continue
            head, _, data = part["image_url"]["url"].partition(";base64,")
            content = base64.b64decode(data, validate=True)
            mimes.append(head.removeprefix("data:"))
            magics.append(
                next((mime for magic, mime in MAGIC.items() if content.startswith(magic)), "unknown")
            )
            images.append(Image.open(io.BytesIO(content)))
            images[-1].load()
        key = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()
        self._attempts[key] += 1
        token = request.headers.get("authorization")
        record = Record(
            play="",
            model=body["model"],
            text="\n".join(texts),
            system=system,
            parts=tuple(kinds),
            images=tuple(pixels_sha256(image) for image in images),
            mimes=tuple(mimes),
            magics=tuple(magics),
            arguments={name: value for name, value in body.items() if name not in ("messages", "model")},
            headers={name: value for name, value in request.headers.items() if name != "authorization"},
            token_sha256=None if token is None else hashlib.sha256(token.encode()).hexdigest(),
            attempt=self._attempts[key],
        )
        return images, record

    def _reset(self, request: Request, *, in_body: bool) -> Response:
        """Cut the TCP connection with RST: at once, or after half an answer."""
        assert self._server is not None and request.client is not None
        (transport,) = (
            connection.transport  # type: ignore[union-attr]
            for connection in self._server.server_state.connections
            if connection.client == tuple(request.client)  # type: ignore[union-attr]
        )

        def cut() -> None:
            at_once = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            transport.abort()

        async def half() -> Any:
            yield b'{"choices": [{"mess'
            await asyncio.sleep(0.05)
            cut()

        if in_body:
            return StreamingResponse(half(), media_type="application/json")
        cut()
        return Response()


def pixels_sha256(image: Image.Image) -> str:
    """Hash of mode, size and pixels."""
    head = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def read_script(path: str) -> list[Play]:
    """Plays from a JSON list of kinds, or of objects with the fields of `Play`."""
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    return [Play(entry) if isinstance(entry, str) else Play(**entry) for entry in entries]


def read_function(reference: str) -> Callable[..., Any]:
    """`path/to/file.py:function`."""
    path, _, name = reference.rpartition(":")
    return runpy.run_path(path)[name]


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--script", help="JSON list of plays")
    parser.add_argument("--grade", help="file.py:function of (images, text) -> [0, 1]")
    parser.add_argument("--score", help="file.py:function of (images, text) -> the whole answer")
    words = parser.parse_args()
    JudgeServer(
        read_script(words.script) if words.script else (),
        grade=read_function(words.grade) if words.grade else brightness,
        score=read_function(words.score) if words.score else None,
        port=words.port,
    ).run()


if __name__ == "__main__":
    main()
