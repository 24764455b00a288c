"""How long an HTTP answer asks to be left alone before the next request."""

from __future__ import annotations

import contextlib
import email.utils
import math
import re
from collections.abc import Mapping

UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def retry_after(headers: Mapping[str, str], now: float) -> float:
    """Seconds the endpoint asks to wait, 0 if it does not say. now: seconds since the epoch.

    `retry-after-ms`, then `Retry-After` in seconds or as a date, then the reset time of whichever
    `x-ratelimit-remaining-*` is 0.
    """
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(ValueError):
            value = float(headers.get(name, ""))
            if math.isfinite(value) and value >= 0:
                return value * unit_s
    with contextlib.suppress(ValueError):
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - now)
    spent = [what for what in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{what}") == "0"]
    return max((_duration(headers.get(f"x-ratelimit-reset-{what}", "")) for what in spent), default=0.0)


def _duration(text: str) -> float:
    """Seconds of OpenAI's `6m0s`, `1.5s`, `20ms`."""
    found = re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
    return sum(float(number) * UNIT_S[unit] for number, unit in found)
