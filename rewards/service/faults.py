"""How a request that was not scored is told: a cause, a sentence, and the HTTP status that fits."""

from __future__ import annotations

import math

from starlette.responses import JSONResponse

from rewards.base import FatalRewardError, RetryableRewardError, RewardContractError
from rewards.loading import describe_error
from rewards.service.wire import Cause, WireError

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
_PASSING = (Cause.UNAVAILABLE, Cause.INFRASTRUCTURE, Cause.TIMEOUT, Cause.EXCEPTION)


class Fault(Exception):
    """A request ends without scores. `retry_after_s`: seconds to wait before the next."""

    def __init__(self, cause: Cause, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.cause, self.retry_after_s = cause, retry_after_s

    def response(self) -> JSONResponse:
        """`{"error": {cause, message, fatal, retry_after_s}}`."""
        error = {
            "cause": self.cause.value,
            "message": str(self).encode(errors="replace").decode(),
            "fatal": self.cause not in _PASSING,
            "retry_after_s": self.retry_after_s,
        }
        status, headers = _STATUS[self.cause], {}
        if status == 503:
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse({"error": error}, status, headers)


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
