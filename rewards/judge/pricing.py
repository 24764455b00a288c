"""Prices and token counts. Every count is an upper bound, so that a budget reserved by it holds."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

PRICES_AS_OF = "2025-04-14"
FRAME_TOKENS = 32
"""Tokens that a system and a user turn cost beside their content, rounded up."""

LOW_DETAIL_TOKENS = 85
TILE_TOKENS = 170
TILE = 512
PATCH = 14


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens of input and of output."""

    input: float
    output: float


KNOWN_PRICES = {
    "gpt-4.1": Price(2.00, 8.00),
    "gpt-4.1-mini": Price(0.40, 1.60),
    "gpt-4.1-nano": Price(0.10, 0.40),
}
"""List prices as of PRICES_AS_OF, without discounts for batches or cached input."""

TILED = ("gpt-4.1", "gpt-4o")
"""Models whose images are billed by tiles."""


def known_price(model: str) -> Price | None:
    """The list price of a model or of one of its dated snapshots; None for any other name."""
    return KNOWN_PRICES.get(_family(model))


def text_tokens(text: str) -> int:
    """At most one token per byte of UTF-8: a byte-level tokenizer never makes more."""
    return len(text.encode("utf-8", errors="surrogatepass"))


def image_tokens(model: str, size: tuple[int, int], detail: str) -> int:
    """Upper bound on the tokens of one image of `size` (width, height) in pixels.

    gpt-4.1 and gpt-4o: 85 at low detail; else the image is scaled down to fit 2048 x 2048, then until its short
    side is at most 768, and costs 85 + 170 for every 512 x 512 tile it touches. Any other model: the larger of
    that and one token per 14 x 14 pixels at full size, which covers vision transformers that neither enlarge
    images nor repeat them in crops. For a model that does, the first bill exceeds the bound: see `budget.py`.
    """
    tiled = _tile_tokens(size)
    if _family(model) in TILED:
        return LOW_DETAIL_TOKENS if detail == "low" else tiled
    return max(tiled, math.ceil(size[0] / PATCH) * math.ceil(size[1] / PATCH))


def _tile_tokens(size: tuple[int, int]) -> int:
    scale = min(1.0, 2048 / max(size))
    scale *= min(1.0, 768 / (min(size) * scale))
    # Rounded first: a side of exactly 512 must not become 513 by floating point.
    across, down = (math.ceil(round(side * scale, 3) / TILE) for side in size)
    return LOW_DETAIL_TOKENS + TILE_TOKENS * across * down


def _family(model: str) -> str:
    """`gpt-4.1` for `gpt-4.1-2025-04-14`."""
    return re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)
