"""A request without scores: a reward's error as a cause and an HTTP status, and back as the same class of error."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import httpx

from rewards.base import FatalRewardError, RetryableRewardError, RewardContractError, RewardOutput
from rewards.loading import describe_error
from rewards.retry_after import retry_after
from rewards.service.wire import Cause, WireError, decode_scores

_STATUS = {
    Cause.UNAVAILABLE: 503,
    Cause.INFRASTRUCTURE: 503,
    Cause.TIMEOUT: 504,
    Cause.EXCEPTION: 500,
    Cause.FATAL: 500,
    Cause.CONTRACT: 500,
    Cause.UNAUTHORIZED: 401,
    Cause.UNKNOWN_REWARD: 404,
    Cause.OTHER_REWARD: 409,
    Cause.TOO_LARGE: 413,
    Cause.MALFORMED: 422,
}
NOT_NOW = (408, 425, 429)
"""4xx of a proxy or a gateway that say something of the moment, not of the request."""
_PASSING = (Cause.UNAVAILABLE, Cause.INFRASTRUCTURE, Cause.TIMEOUT, Cause.EXCEPTION)


class Fault(Exception):
    """In the service: a request ends without scores. `retry_after_s`: seconds to wait before the next."""

    def __init__(self, cause: Cause, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.cause, self.retry_after_s, self.status = cause, retry_after_s, _STATUS[cause]

    def content(self) -> dict[str, Any]:
        """`{"error": {cause, message, fatal, retry_after_s}}`."""
        error = {
            "cause": self.cause.value,
            "message": str(self).encode(errors="replace").decode(),
            "fatal": self.cause not in _PASSING,
            "retry_after_s": self.retry_after_s,
        }
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """The headers that its status asks for."""
        if self.status == 503:
            return {"retry-after": str(math.ceil(self.retry_after_s))}
        return {"www-authenticate": "Bearer"} if self.status == 401 else {}


def fault_of(error: Exception, timeout_s: float) -> Fault:
    """The fault that stands for what a reward raised, by the classes that `rewards/scoring.py` tells apart."""
    if isinstance(error, Fault):
        return error
    if isinstance(error, WireError):
        return Fault(Cause.MALFORMED, str(error))
    if isinstance(error, RewardContractError):
        return Fault(Cause.CONTRACT, str(error))
    if isinstance(error, FatalRewardError):
        return Fault(Cause.FATAL, str(error))
    if isinstance(error, RetryableRewardError):
        asked = error.retry_after_s if math.isfinite(error.retry_after_s) else 0.0
        return Fault(Cause.INFRASTRUCTURE, str(error), max(asked, 0.0))
    if isinstance(error, TimeoutError):
        return Fault(Cause.TIMEOUT, f"{error or 'not scored'} (timeout_s {timeout_s:g})")
    return Fault(Cause.EXCEPTION, describe_error(error))


class Away(Exception):
    """In the client: the service cannot take calls at present; says why. It may be back soon.

    retry_after_s: seconds for which it asked to be left alone.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServedRewardFailure(Exception):
    """The reward raised an exception in its service; the text is the service's account of it."""


def read_json(response: httpx.Response) -> Any:
    """The body as JSON, or None when it is something else (a proxy's error page)."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None


def read_200(response: httpx.Response) -> Any:
    """The JSON of a 200, None for another status. Raises Away for a page, or half an answer, that a proxy in between
    gave or cut."""
    answer = read_json(response) if response.status_code == 200 else None
    if answer is None and response.status_code == 200:
        raise Away("HTTP 200 with a body that is no JSON, what no reward service does")
    return answer


def read_answer(response: httpx.Response, url: str) -> Any:
    """The JSON of a 200. Raises as `read_200`, and for any other status what `error_of` makes of it."""
    if response.status_code != 200:
        asked_s = retry_after(response.headers, time.time())
        raise error_of(read_json(response), response.status_code, url, asked_s)
    return read_200(response)


def read_output(answer: Any, url: str) -> tuple[RewardOutput, str | None]:
    """Scores with components, and the sha256 of the reward's file. Raises FatalRewardError for anything else."""
    try:
        if not isinstance(answer, dict) or not isinstance(answer.get("components"), dict):
            raise WireError(["scores and components are missing"])
        components = {name: decode_scores(values) for name, values in answer["components"].items()}
        return RewardOutput(decode_scores(answer.get("scores")), components), answer.get("sha256")
    except WireError as error:
        raise FatalRewardError(f"{url} answered what no reward service does: {error}") from error


def error_of(answer: Any, status: int, url: str, retry_after_s: float = 0.0) -> Exception:
    """The error to raise for an answer without scores; those of a proxy in between have no cause in them.

    retry_after_s: as the headers ask.
    """
    error = answer.get("error") if isinstance(answer, dict) else None
    if not isinstance(error, dict):
        if status >= 500 or status in NOT_NOW:
            return Away(f"HTTP {status}", retry_after_s)
        return FatalRewardError(
            f"{url} answered HTTP {status}, which no reward service does; is the URL right?"
        )
    cause, message = error.get("cause"), f"{url}: {error.get('message')}"
    if cause == Cause.UNAVAILABLE:
        return Away(str(error.get("message")), retry_after_s)
    if cause == Cause.INFRASTRUCTURE:
        seconds = error.get("retry_after_s")
        return RetryableRewardError(message, seconds if isinstance(seconds, int | float) else 0.0)
    if cause == Cause.TIMEOUT:
        return TimeoutError(message)
    if cause == Cause.EXCEPTION:
        return ServedRewardFailure(message)
    if cause == Cause.CONTRACT:
        return RewardContractError(message)
    if cause == Cause.UNAUTHORIZED:
        message += "; name the variable that holds the token in service.token_env"
    return FatalRewardError(message)
