"""Failure classes decided where the failure happens: this prompt's data, or the machine. All else is fatal."""

from __future__ import annotations


class DataFailure(RuntimeError):
    """This prompt cannot be sampled (unreadable reference, non-finite latents). Its group is dropped, counted
    and reported; the run stops when `rollout.max_failed_prompts` is passed."""


class InfrastructureFailure(RuntimeError):
    """This worker cannot work at present (device lost, out of memory by a neighbour). Retried elsewhere."""
