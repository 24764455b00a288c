"""What a card does to a call is the machine's failure, whichever worker makes it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from core.failures import InfrastructureFailure

log = logging.getLogger(__name__)


@contextmanager
def machine_failures(worker: str, doing: str, remedy: str) -> Iterator[None]:
    """Raises InfrastructureFailure where the block runs out of memory: another worker may have more.

    A device error leaves every later call of this process failing, so it ends the process: Ray restarts the actor, and
    the controller hands the call to another worker.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InfrastructureFailure(f"{worker}: out of GPU memory {doing}; {remedy}") from error
    except torch.AcceleratorError:
        log.exception("%s: the device failed; this worker leaves to be restarted", worker)
        os._exit(1)
