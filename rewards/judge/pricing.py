"""What a question can cost: tokens of text and images, prices, and the estimate made before a run.

Every count here is an upper bound, so that a budget that is reserved before each request holds.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

MILLION = 1_000_000


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
"""List prices of April 2025 without discounts for batches or cached input."""

PRICES_AS_OF = "2025-04-14"


def known_price(model: str) -> Price | None:
    """The list price of a model or of one of its dated snapshots; None for any other name."""
    return KNOWN_PRICES.get(_family(model))


def _family(model: str) -> str:
    """`gpt-4.1` for `gpt-4.1-2025-04-14`."""
    return re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)
