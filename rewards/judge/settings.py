"""What a recipe can set about the client that asks the judge, and what is wrong with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, SkipValidation, TypeAdapter

from rewards.parameters import Count, NotNegative, Positive, Seed, value_problems


@dataclass(frozen=True)
class JudgeSettings:
    """How to reach the judge and what it may cost. `concurrency` is that of one reward worker; the limits per minute
    hold for all reward workers of a run together, each of which keeps to its part of them.

    model: name of the model at the endpoint; it identifies the judge in the cache, so give other weights
        another name.
    base_url: an OpenAI-compatible endpoint up to and with its version path, or a list of replicas of one model,
        which take turns; a second attempt goes to the next one.
    api_key_env: name of the environment variable that holds the key; None or "" where none is needed.
    mode: `live` asks and, with `cache`, keeps good answers; `record` also keeps what refusals and failures
        came to; `replay` answers from the cache alone, without network or key.
    cache: SQLite file of answers, shared by all workers; None keeps a few thousand in memory.
    ledger: SQLite file of what was spent, shared by all that spend from one budget; default
        `<cache>.ledger`.
    concurrency: requests in flight. requests_per_minute, tokens_per_minute: None for no limit of ours.
    timeout_s: seconds for one HTTP request. attempts: HTTP requests for one question before it is given up.
    longest_wait_s: seconds between two attempts at most; an endpoint that asks for a longer wait ends the
        question. queue_timeout_s: seconds a question may queue under the limits, in all.
    temperature, seed: sent when not None. A question asked again is sent with seed + ask.
    image_format: `png` (lossless) or `jpeg` (quality 95). image_detail: OpenAI's detail level.
    max_cost_usd, max_total_tokens: hard limits on what all that share the ledger spend together, earlier runs
        with it included; None for no limit.
    price_per_million_input, price_per_million_output: dollars per million tokens, where `budget.py` does not
        know the model or knows it wrongly.
    """

    model: Annotated[str, Field(min_length=1)]
    base_url: Annotated[str | Sequence[str], SkipValidation] = "https://api.openai.com/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    mode: Literal["live", "record", "replay"] = "live"
    cache: str | None = None
    ledger: str | None = None
    concurrency: Count = 8
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    timeout_s: Positive = 60.0
    attempts: Count = 8
    longest_wait_s: Positive = 60.0
    queue_timeout_s: Positive = 600.0
    temperature: NotNegative | None = 0.0
    seed: Seed | None = 0
    image_format: Literal["png", "jpeg"] = "png"
    image_detail: Literal["low", "high", "auto"] = "high"
    max_cost_usd: Positive | None = None
    max_total_tokens: Count | None = None
    price_per_million_input: NotNegative | None = None
    price_per_million_output: NotNegative | None = None

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The endpoint, or its replicas in the order in which they take turns."""
        return (self.base_url,) if isinstance(self.base_url, str) else tuple(self.base_url)

    @property
    def ledger_path(self) -> str | None:
        """File of what was spent; None when neither `ledger` nor `cache` is set."""
        return self.ledger or (f"{self.cache}.ledger" if self.cache else None)

    @property
    def has_budget(self) -> bool:
        """Whether anything is to be counted."""
        return self.max_cost_usd is not None or self.max_total_tokens is not None

    @property
    def longest_ask_s(self) -> float:
        """Seconds after which one question has ended for certain: its queueing, attempts and waits."""
        waits = self.attempts - 1
        return self.queue_timeout_s + self.attempts * self.timeout_s + waits * self.longest_wait_s

    def problems(self) -> list[str]:
        """Every bad value as one sentence that names its key; empty when all are fine."""
        values = {key: getattr(self, key) for key in KEYS}
        return [
            *value_problems(_VALUES, values),
            *_endpoint_problems(self),
            *_key_problems(self),
            *_file_problems(self),
        ]


KEYS = tuple(field.name for field in dataclasses.fields(JudgeSettings))

FREE = frozenset(KEYS) - {"model", "temperature", "seed", "image_format", "image_detail"}
"""Keys that decide how an answer is reached and what it may cost, never what it is."""

_VALUES = TypeAdapter(JudgeSettings)


def _endpoint_problems(settings: JudgeSettings) -> Iterator[str]:
    if not settings.base_url or not isinstance(settings.base_url, str | Sequence):
        yield f"base_url is {settings.base_url!r}; give an endpoint such as http://127.0.0.1:8000/v1, or a list of them"
        return
    for number, url in enumerate(settings.base_urls):
        if not _is_endpoint(url):
            # The value stays out of the message: somebody may have put a key into it.
            yield (
                f"base_url number {number + 1} is not an endpoint; give http(s)://host/path without a user, "
                "key or query in it"
            )


def _is_endpoint(url: object) -> bool:
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        parts.port  # noqa: B018  (raises for a port that is no number)
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def _key_problems(settings: JudgeSettings) -> Iterator[str]:
    if settings.api_key_env and not settings.api_key_env.isidentifier():
        # The value stays out of the message: it is likely to be the key itself.
        yield "api_key_env is no name of an environment variable; put the key into one and give its name"


def _file_problems(settings: JudgeSettings) -> Iterator[str]:
    if settings.mode in ("record", "replay") and not settings.cache:
        yield f"mode is {settings.mode!r} and cache is not set; name the file of answers"
    if settings.has_budget and settings.ledger_path is None:
        yield (
            "max_cost_usd or max_total_tokens is set, but neither cache nor ledger; a budget needs a file in "
            "which all workers count: set cache or ledger"
        )
