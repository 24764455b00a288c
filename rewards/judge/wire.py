"""From what one HTTP request came back with to an outcome: answers, refusals, status codes, lost connections."""

from __future__ import annotations

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.judge.messages import Outcome, TokenChoices

if TYPE_CHECKING:
    import openai

FILTER_CODES = ("content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation")
QUOTA_CODES = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")
GATEWAY_TIMEOUTS = (408, 504, 524)


@dataclass(frozen=True)
class Attempt:
    """How one HTTP request ended. `text` is "" unless the outcome is OK; `choices` come with TRUNCATED too.

    again: whether another request can do better. retry_after_s: seconds the endpoint asked to wait before it.
    paused: whether that goes for every request (429), not for this one alone.
    usage: prompt and completion tokens billed; None when the request may have been billed and nobody said.
    """

    outcome: Outcome
    text: str = ""
    detail: str = ""
    choices: tuple[TokenChoices, ...] = ()
    model: str = ""
    usage: tuple[int, int] | None = None
    again: bool = False
    retry_after_s: float = 0.0
    paused: bool = False


NOT_BILLED = (0, 0)


def read_completion(completion: Any, *, top_logprobs: int) -> Attempt:
    """A 200 answer. Only a finished, unfiltered, unrefused, non-empty message is OK.

    An answer without a choice is an error that a proxy dressed as success, so it is asked again.
    """
    usage = _usage(completion)
    model = str(getattr(completion, "model", None) or "")
    found = getattr(completion, "choices", None) or []
    if not found or getattr(found[0], "message", None) is None:
        detail = "status 200 without an answer in it"
        return Attempt(Outcome.UNAVAILABLE, detail=detail, model=model, usage=usage, again=True)
    choice = found[0]
    outcome, detail = _verdict(choice)
    answered = outcome in (Outcome.OK, Outcome.TRUNCATED)
    choices = _token_choices(choice) if answered and top_logprobs else ()
    if outcome is Outcome.OK and top_logprobs and not choices:
        outcome, detail = (
            Outcome.MALFORMED,
            (
                "log-probabilities were asked for and none came; if this endpoint or model gives none, choose the "
                "protocol viescore or structured"
            ),
        )
    text = choice.message.content if outcome is Outcome.OK else ""
    return Attempt(outcome, text, detail, choices, model, usage)


def read_error(error: Exception) -> Attempt:
    """An exception of the `openai` client, or the time limit of the request."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return _read_status(error)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        usage = NOT_BILLED if _never_sent(error) else None
        return Attempt(Outcome.TIMEOUT, detail="no answer within timeout_s", usage=usage, again=True)
    if isinstance(error, openai.APIConnectionError):
        usage = NOT_BILLED if _never_sent(error) else None
        cause = error.__cause__ or error
        detail = f"{type(cause).__name__}: {cause}".removesuffix(": ")
        return Attempt(Outcome.UNAVAILABLE, detail=detail, usage=usage, again=True)
    if isinstance(error, openai.APIResponseValidationError | json.JSONDecodeError | UnicodeDecodeError):
        detail = "status 200 with a body that is no JSON"
        return Attempt(Outcome.UNAVAILABLE, detail=detail, again=True)
    return Attempt(Outcome.FATAL, detail=f"{type(error).__name__}: {error}")


def _verdict(choice: Any) -> tuple[Outcome, str]:
    finish = choice.finish_reason
    refusal = getattr(choice.message, "refusal", None)
    if finish == "content_filter":
        return Outcome.FILTERED, "finish_reason content_filter"
    if refusal:
        return Outcome.REFUSED, str(refusal)
    if finish == "length":
        return Outcome.TRUNCATED, "finish_reason length: the answer did not fit max_tokens"
    if finish != "stop":
        return Outcome.MALFORMED, f"finish_reason {finish!r} in place of 'stop'"
    content = choice.message.content
    if not isinstance(content, str) or not content.strip():
        return Outcome.MALFORMED, "the answer is empty"
    return Outcome.OK, ""


def _token_choices(choice: Any) -> tuple[TokenChoices, ...]:
    """Alternatives best first, without impossible ones. A NaN stays, for the protocol to refuse."""
    tokens = getattr(getattr(choice, "logprobs", None), "content", None) or []
    return tuple(
        TokenChoices(
            token.token,
            tuple(
                sorted(
                    (
                        (other.token, float(other.logprob))
                        for other in token.top_logprobs or []
                        if other.logprob != -math.inf
                    ),
                    key=lambda pair: -pair[1],
                )
            ),
        )
        for token in tokens
    )


def _usage(completion: Any) -> tuple[int, int] | None:
    usage = getattr(completion, "usage", None)
    counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        return None
    return counts  # type: ignore[return-value]


def _read_status(error: openai.APIStatusError) -> Attempt:
    """4xx and 5xx, which are not billed; behind a gateway's time-out the model may have answered, though."""
    status, codes = error.status_code, _codes(error)
    detail = error.message + (f" ({error.code})" if error.code else "")
    wait = retry_after(error.response.headers, time.time())
    if status in (400, 403) and any(code in codes for code in FILTER_CODES):
        return Attempt(Outcome.FILTERED, detail=detail, usage=NOT_BILLED)
    if status == 429 and not any(code in codes for code in QUOTA_CODES):
        return Attempt(
            Outcome.RATE_LIMITED, detail=detail, usage=NOT_BILLED, again=True, retry_after_s=wait, paused=True
        )
    if status in GATEWAY_TIMEOUTS:
        return Attempt(Outcome.TIMEOUT, detail=detail, again=True, retry_after_s=wait)
    if status >= 500 or status == 409:
        return Attempt(Outcome.UNAVAILABLE, detail=detail, usage=NOT_BILLED, again=True, retry_after_s=wait)
    return Attempt(Outcome.FATAL, detail=detail, usage=NOT_BILLED)


def _codes(error: openai.APIStatusError) -> set[str]:
    """The codes an error body carries; Azure puts the telling one a level deeper."""
    body = error.body if isinstance(error.body, Mapping) else {}
    inner = body.get("innererror")
    found = [error.code, error.type, inner.get("code") if isinstance(inner, Mapping) else None]
    return {code for code in found if isinstance(code, str)}


def _never_sent(error: BaseException) -> bool:
    """Whether the connection was not even made, so that nothing can have been billed."""
    return type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")


def retry_after(headers: Mapping[str, str], now: float) -> float:
    """Seconds the endpoint asks to wait, 0 if it does not say. now: seconds since the epoch.

    `retry-after-ms`, then `Retry-After` in seconds or as a date, then the reset time of whichever
    `x-ratelimit-remaining-*` is 0.
    """
    milliseconds = _seconds(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    asked = headers.get("retry-after", "")
    seconds = _seconds(asked)
    if seconds is None and asked:
        try:
            seconds = max(0.0, email.utils.parsedate_to_datetime(asked).timestamp() - now)
        except ValueError:
            seconds = None
    if seconds is not None:
        return seconds
    spent = [what for what in ("requests", "tokens") if headers.get(f"x-ratelimit-remaining-{what}") == "0"]
    return max((_duration(headers.get(f"x-ratelimit-reset-{what}", "")) for what in spent), default=0.0)


def _seconds(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


UNIT_S = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def _duration(text: str) -> float:
    """Seconds of OpenAI's `6m0s`, `1.5s`, `20ms`."""
    return sum(
        float(number) * UNIT_S[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)(ms|h|m|s)", text)
    )
