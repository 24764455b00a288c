"""What passes between the protocols, which know templates and scores, and the client, which knows the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from PIL import Image


class Outcome(StrEnum):
    """How one question to the judge ended, the gravest first: what another call cannot mend before what it can.

    FATAL: no later call can succeed (401, 403, 404, exhausted quota, a parameter the model does not have); it stops
    the run. REJECTED: the endpoint does not take this very request (400, 413, 422 and other 4xx). REFUSED: the model
    declined. FILTERED: a content filter cut in. TRUNCATED: the token limit ended it. MALFORMED: it does not say what
    was asked. RATE_LIMITED: 429 to the last attempt. TIMEOUT: no answer in time. UNAVAILABLE: 5xx or a lost
    connection to the last attempt. OK: a complete answer, though perhaps one that cannot be read; it alone may become
    a score.
    """

    FATAL = "fatal"
    REJECTED = "rejected"
    REFUSED = "refused"
    FILTERED = "filtered"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"
    RATE_LIMITED = "rate_limited"
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"
    OK = "ok"


INFRASTRUCTURE = (Outcome.RATE_LIMITED, Outcome.TIMEOUT, Outcome.UNAVAILABLE)
"""Outcomes that a later call may mend."""


@dataclass(frozen=True)
class JudgeRequest:
    """One chat completion to ask for.

    template, template_sha256: name with version, and hash of the template's text, stored with every answer.
    system: system turn, "" for none. parts: texts and RGB images of the user turn in order. instruction: the prompt
    or edit instruction being judged (part of the cache key). response_schema: JSON schema the answer must follow, or
    None for free text. top_logprobs: how many alternatives to return for each answer token, 0 for none.
    ask: 0 for the first time, 1, 2, ... when a malformed answer is asked for again.
    """

    template: str
    template_sha256: str
    system: str
    parts: tuple[str | Image.Image, ...]
    instruction: str
    max_tokens: int
    response_schema: Mapping[str, Any] | None = None
    top_logprobs: int = 0
    ask: int = 0


class TokenChoices(NamedTuple):
    """One answer token: its text and the alternatives with their natural-log probabilities, best first."""

    token: str
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class JudgeReply:
    """What came back. `text` is "" unless the outcome is OK; `detail` says why it is not, without secrets. `choices`
    may also come with TRUNCATED: the first tokens are there, which is all that an expected score needs.

    model: the snapshot the endpoint says it used. tokens: what was billed for all attempts, as the endpoint
    reports it. attempts: HTTP requests made; 0 with `cached`.
    """

    outcome: Outcome
    text: str = ""
    detail: str = ""
    choices: tuple[TokenChoices, ...] = ()
    model: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    attempts: int = 0
    cached: bool = False

    @property
    def readable(self) -> bool:
        """Whether a score may come of it: an OK one, or one cut off after tokens whose log-probabilities came."""
        return self.outcome is Outcome.OK or (self.outcome is Outcome.TRUNCATED and bool(self.choices))


class Asker(Protocol):
    """Anything that answers questions: the client, or a script in a test."""

    async def ask(self, request: JudgeRequest) -> JudgeReply: ...
