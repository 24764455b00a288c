"""What questions cost: list prices, upper bounds on tokens, an estimate of a run, and the hard budget.

The budget is one row in a file that all workers share, changed before and after every HTTP request. Before a request
its upper bound is *held*; after it what was billed is *spent* and the hold is given back. No request is sent that
could take spent + held above a limit. A worker that dies between the two leaves its hold in place for good, since the
endpoint may have billed it: at most `concurrency` requests for each death. What the bound does not cover is a bill
above it, from a model whose images cost more than `image_tokens` knows; it is counted in full and logged, and can
overdraw by the requests in flight at that time.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rewards.judge.messages import JudgeRequest
from rewards.judge.questions import Question
from rewards.judge.settings import JudgeSettings
from rewards.judge.store import Store

logger = logging.getLogger(__name__)

PRICES_AS_OF = "2025-04-14"
NANO = 1_000_000_000
FRAME_TOKENS = 32
"""Tokens that a system and a user turn cost beside their content, rounded up."""

LOW_DETAIL_TOKENS = 85
TILE_TOKENS = 170
TILE = 512
PATCH = 14

PROMPT_BYTES = 200
"""Assumed length of an instruction: the prompts of a run are not known to a reward beforehand."""


class Price(NamedTuple):
    """Dollars per million tokens of input and of output."""

    input: float
    output: float


class Amount(NamedTuple):
    """Money in billionths of a dollar, so that sums are exact, and tokens of input and output together."""

    nano_usd: int
    tokens: int


KNOWN_PRICES = {
    "gpt-4.1": Price(2.00, 8.00),
    "gpt-4.1-mini": Price(0.40, 1.60),
    "gpt-4.1-nano": Price(0.10, 0.40),
}
"""OpenAI's list prices of these models and their dated snapshots as of PRICES_AS_OF, without discounts for batches or
cached input. A recipe's `price_per_million_input` and `_output` go before them; a model without either has no price,
and with `max_cost_usd` it is refused."""

TILED = ("gpt-4.1", "gpt-4o")
"""Models whose images are billed by tiles."""


def price_of(settings: JudgeSettings) -> Price | None:
    """The recipe's prices, else the list price of the model or its dated snapshot; None when one is missing."""
    known = KNOWN_PRICES.get(_family(settings.model), (None, None))
    given = (settings.price_per_million_input, settings.price_per_million_output)
    incoming, outgoing = (
        own if own is not None else listed for own, listed in zip(given, known, strict=True)
    )
    return None if incoming is None or outgoing is None else Price(incoming, outgoing)


def most_of(settings: JudgeSettings, request: JudgeRequest) -> tuple[int, int]:
    """Upper bounds on the prompt tokens and the completion tokens of one HTTP request.

    At most one token per byte of UTF-8: a byte-level tokenizer never makes more.
    """
    texts = [request.system, *(part for part in request.parts if isinstance(part, str))]
    if request.response_schema is not None:
        texts.append(json.dumps(dict(request.response_schema)))
    sizes = [part.size for part in request.parts if not isinstance(part, str)]
    text = sum(len(text.encode("utf-8", errors="surrogatepass")) for text in texts)
    images = sum(image_tokens(settings.model, size, settings.image_detail) for size in sizes)
    return FRAME_TOKENS + text + images, request.max_tokens


def image_tokens(model: str, size: tuple[int, int], detail: str) -> int:
    """Upper bound on the tokens of one image of `size` (width, height) in pixels.

    gpt-4.1 and gpt-4o: 85 at low detail; else the image is scaled down to fit 2048 x 2048, then until its short
    side is at most 768, and costs 85 + 170 for every 512 x 512 tile it touches. Any other model: the larger of
    that and one token per 14 x 14 pixels at full size, which covers vision transformers that neither enlarge
    images nor repeat them in crops. For a model that does, the first bill exceeds the bound: see above.
    """
    scale = min(1.0, 2048 / max(size))
    scale *= min(1.0, 768 / (min(size) * scale))
    # Rounded first: a side of exactly 512 must not become 513 by floating point.
    across, down = (math.ceil(round(side * scale, 3) / TILE) for side in size)
    tiled = LOW_DETAIL_TOKENS + TILE_TOKENS * across * down
    if _family(model) in TILED:
        return LOW_DETAIL_TOKENS if detail == "low" else tiled
    return max(tiled, math.ceil(size[0] / PATCH) * math.ceil(size[1] / PATCH))


def bill(price: Price | None, prompt_tokens: int, completion_tokens: int) -> Amount:
    """What these tokens cost, rounded up; nothing in money when no price is known."""
    # A dollar per million tokens is a thousand billionths a token.
    nano = 0.0 if price is None else 1000 * (prompt_tokens * price.input + completion_tokens * price.output)
    return Amount(math.ceil(round(nano, 3)), prompt_tokens + completion_tokens)


def cost_lines(
    settings: JudgeSettings, questions: Sequence[Question], *, images: int, max_asks: int
) -> list[str]:
    """At most what it takes to ask `questions` about each of `images` samples, each answered at the first attempt:
    calls, tokens, money and the longest wait, as lines to print before a run starts."""
    if settings.mode == "replay":
        return [f"judge {settings.model}: replayed from {settings.cache}, without requests or cost"]
    most = [most_of(settings, question.request(0)) for question in questions]
    prompt, completion = (images * sum(tokens) for tokens in zip(*most, strict=True))
    price = price_of(settings)
    money = (
        "cost unknown: set price_per_million_input and price_per_million_output"
        if price is None
        else f"${bill(price, prompt, completion).nano_usd / NANO:,.2f} "
        f"(list prices of {PRICES_AS_OF}, or the recipe's)"
    )
    limits = [
        f"{key} {getattr(settings, key):,}"
        for key in ("max_cost_usd", "max_total_tokens")
        if getattr(settings, key) is not None
    ]
    return [
        f"judge {settings.model}: {images * len(most):,} calls ({len(most)} per image); at most {prompt:,} prompt "
        f"and {completion:,} completion tokens, {money}; each prompt taken as {PROMPT_BYTES} bytes",
        f"each malformed answer is asked for again, up to {max_asks} asks in all; answers in the cache are free; "
        f"the budget is {' and '.join(limits) or 'unlimited'}",
        f"one question ends within {settings.longest_ask_s:,.0f} s, its turn included",
    ]


def _family(model: str) -> str:
    """`gpt-4.1` for `gpt-4.1-2025-04-14`."""
    return re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)


class BudgetExhausted(Exception):
    """The next request could go above a limit; the message names the key, the count and the remedy."""


class Budget(Store):
    """Limits on what everybody with the same ledger file spends together. Every method blocks: see `store.py`.

    max_nano_usd, max_tokens: None for no limit.
    """

    name = "a ledger of the judge"
    kind = 0x6A756C65
    version = 1
    schema = """CREATE TABLE ledger (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    spent_nano_usd INTEGER NOT NULL, spent_tokens INTEGER NOT NULL,
    held_nano_usd INTEGER NOT NULL, held_tokens INTEGER NOT NULL,
    requests INTEGER NOT NULL
)"""

    def __init__(self, path: str, *, max_nano_usd: int | None, max_tokens: int | None) -> None:
        super().__init__(path)
        self._max_nano_usd, self._max_tokens = max_nano_usd, max_tokens

    def hold(self, most: Amount) -> None:
        """Set aside what the next request can cost. Raises BudgetExhausted, then nothing is held; StoreError."""
        with self.transaction(write=True) as connection:
            connection.execute("INSERT OR IGNORE INTO ledger VALUES (1, 0, 0, 0, 0, 0)")
            row = connection.execute(
                "SELECT spent_nano_usd, spent_tokens, held_nano_usd, held_tokens FROM ledger"
            ).fetchone()
            self._refuse(Amount(*row[:2]), Amount(*row[2:]), most)
            connection.execute(
                "UPDATE ledger SET held_nano_usd = held_nano_usd + ?, held_tokens = held_tokens + ?, "
                "requests = requests + 1",
                most,
            )

    def settle(self, held: Amount, used: Amount) -> None:
        """Turn a hold into what the request was billed. Raises StoreError."""
        if used.nano_usd > held.nano_usd or used.tokens > held.tokens:
            logger.warning(
                "judge: a request was billed %d tokens, at most %d were expected; the budget can be overdrawn by "
                "the requests in flight",
                used.tokens,
                held.tokens,
            )
        with self.transaction(write=True) as connection:
            connection.execute(
                "UPDATE ledger SET held_nano_usd = held_nano_usd - ?, held_tokens = held_tokens - ?, "
                "spent_nano_usd = spent_nano_usd + ?, spent_tokens = spent_tokens + ?",
                (*held, *used),
            )

    def _refuse(self, spent: Amount, held: Amount, most: Amount) -> None:
        limits: list[tuple[str, int | None, Callable[[int], str]]] = [
            ("max_cost_usd", self._max_nano_usd, lambda nano_usd: f"${nano_usd / NANO:.6f}"),
            ("max_total_tokens", self._max_tokens, str),
        ]
        for (key, limit, show), used, kept, asked in zip(limits, spent, held, most, strict=True):
            if limit is not None and used + kept + asked > limit:
                raise BudgetExhausted(
                    f"{key} {show(limit)} does not cover the next request, which takes up to {show(asked)}: "
                    f"{show(used)} spent and {show(kept)} held by requests in flight or lost, by the count in "
                    f"{self.path}; raise {key} and resume: answers in the cache are not paid again"
                )
