"""Failure classes decided where the failure happens: the data, or the machine. All else is fatal.

`DataFailure` and `InfrastructureFailure` concern one prompt and one worker of a run, `DataError` and `SampleError`
a collection of training data and one sample of it.
"""

from __future__ import annotations


class DataFailure(RuntimeError):
    """This prompt cannot be sampled (unreadable reference, non-finite latents). Its group is dropped, counted
    and reported; the run stops when `rollout.max_failed_prompts` is passed."""


class InfrastructureFailure(RuntimeError):
    """This worker cannot work at present (device lost, out of memory by a neighbour). Retried elsewhere."""


class ObjectsLost(RuntimeError):
    """What an earlier call made was lost with a node. It is made again: sampling and scoring are repeatable."""


class DataError(ValueError):
    """A collection of data that cannot be used; names the file and what to do."""


class SampleError(ValueError):
    """One sample that cannot be used; says why. It is left out and counted."""


class ClusterError(RuntimeError):
    """The cluster cannot hold the plan, or an actor did not start in time."""
