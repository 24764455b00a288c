"""Publish the learner's adapter to every replica, and believe it only when each replica has proved it."""

from __future__ import annotations

import logging
import math

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
    moved (an adapter that binds to no module changes no output). A worker that does not answer is taken out of
    service; it fetches the adapter by itself before its next sample.

    Raises PublishError naming the replica.
    """
    ref = ray.put(adapter)
    workers = dispatcher.workers("rollout")
    receipts = {worker: worker.load_adapter.remote(ref) for worker in workers}
    verified = 0
    for worker, receipt_ref in receipts.items():
        try:
            receipt = ray.get(receipt_ref, timeout=timeout_s)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("publish of version %d: a rollout worker did not answer (%s)", adapter.version, error)
            dispatcher.report_lost("rollout", worker)
            continue
        check_receipt(receipt, adapter, previous)
        verified += 1
    log.info("published version %d (%s) to %d workers", adapter.version, adapter.sha256[:12], verified)
    return Policy(adapter.version, adapter.sha256, (ref,))


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
