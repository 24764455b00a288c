"""A question as the arguments of a chat completion, and what one HTTP request came back with as an outcome."""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from rewards.judge.messages import JudgeReply, JudgeRequest, Outcome, TokenChoices
from rewards.judge.settings import JudgeSettings
from rewards.retry_after import retry_after

if TYPE_CHECKING:
    import openai

ENCODERS: dict[str, dict[str, Any]] = {
    # The fastest level: a fifth larger than the default, at a fraction of its time.
    "png": {"compress_level": 1},
    "jpeg": {"quality": 95, "subsampling": 0},
}
FILTER_CODES = {"content_filter", "content_policy_violation", "ResponsibleAIPolicyViolation"}
QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
SETTINGS_CODES = {"unsupported_parameter", "unsupported_value", "unknown_parameter", "model_not_found"}
"""Of a 4xx that meets every request alike, since every request has the recipe's settings."""
EVERY_REQUEST = (401, 402, 403, 404)
GATEWAY_TIMEOUTS = (408, 504, 524)
NOT_BILLED = (0, 0)
NO_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)


def sampling(settings: JudgeSettings, request: JudgeRequest) -> dict[str, Any]:
    """All that shapes the answer beside the words and pictures; part of the cache key."""
    return {
        "temperature": settings.temperature,
        "seed": None if settings.seed is None else settings.seed + request.ask,
        "max_tokens": request.max_tokens,
        "response_schema": None if request.response_schema is None else dict(request.response_schema),
        "top_logprobs": request.top_logprobs,
        "image_format": settings.image_format,
        "image_detail": settings.image_detail,
    }


def chat_arguments(settings: JudgeSettings, request: JudgeRequest) -> dict[str, Any]:
    """Keyword arguments of `chat.completions.create`."""
    chosen = sampling(settings, request)
    system = [{"role": "system", "content": request.system}] if request.system else []
    arguments = {
        "model": settings.model,
        "messages": [*system, {"role": "user", "content": [_part(part, settings) for part in request.parts]}],
        "max_completion_tokens": request.max_tokens,
        **{key: chosen[key] for key in ("temperature", "seed") if chosen[key] is not None},
    }
    if request.response_schema is not None:
        schema = {"name": "answer", "strict": True, "schema": chosen["response_schema"]}
        arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
    if request.top_logprobs:
        arguments |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return arguments


def _part(part: str | Image.Image, settings: JudgeSettings) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    file = io.BytesIO()
    part.convert("RGB").save(file, format=settings.image_format, **ENCODERS[settings.image_format])
    data = base64.b64encode(file.getvalue()).decode("ascii")
    url = f"data:image/{settings.image_format};base64,{data}"
    return {"type": "image_url", "image_url": {"url": url, "detail": settings.image_detail}}


class Attempt(NamedTuple):
    """How one HTTP request ended.

    usage: prompt and completion tokens billed; None when the request may have been billed and nobody said.
    retry_after_s: seconds the endpoint asked to wait before another request.
    """

    reply: JudgeReply
    usage: tuple[int, int] | None = None
    retry_after_s: float = 0.0


def read_completion(completion: Any, *, top_logprobs: int) -> Attempt:
    """A 200 answer. Only a finished, unfiltered, unrefused, non-empty message is OK.

    An answer without a choice is an error that a proxy dressed as success, so it is asked again.
    """
    usage = _usage(completion)
    model = str(getattr(completion, "model", None) or "")
    found = getattr(completion, "choices", None) or []
    if not found or getattr(found[0], "message", None) is None:
        detail = "status 200 without an answer in it"
        return Attempt(JudgeReply(Outcome.UNAVAILABLE, detail=detail, model=model), usage)
    outcome, detail = _verdict(found[0])
    answered = outcome in (Outcome.OK, Outcome.TRUNCATED)
    choices = _token_choices(found[0]) if answered and top_logprobs else ()
    if outcome is Outcome.OK and top_logprobs and not choices:
        outcome = Outcome.MALFORMED
        detail = (
            "log-probabilities were asked for and none came; if this endpoint or model gives none, choose the "
            "protocol viescore or structured"
        )
    text = found[0].message.content if outcome is Outcome.OK else ""
    return Attempt(JudgeReply(outcome, text, detail, choices, model), usage)


def _verdict(choice: Any) -> tuple[Outcome, str]:
    finish, content = choice.finish_reason, choice.message.content
    refusal = getattr(choice.message, "refusal", None)
    if finish == "content_filter":
        return Outcome.FILTERED, "finish_reason content_filter"
    if refusal:
        return Outcome.REFUSED, str(refusal)
    if finish == "length":
        return Outcome.TRUNCATED, "finish_reason length: the answer did not fit max_tokens"
    if finish != "stop":
        return Outcome.MALFORMED, f"finish_reason {finish!r} in place of 'stop'"
    if not isinstance(content, str) or not content.strip():
        return Outcome.MALFORMED, "the answer is empty"
    return Outcome.OK, ""


def _token_choices(choice: Any) -> tuple[TokenChoices, ...]:
    """Alternatives best first, without impossible ones. A NaN stays, for the protocol to refuse."""
    found = []
    for token in getattr(getattr(choice, "logprobs", None), "content", None) or []:
        pairs = [(other.token, float(other.logprob)) for other in token.top_logprobs or []]
        possible = [pair for pair in pairs if pair[1] != -math.inf]
        found.append(TokenChoices(token.token, tuple(sorted(possible, key=lambda pair: -pair[1]))))
    return tuple(found)


def _usage(completion: Any) -> tuple[int, int] | None:
    usage = getattr(completion, "usage", None)
    counts = (getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None))
    known = all(isinstance(count, int) and count >= 0 for count in counts)
    return counts if known else None  # type: ignore[return-value]


def read_error(error: Exception) -> Attempt:
    """An exception of the `openai` client, or the time limit of the request."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return _read_status(error)
    outcome, detail = Outcome.FATAL, f"{type(error).__name__}: {error}"
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        outcome, detail = Outcome.TIMEOUT, "no answer within timeout_s"
    elif isinstance(error, openai.APIConnectionError):
        cause = error.__cause__ or error
        outcome, detail = Outcome.UNAVAILABLE, f"{type(cause).__name__}: {cause}".removesuffix(": ")
    elif isinstance(error, (openai.APIResponseValidationError, *NO_JSON)):
        outcome, detail = Outcome.UNAVAILABLE, "status 200 with a body that is no JSON"
    # A connection that was not even made cannot have been billed.
    never_sent = type(error.__cause__).__name__ in ("ConnectError", "ConnectTimeout", "PoolTimeout")
    return Attempt(JudgeReply(outcome, detail=detail), NOT_BILLED if never_sent else None)


def _read_status(error: openai.APIStatusError) -> Attempt:
    """4xx and 5xx, which are not billed; behind a gateway's time-out the model may have answered, though.

    A 4xx that is not known to meet every request alike is about this one: its text, its pictures, its size.
    """
    status = error.status_code
    body = error.body if isinstance(error.body, Mapping) else {}
    inner = body.get("innererror")  # where Azure puts the telling code
    given = (error.code, error.type, inner.get("code") if isinstance(inner, Mapping) else None)
    codes = {code for code in given if isinstance(code, str)}
    outcome = Outcome.REJECTED
    if status in (400, 403) and codes & FILTER_CODES:
        outcome = Outcome.FILTERED
    elif status < 500 and (status in EVERY_REQUEST or codes & (QUOTA_CODES | SETTINGS_CODES)):
        outcome = Outcome.FATAL
    elif status == 429:
        outcome = Outcome.RATE_LIMITED
    elif status in GATEWAY_TIMEOUTS:
        outcome = Outcome.TIMEOUT
    elif status >= 500 or status in (409, 425):
        outcome = Outcome.UNAVAILABLE
    detail = error.message + (f" ({error.code})" if error.code else "")
    if 300 <= status < 400:  # it meets every request, and what it names is not followed
        outcome = Outcome.FATAL
        detail = f"HTTP {status} to {error.response.headers.get('location')}; if that is right, make it the base_url"
    reply = JudgeReply(outcome, detail=detail)
    usage = None if outcome is Outcome.TIMEOUT else NOT_BILLED
    return Attempt(reply, usage, retry_after(error.response.headers, time.time()))
