"""What questions can cost at most: one request, before it is sent, or a whole run, before it starts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.judge.messages import JudgeRequest
from rewards.judge.pricing import FRAME_TOKENS, Price, image_tokens, known_price, text_tokens
from rewards.judge.settings import JudgeSettings

NANO = 1_000_000_000


@dataclass(frozen=True)
class Amount:
    """Money in billionths of a dollar, so that sums are exact, and tokens of input and output together."""

    nano_usd: int
    tokens: int


@dataclass(frozen=True)
class Estimate:
    """Upper bounds for a number of calls. cost_usd is None when the price of the model is not known."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost_usd: float | None


def estimate(
    settings: JudgeSettings,
    *,
    calls: int,
    image_sizes: Sequence[tuple[int, int]],
    text_bytes: int,
    max_tokens: int,
) -> Estimate:
    """At most what `calls` equal calls take, each answered at the first attempt.

    image_sizes: (width, height) in pixels of each image of one call. text_bytes: UTF-8 bytes of one call's
    system turn, texts and schema together. max_tokens: the limit of one answer.
    """
    images = sum(image_tokens(settings.model, size, settings.image_detail) for size in image_sizes)
    prompt, completion = calls * (FRAME_TOKENS + text_bytes + images), calls * max_tokens
    price = price_of(settings)
    cost = None if price is None else bill(price, prompt, completion).nano_usd / NANO
    return Estimate(calls, prompt, completion, cost)


def most_of(settings: JudgeSettings, request: JudgeRequest) -> tuple[int, int]:
    """Upper bounds on the prompt tokens and the completion tokens of one HTTP request."""
    texts = [request.system, *(part for part in request.parts if isinstance(part, str))]
    if request.response_schema is not None:
        texts.append(json.dumps(dict(request.response_schema)))
    images = [part.size for part in request.parts if not isinstance(part, str)]
    prompt = (
        FRAME_TOKENS
        + sum(text_tokens(text) for text in texts)
        + sum(image_tokens(settings.model, size, settings.image_detail) for size in images)
    )
    return prompt, request.max_tokens


def bill(price: Price | None, prompt_tokens: int, completion_tokens: int) -> Amount:
    """What these tokens cost, rounded up; nothing in money when no price is known."""
    tokens = prompt_tokens + completion_tokens
    if price is None:
        return Amount(0, tokens)
    # A dollar per million tokens is a thousand billionths a token.
    nano = prompt_tokens * price.input * 1000 + completion_tokens * price.output * 1000
    return Amount(math.ceil(round(nano, 3)), tokens)


def price_of(settings: JudgeSettings) -> Price | None:
    """The recipe's prices, else the known list price; None when one of the two is missing."""
    known = known_price(settings.model)
    incoming, outgoing = settings.price_per_million_input, settings.price_per_million_output
    if known is not None:
        incoming = known.input if incoming is None else incoming
        outgoing = known.output if outgoing is None else outgoing
    return None if incoming is None or outgoing is None else Price(incoming, outgoing)
