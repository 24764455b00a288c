"""Answers kept by what was asked: in a file that all workers share and a later run replays, or in memory.

The key is a hash over all that shapes an answer: model, template and its hash, every word and picture in order,
the instruction, the sampling, and how often it was asked. The endpoint is not part of it: the same model behind
another address answers for it, so give other weights another model name or another file. Since two local models are
easily served under one name, a file knows which endpoints its answers are of, and the client warns of others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import TypeAdapter

from rewards.judge.messages import JudgeReply, JudgeRequest, Outcome, TokenChoices
from rewards.judge.settings import JudgeSettings
from rewards.judge.store import Store, StoreError
from rewards.judge.wire import sampling

KEPT_IN_MEMORY = 4096
_CHOICES = TypeAdapter(tuple[TokenChoices, ...])


@dataclass(frozen=True)
class Fingerprint:
    """A request as the cache knows it. images: sha256 of each picture's mode, size and pixels, in order.

    columns: what else a row says about the request, by column.
    """

    key: str
    images: tuple[str, ...]
    columns: dict[str, Any]

    def describe(self) -> str:
        """What was asked, in one line, for an error."""
        images = ", ".join(digest[:12] for digest in self.images) or "none"
        asked = self.columns
        return (
            f"model {asked['model']!r}, template {asked['template']} ({asked['template_sha256'][:12]}), instruction "
            f"{asked['instruction'][:80]!r}, images {images}, ask {asked['ask']}, key {self.key[:12]}"
        )


def identify(settings: JudgeSettings, request: JudgeRequest) -> Fingerprint:
    """Hash a request. Reads every pixel: about a millisecond for a megapixel, so keep it off the event loop."""
    parts = [
        ("text", part) if isinstance(part, str) else ("image", image_sha256(part)) for part in request.parts
    ]
    chosen = sampling(settings, request)
    asked = {
        "model": settings.model,
        "template": [request.template, request.template_sha256],
        "system": request.system,
        "parts": parts,
        "instruction": request.instruction,
        "sampling": chosen,
        "ask": request.ask,
    }
    canonical = json.dumps(asked, sort_keys=True, separators=(",", ":"), allow_nan=False)
    columns = {
        "model": settings.model,
        "template": request.template,
        "template_sha256": request.template_sha256,
        "instruction": request.instruction,
        "sampling": json.dumps(chosen, sort_keys=True),
        "ask": request.ask,
    }
    images = tuple(value for kind, value in parts if kind == "image")
    return Fingerprint(hashlib.sha256(canonical.encode()).hexdigest(), images, columns)


def image_sha256(image: Image.Image) -> str:
    """Hash of what the picture shows, however it came here: mode, size and pixels."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


class MemoryAnswers:
    """The last answers, a few batches of every reward, so that a group that is scored again is not paid again."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, JudgeReply] = OrderedDict()
        self._lock = threading.Lock()  # the client looks up and stores in threads

    def get(self, asked: Fingerprint) -> JudgeReply | None:
        with self._lock:
            reply = self._kept.get(asked.key)
            if reply is not None:
                self._kept.move_to_end(asked.key)
            return reply

    def put(self, asked: Fingerprint, reply: JudgeReply) -> None:
        with self._lock:
            self._kept[asked.key] = reply
            while len(self._kept) > KEPT_IN_MEMORY:
                self._kept.popitem(last=False)

    def check(self) -> None: ...

    def close(self) -> None: ...


class FileAnswers(Store):
    """Answers in an SQLite file with JSON columns. Every method blocks and may raise StoreError: see `store.py`."""

    name = "a cache of the judge"
    kind = 0x6A756463
    version = 1
    schema = """CREATE TABLE answers (
    key TEXT PRIMARY KEY, outcome TEXT NOT NULL, text TEXT NOT NULL, detail TEXT NOT NULL, choices TEXT NOT NULL,
    model TEXT NOT NULL, snapshot TEXT NOT NULL, template TEXT NOT NULL, template_sha256 TEXT NOT NULL,
    instruction TEXT NOT NULL, images TEXT NOT NULL, sampling TEXT NOT NULL, ask INTEGER NOT NULL,
    answered INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    attempts INTEGER NOT NULL, answered_at REAL NOT NULL
) WITHOUT ROWID"""

    def get(self, asked: Fingerprint) -> JudgeReply | None:
        """The stored reply as it was given."""
        with self.transaction(write=False) as connection:
            row = connection.execute(
                "SELECT outcome, text, detail, choices, snapshot, prompt_tokens, completion_tokens, attempts "
                "FROM answers WHERE key = ?",
                (asked.key,),
            ).fetchone()
        if row is None:
            return None
        try:
            outcome, text, detail, choices, *rest = row
            return JudgeReply(Outcome(outcome), text, detail, _CHOICES.validate_json(choices), *rest)
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"{self.path}: the answer of key {asked.key[:12]} cannot be read ({error}); delete that row"
            ) from error

    def endpoints(self, model: str, urls: Sequence[str]) -> list[str]:
        """Who gives the answers of `model`: whoever was asked first with this file, `urls` where nobody has."""
        with self.transaction(write=True) as connection:
            # Not in `schema`, since files without it are still read.
            connection.execute(
                "CREATE TABLE IF NOT EXISTS endpoints (model TEXT PRIMARY KEY, urls TEXT NOT NULL)"
            )
            values = model, json.dumps(urls)
            connection.execute("INSERT OR IGNORE INTO endpoints VALUES (?, ?)", values)
            (first,) = connection.execute("SELECT urls FROM endpoints WHERE model = ?", (model,)).fetchone()
        return list(json.loads(first))

    def put(self, asked: Fingerprint, reply: JudgeReply) -> None:
        """Keep a reply, unless there is an answer already."""
        values = asked.columns | {
            "key": asked.key,
            "images": json.dumps(asked.images),
            "outcome": reply.outcome.value,
            "text": reply.text,
            "detail": reply.detail,
            "choices": json.dumps(reply.choices),
            "snapshot": reply.model,
            "answered": int(reply.readable),
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "attempts": reply.attempts,
            "answered_at": time.time(),
        }
        names = ", ".join(values)
        updates = ", ".join(f"{name} = excluded.{name}" for name in values)
        with self.transaction(write=True) as connection:
            connection.execute(
                f"INSERT INTO answers ({names}) VALUES ({', '.join('?' * len(values))}) "
                f"ON CONFLICT (key) DO UPDATE SET {updates} WHERE NOT answers.answered",
                tuple(values.values()),
            )


def as_cached(reply: JudgeReply) -> JudgeReply:
    """The reply as it costs now: no request, no tokens."""
    return dataclasses.replace(reply, prompt_tokens=0, completion_tokens=0, attempts=0, cached=True)
