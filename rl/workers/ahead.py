"""The next step's first prompts, encoded while the learner updates.

A head start and no more: what is not there when its step begins, or failed, is encoded in its turn like the rest, by
the dispatcher and within its limits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from rl.workers.requests import RolloutRequest, encode_call

EACH = 2
"""Requests of an encode worker: what is not there in time is encoded twice, so that they are few."""


class HeadStart:
    """Conditioning on its way; only the references are held here."""

    def __init__(self) -> None:
        self._begun: dict[int, tuple[RolloutRequest, tuple[Any, ...]]] = {}

    def begin(self, requests: Sequence[RolloutRequest], encoders: Sequence[Any]) -> None:
        """Ask encode workers (actor handles) for the first of these in turn, and forget what was asked for before."""
        self._begun = {}
        for number, request in enumerate(requests[: EACH * len(encoders)]):
            call = encode_call(request)
            method = getattr(encoders[number % len(encoders)], call.method)
            refs = method.options(num_returns=call.num_returns).remote(*call.args)
            self._begun[request.id] = request, tuple(refs)

    def take(self, request: RolloutRequest) -> tuple[Any, ...] | None:
        """References to one conditioning per prompt, once; None where they are not there."""
        begun, refs = self._begun.get(request.id, (None, ()))
        if begun != request:
            return None
        del self._begun[request.id]
        if not ray.wait([refs[0]], timeout=0, fetch_local=False)[0]:
            return None
        try:
            ray.get(refs[0], timeout=60)
        except RayError:
            return None  # its own turn tells what is wrong
        return refs[1:]
