"""What a service answered, as a result or as the error that the reward would have raised in process."""

from __future__ import annotations

import json
from typing import Any

import httpx

from rewards.base import FatalRewardError, RetryableRewardError, RewardContractError, RewardOutput
from rewards.service.wire import Cause, WireError, decode_scores


class Away(Exception):
    """The service cannot take calls at present; says why. It may be back soon."""


class ServedRewardFailure(Exception):
    """The reward raised an exception in its service; the text is the service's account of it."""


def read_json(response: httpx.Response) -> Any:
    """The body as JSON, or None when it is something else (a proxy's error page)."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None


def read_output(answer: Any, url: str) -> tuple[RewardOutput, str | None]:
    """Scores with components, and the sha256 of the reward's file. Raises FatalRewardError for anything else."""
    try:
        if not isinstance(answer, dict) or not isinstance(answer.get("components"), dict):
            raise WireError(["scores and components are missing"])
        components = {name: decode_scores(values) for name, values in answer["components"].items()}
        return RewardOutput(decode_scores(answer.get("scores")), components), answer.get("sha256")
    except WireError as error:
        raise FatalRewardError(f"{url} answered what no reward service does: {error}") from error


def error_of(answer: Any, status: int, url: str) -> Exception:
    """The error to raise for an answer without scores; those of a proxy in between have no cause in them."""
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        if status >= 500:
            return Away(f"HTTP {status}")
        return FatalRewardError(
            f"{url} answered HTTP {status}, which no reward service does; is the URL right?"
        )
    cause, message = error.get("cause"), f"{url}: {error.get('message')}"
    if cause == Cause.UNAVAILABLE:
        return Away(str(error.get("message")))
    if cause == Cause.INFRASTRUCTURE:
        return RetryableRewardError(message, float(error.get("retry_after_s") or 0.0))
    if cause == Cause.TIMEOUT:
        return TimeoutError(message)
    if cause == Cause.EXCEPTION:
        return ServedRewardFailure(message)
    if cause == Cause.CONTRACT:
        return RewardContractError(message)
    if cause == Cause.UNAUTHORIZED:
        message += "; name the variable that holds the token in service.token_env"
    return FatalRewardError(message)
