"""What a run logs: every name with unit and meaning, and how figures of ranks become one record."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from core.scalars import Metric
from core.training.estimates import PEAK_TFLOPS

BUCKETS = 10
METRICS = (
    Metric("loss", "squared velocity", "Mean over the samples since the record before, by the live weights."),
    Metric(
        "loss/{task}", "squared velocity", "The same over t2i or edit batches; null where there was none."
    ),
    Metric("loss/sigma/{low}", "squared velocity", "The same over noise levels [low, low + .1)."),
    Metric("optimizer/grad_norm", "L2 norm", "Global gradient norm before clipping, mean over the steps."),
    Metric("optimizer/lr", "1", "Learning rate of the last step."),
    Metric(
        "throughput/images_per_second", "images/s", "Samples trained on, loading included, over all ranks."
    ),
    Metric(
        "throughput/mfu", "share", "Operations by formula over ranks x the card's peak; null without card."
    ),
)


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step as a rank saw it.

    losses, sigmas: of its samples; gradient_norm: global, before clipping; flops: operations of its share.
    """

    step: int
    task: str
    losses: tuple[float, ...]
    sigmas: tuple[float, ...]
    gradient_norm: float
    learning_rate: float
    flops: float


def window_record(
    figures: Sequence[Sequence[StepFigures]], seconds: float, *, card: str | None
) -> dict[str, Any]:
    """One record from the figures of every rank over the same steps, which took `seconds`."""
    ranks, steps = len(figures), figures[0]
    losses = list(_losses(figures))
    record: dict[str, Any] = {"step": steps[-1].step, "loss": _mean([loss for loss, _, _ in losses])}
    for task in ("t2i", "edit"):
        record[f"loss/{task}"] = _mean([loss for loss, _, own in losses if own == task])
    for bucket in range(BUCKETS):
        inside = [loss for loss, sigma, _ in losses if min(BUCKETS - 1, int(sigma * BUCKETS)) == bucket]
        record[f"loss/sigma/{bucket / BUCKETS:.1f}"] = _mean(inside)
    record["optimizer/grad_norm"] = _mean([one.gradient_norm for one in steps])
    record["optimizer/lr"] = steps[-1].learning_rate
    record["throughput/images_per_second"] = len(losses) / seconds
    operations = math.fsum(one.flops for rank in figures for one in rank)
    peak = None if card is None else PEAK_TFLOPS[card] * 1e12
    record["throughput/mfu"] = None if peak is None else operations / seconds / (ranks * peak)
    return record


def _losses(figures: Sequence[Sequence[StepFigures]]) -> Iterator[tuple[float, float, str]]:
    """(loss, sigma, task) of every sample, in the order of the global batch, so that means do not depend on ranks."""
    for ranks in zip(*figures, strict=True):
        for one in ranks:
            for loss, sigma in zip(one.losses, one.sigmas, strict=True):
                yield loss, sigma, one.task


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
