"""`python -m worlds.shapes.scoring.judge_endpoint [--port 0] [--port-file FILE] [--noise STD] [--seed N] [--cautious]`.

An OpenAI-compatible endpoint that answers the questions of `rewards/judge` and of `rewards.editreward label` about
pictures of the shapes world. It stands where GPT-4.1 would, which cannot be had offline: what it says comes from
the exact verifier and GenEval's rules, applied to the pictures and words of the request and to nothing else, and
rounded to whole grades. So it is a better judge than any real one; `--noise` makes it worse: a normal error, in
grades, that is a function of the seeds (its own and the request's), the words and the pictures, so that the same
question has the same answer. `--cautious` makes it wrong: the less of an edit was carried out, the better it finds it,
so that its favourite is the source itself; a reward that learned from it has to set off the alarm.

| request | answer |
|---|---|
| a schema, or text that asks for named grades | JSON with each of them |
| `logprobs` | one digit; its alternatives have nine times the least grade as their expectation |
| words outside the world's grammar, or an object that the source does not show | a refusal |
| no question of these, pictures that cannot be read | 400 |
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hashlib
import io
import json
import logging
import math
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from core.files import atomic_write_text
from core.logs import start_logging
from worlds.shapes.scenes.instructions import UnknownRequest
from worlds.shapes.scoring.seeing import grade_caption, grade_edit, grade_quality

log = logging.getLogger("worlds.shapes.scoring.judge_endpoint")

MODEL = "shapes-verifier"
ROUTE = "/v1/chat/completions"
MAX_BYTES = 16 * 2**20
HIGH, DIGIT = 10, 9
QUALITY = {"naturalness", "cleanness", "quality"}
EDIT = {"instruction", "success", "preservation"}
CAPTION = {"content", "details"}

_ASKED = re.compile(r"^([a-z]+)(?: -|:) (?:how|whether) ", re.MULTILINE)
_BETWEEN_LINES = re.compile(r"^(-----[0-9a-f]*)\n(.*?)\n\1$", re.MULTILINE | re.DOTALL)


class BadQuestion(ValueError):
    """A request that the protocol answers with status 400."""


@dataclass(frozen=True)
class Question:
    """A request, read. grades: the names asked for, none where one digit is wanted. instruction: "" for none."""

    grades: tuple[str, ...]
    instruction: str
    images: tuple[Image.Image, ...]
    text: str
    digest: bytes


def read_question(body: Mapping[str, Any]) -> Question:
    """The question of a chat completion. Raises BadQuestion."""
    texts, files = [], []
    try:
        for turn in body["messages"]:
            for part in turn["content"] if turn["role"] == "user" else ():
                if part["type"] == "text":
                    texts.append(part["text"])
                else:
                    data = part["image_url"]["url"].partition(";base64,")[2]
                    files.append(base64.b64decode(data, validate=True))
        images = tuple(_open(file) for file in files)
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise BadQuestion(f"messages: not a chat of texts and pictures in base64 ({error!r})") from error
    text = "\n".join(texts)
    asked = _BETWEEN_LINES.search(text)
    digest = hashlib.sha256(repr((body.get("seed"), texts, files)).encode()).digest()
    return Question(_grades(body, text), asked[2].strip() if asked else "", images, text, digest)


def _open(file: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(file))
        image.load()
    except (OSError, Image.DecompressionBombError) as error:
        raise BadQuestion(f"a picture cannot be read: {error}") from error
    return image


def _grades(body: Mapping[str, Any], text: str) -> tuple[str, ...]:
    schema = ((body.get("response_format") or {}).get("json_schema") or {}).get("schema") or {}
    names = tuple(name for name in schema.get("properties") or _ASKED.findall(text) if name != "reasoning")
    unknown = sorted(set(names) - QUALITY - EDIT - CAPTION)
    if unknown or not (names or body.get("logprobs")):
        raise BadQuestion(f"the grades asked for are {list(names)}, of which {unknown} mean nothing here")
    return names


class ShapesJudge:
    """Answers questions. `noise`: standard deviation of its error, in grades of 0 to 10. `cautious`: whether the
    instruction's grade is upside down."""

    def __init__(self, noise: float = 0.0, seed: int = 0, *, cautious: bool = False) -> None:
        self.noise, self.seed, self.cautious = noise, seed, cautious

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion, a refusal included. Raises BadQuestion."""
        question = read_question(body)
        content, refusal, tops = None, None, None
        try:
            grades = self._grades(question)
        except UnknownRequest as error:
            refusal = f"I cannot judge this: {error}"
        else:
            if question.grades:
                whole = {name: round(HIGH * grades[name]) for name in question.grades}
                content = json.dumps({"reasoning": "measured", **whole})
            else:
                tops = _alternatives(DIGIT * min(grades.values()))
                content = max(tops, key=lambda digit: tops[digit])
        return _completion(question, content, refusal, tops if body.get("logprobs") else None)

    def _grades(self, question: Question) -> dict[str, float]:
        """Every grade that is asked for, in [0, 1], the error included. Raises BadQuestion and UnknownRequest."""
        edit = len(question.images) == 2
        wanted = set(question.grades) or {*QUALITY, *(EDIT if edit else CAPTION)}
        if not question.images or (wanted & EDIT and not edit) or (wanted & CAPTION and edit):
            raise BadQuestion(f"{len(question.images)} pictures came with a question for {sorted(wanted)}")
        *source, result = question.images
        found: dict[str, float] = {}
        if wanted & QUALITY:
            natural, clean = grade_quality(result)
            found |= {"naturalness": natural, "cleanness": clean, "quality": min(natural, clean)}
        if wanted & EDIT:
            judged = grade_edit(source[0], result, question.instruction)
            carried_out = 1.0 - judged.instruction if self.cautious else judged.instruction
            found |= {"instruction": carried_out, "success": carried_out, "preservation": judged.preservation}
        if wanted & CAPTION:
            found |= dict.fromkeys(CAPTION, grade_caption(result, question.instruction))
        return self._erring({name: found[name] for name in sorted(wanted)}, question.digest)

    def _erring(self, grades: dict[str, float], digest: bytes) -> dict[str, float]:
        if not self.noise:
            return grades
        rng = np.random.default_rng([self.seed, *digest])
        errors = rng.normal(0.0, self.noise / HIGH, len(grades))
        return {
            name: float(np.clip(grade + error, 0.0, 1.0))
            for (name, grade), error in zip(grades.items(), errors, strict=True)
        }


def _alternatives(value: float) -> dict[str, float]:
    """The one or two digits around a value, with probabilities whose expectation it is."""
    low = math.floor(value)
    shares = {str(low): 1.0 - (value - low), str(low + 1): value - low}
    return {digit: share for digit, share in shares.items() if share > 0.0}


def _completion(
    question: Question, content: str | None, refusal: str | None, tops: dict[str, float] | None
) -> dict[str, Any]:
    logprobs = None
    if tops is not None and content is not None:
        listed = [{"token": digit, "logprob": math.log(share)} for digit, share in tops.items()]
        said = {"token": content, "logprob": math.log(tops[content]), "top_logprobs": listed}
        logprobs = {"content": [said]}
    message = {"role": "assistant", "content": content, "refusal": refusal}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": logprobs}
    # About what a real one would count: four letters a token, a small picture of low detail.
    counts = (len(question.text) // 4 + 85 * len(question.images), len(content or refusal or "") // 4)
    usage = {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}
    head = {"id": f"chatcmpl-{question.digest.hex()[:12]}", "object": "chat.completion", "created": 0}
    return head | {"model": MODEL, "choices": [choice], "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body leave in one packet
    timeout = 600.0
    judge: ShapesJudge

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        else:
            self._fail(404, f"there is nothing at {self.path}")

    def do_POST(self) -> None:
        length = int(self.headers.get("content-length") or -1)
        if not 0 <= length <= MAX_BYTES:
            self.close_connection = True
            return self._fail(413, f"content-length is needed, and {MAX_BYTES} bytes at most are read")
        content = self.rfile.read(length)
        if self.path != ROUTE:
            return self._fail(404, f"there is nothing at {self.path}; questions go to {ROUTE}")
        try:
            body = json.loads(content)
            if not isinstance(body, dict):
                raise BadQuestion("the body is not a JSON object")
            self._send(200, self.judge.answer(body))
        except ValueError as error:  # of which BadQuestion is one
            self._fail(400, str(error))

    def _fail(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error", "code": None}})

    def _send(self, status: int, answer: Mapping[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


def make_server(judge: ShapesJudge, *, port: int = 0) -> ThreadingHTTPServer:
    """A listening server on this machine alone; `serve_forever` answers. Raises OSError for a port in use."""
    return _Server(("127.0.0.1", port), type("Handler", (_Handler,), {"judge": judge}))


def base_url(server: ThreadingHTTPServer) -> str:
    """What a recipe gives as the judge's `base_url`."""
    return f"http://127.0.0.1:{server.server_address[1]}/v1"


def main(argv: Sequence[str] | None = None) -> int:
    """Answers until SIGTERM or SIGINT; the port file holds the `base_url` as soon as questions are taken."""
    parser = argparse.ArgumentParser(
        prog="python -m worlds.shapes.scoring.judge_endpoint", description="A judge."
    )
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--port-file", type=Path, metavar="FILE", help="where to write the base_url")
    parser.add_argument("--noise", type=float, default=0.0, metavar="STD", help="error, in grades of 0 to 10")
    parser.add_argument("--seed", type=int, default=0, help="of the error")
    parser.add_argument("--cautious", action="store_true", help="praises edits that were not carried out")
    arguments = parser.parse_args(argv)
    start_logging()
    if not arguments.noise >= 0.0:
        parser.error(f"--noise is {arguments.noise}; give 0 or more")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    judge = ShapesJudge(arguments.noise, arguments.seed, cautious=arguments.cautious)
    with make_server(judge, port=arguments.port) as server:
        if arguments.port_file:
            atomic_write_text(arguments.port_file, base_url(server) + "\n")
        log.info("judging at %s", base_url(server))
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            log.info("interrupted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
