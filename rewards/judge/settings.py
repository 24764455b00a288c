"""What a recipe can set about the client that asks the judge, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from rewards.judge.pricing import known_price

MODES = ("live", "record", "replay")
IMAGE_FORMATS = ("png", "jpeg")
IMAGE_DETAILS = ("low", "high", "auto")

WHOLE = {
    "concurrency": 1,
    "attempts": 1,
    "requests_per_minute": 1,
    "tokens_per_minute": 1,
    "max_total_tokens": 1,
    "seed": 0,
}
"""Whole numbers with the least they may be."""

REAL = (
    "timeout_s",
    "longest_wait_s",
    "queue_timeout_s",
    "max_cost_usd",
    "temperature",
    "price_per_million_input",
    "price_per_million_output",
)
ABOVE_ZERO = ("timeout_s", "longest_wait_s", "queue_timeout_s", "max_cost_usd")
OPTIONAL = (
    "requests_per_minute",
    "tokens_per_minute",
    "max_total_tokens",
    "max_cost_usd",
    "seed",
    "temperature",
    "price_per_million_input",
    "price_per_million_output",
)


@dataclass(frozen=True)
class JudgeSettings:
    """How to reach the judge and what it may cost. Limits hold for one client, that is for one reward worker.

    model: name of the model at the endpoint; it identifies the judge in the cache, so give other weights
        another name.
    base_url: an OpenAI-compatible endpoint up to and with its version path, or a list of replicas of one model,
        which take turns; a second attempt goes to the next one.
    api_key_env: name of the environment variable that holds the key; None or "" where none is needed.
    mode: `live` asks and, with `cache`, keeps good answers; `record` also keeps what refusals and failures
        came to; `replay` answers from the cache alone, without network or key.
    cache: SQLite file of answers, shared by all workers; None keeps a few hundred in memory.
    ledger: SQLite file of what was spent, shared by all that spend from one budget; default
        `<cache>.ledger`.
    concurrency: requests in flight. requests_per_minute, tokens_per_minute: None for no limit of ours.
    timeout_s: seconds for one HTTP request. attempts: HTTP requests for one question before it is given up.
    longest_wait_s: seconds between two attempts at most; an endpoint that asks for a longer wait ends the
        question. queue_timeout_s: seconds a question may wait for its turn under the limits, in all.
    temperature, seed: sent when not None. A question asked again is sent with seed + ask.
    image_format: `png` (lossless) or `jpeg` (quality 95). image_detail: OpenAI's detail level.
    max_cost_usd, max_total_tokens: hard limits on what all that share the ledger spend together, earlier runs
        with it included; None for no limit.
    price_per_million_input, price_per_million_output: dollars per million tokens, where `pricing.py` does not
        know the model or knows it wrongly.
    """

    model: str
    base_url: str | Sequence[str] = "https://api.openai.com/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    mode: str = "live"
    cache: str | None = None
    ledger: str | None = None
    concurrency: int = 8
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    timeout_s: float = 60.0
    attempts: int = 8
    longest_wait_s: float = 60.0
    queue_timeout_s: float = 300.0
    temperature: float | None = 0.0
    seed: int | None = 0
    image_format: str = "png"
    image_detail: str = "high"
    max_cost_usd: float | None = None
    max_total_tokens: int | None = None
    price_per_million_input: float | None = None
    price_per_million_output: float | None = None

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
        return [
            *_choice_problems(self),
            *_number_problems(self),
            *_endpoint_problems(self),
            *_budget_problems(self),
        ]


def _choice_problems(settings: JudgeSettings) -> Iterator[str]:
    for key, choices in (("mode", MODES), ("image_format", IMAGE_FORMATS), ("image_detail", IMAGE_DETAILS)):
        if getattr(settings, key) not in choices:
            yield f"{key} is {getattr(settings, key)!r}; choose one of {', '.join(choices)}"
    for key in ("cache", "ledger", "api_key_env"):
        value = getattr(settings, key)
        if value is not None and not isinstance(value, str):
            yield f"{key} is {value!r}; give text, or null"
    if settings.mode in ("record", "replay") and not settings.cache:
        yield f"mode is {settings.mode!r} and cache is not set; name the file of answers"


def _number_problems(settings: JudgeSettings) -> Iterator[str]:
    for key in (*WHOLE, *REAL):
        value = getattr(settings, key)
        if value is None and key in OPTIONAL:
            continue
        least = WHOLE.get(key, 0)
        kinds = (int,) if key in WHOLE else (int, float)
        fits = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or value < least or (value == 0 and key in ABOVE_ZERO):
            number = "a whole number" if key in WHOLE else "a number"
            bound = "above 0" if key in ABOVE_ZERO else f"of {least} or more"
            yield f"{key} is {value!r}; give {number} {bound}" + (", or null" if key in OPTIONAL else "")


def _endpoint_problems(settings: JudgeSettings) -> Iterator[str]:
    if not isinstance(settings.model, str) or not settings.model:
        yield f"model is {settings.model!r}; give the name of the model at the endpoint"
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
        parts = urlsplit(url) if isinstance(url, str) else urlsplit("")
        parts.port  # noqa: B018  (raises for a port that is no number)
    except ValueError:
        return False
    plain = not (parts.username or parts.password or parts.query or parts.fragment)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def _budget_problems(settings: JudgeSettings) -> Iterator[str]:
    if settings.has_budget and settings.ledger_path is None:
        yield (
            "max_cost_usd or max_total_tokens is set, but neither cache nor ledger; a budget needs a file in "
            "which all workers count: set cache or ledger"
        )
    prices = (settings.price_per_million_input, settings.price_per_million_output)
    if settings.max_cost_usd is not None and None in prices and known_price(settings.model) is None:
        yield (
            f"max_cost_usd is set, but the price of model {settings.model!r} is not known; set "
            "price_per_million_input and price_per_million_output"
        )
