"""Publish the learner's adapter to every replica, and believe it only when each replica has proved it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from core.cluster.dispatch import Dispatcher
from models.lora.attach import Adapter
from rollout.engine import AdapterReceipt
from rollout.worker import Policy

log = logging.getLogger(__name__)


class PublishError(RuntimeError):
    """A replica answered with other weights than were sent, or the new weights changed nothing."""


def publish(adapter: Adapter, dispatcher: Dispatcher, *, previous: Policy | None, timeout_s: float) -> Policy:
    """Send `adapter` to all rollout workers; returns only when every answering one is verified.

    Each replica hashes its live weights after loading and runs a fixed probe before and after. Verified means:
    the hash is the learner's, and if it differs from `previous` and from what the replica held, the probe's output
    moved (an adapter that binds to no module changes no output). A worker that does not answer within `timeout_s`, the
    limit of all together, is restarted; it fetches the adapter by itself before its next sample. Where none answers,
    those that come back are asked.

    Raises PublishError naming the replica, or when not one has proved it; PoolExhausted when too few come back.
    """
    ref = ray.put(adapter)
    verified = 0
    for workers in (dispatcher.workers, dispatcher.await_workers):
        verified = verified or _send(ref, adapter, dispatcher, workers("rollout"), previous, timeout_s)
    if not verified:
        raise PublishError(
            f"no replica has shown that it samples with version {adapter.version}: none answered within "
            f"call_timeout_s={timeout_s:g} s, restarted ones included; the log above says why"
        )
    log.info("published version %d (%s) to %d workers", adapter.version, adapter.sha256[:12], verified)
    return Policy(adapter.version, adapter.sha256, (ref,))


def _send(
    ref: Any,
    adapter: Adapter,
    dispatcher: Dispatcher,
    workers: Sequence[Any],
    previous: Policy | None,
    timeout_s: float,
) -> int:
    """Have all workers load the adapter at once; how many have proved it."""
    waiting = {worker.load_adapter.remote(ref): worker for worker in workers}
    deadline, verified = time.monotonic() + timeout_s, 0
    while waiting:
        left_s = max(0.0, deadline - time.monotonic())
        answered, _ = ray.wait(list(waiting), num_returns=1, timeout=left_s)
        if not answered:
            break
        worker = waiting.pop(answered[0])
        try:
            receipt = ray.get(answered[0], timeout=60)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("publish of version %d: a rollout worker did not answer (%s)", adapter.version, error)
            dispatcher.report_lost("rollout", worker, hung=isinstance(error, GetTimeoutError))
            continue
        check_receipt(receipt, adapter, previous)
        verified += 1
    for worker in waiting.values():
        log.warning("publish of version %d: a rollout worker took over %g s", adapter.version, timeout_s)
        dispatcher.report_lost("rollout", worker, hung=True)
    return verified


def check_receipt(receipt: AdapterReceipt, adapter: Adapter, previous: Policy | None) -> None:
    """Raise PublishError unless the receipt proves that `adapter` took effect."""
    if receipt.version != adapter.version or receipt.sha256 != adapter.sha256:
        raise PublishError(
            f"replica {receipt.worker} holds version {receipt.version} ({receipt.sha256[:12]}) after the publish "
            f"of version {adapter.version} ({adapter.sha256[:12]}): the adapter did not arrive whole"
        )
    if not math.isfinite(receipt.probe_shift):
        raise PublishError(
            f"replica {receipt.worker}: under version {adapter.version} the outputs are not finite, so the update "
            "diverged; start a run under another name with a lower learner.learning_rate"
        )
    changed = previous is not None and previous.sha256 != adapter.sha256
    # A replica that has just drawn an evaluation may hold what it is sent: the average, from which a stage begins.
    if changed and receipt.replaced != adapter.sha256 and receipt.probe_shift == 0.0:
        raise PublishError(
            f"replica {receipt.worker} loaded version {adapter.version}, but its outputs did not move: the adapter "
            "binds to no module that is used. Check model.lora.targets."
        )
