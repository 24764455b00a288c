"""The bearer token of a reward service: in an environment variable, read where it is used, and kept nowhere."""

from __future__ import annotations

import os

from rewards.base import FatalRewardError


def read_token(variable: str) -> str:
    """The token. Raises FatalRewardError, which never shows the value, when no header could carry it."""
    token = os.environ.get(variable, "")
    if not token:
        raise FatalRewardError(
            f"the environment variable {variable}, which holds the bearer token, is not set"
        )
    if not token.isascii() or not token.isprintable() or " " in token:
        raise FatalRewardError(
            f"the environment variable {variable} holds a space, a line end or another character that no bearer "
            "token has"
        )
    return token
