"""Makes the pictures that are not there yet and writes each with its record: whole files, or none.

orders ──► already made with these settings? kept ──► batches of alike jobs ──► core/cluster/pool.py ──► PNG files
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from core.cluster.pool import PoolSpec, run_calls
from core.failures import DataFailure
from core.files import atomic_write_bytes
from core.progress import Progress
from models.generate.jobs import Job, Order, job_pictures
from models.generate.metadata import differences, png_bytes, read_record
from models.generate.model import Generator, ModelSpec, made_on
from models.generate.task_lines import Refused

log = logging.getLogger(__name__)

Batch = tuple[Order, ...]


@dataclass
class Outcome:
    """What became of the orders. `failed`: one line for each picture that could not be made."""

    made: list[Path] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def missing_orders(orders: Sequence[Order], weights: dict[str, Any], *, overwrite: bool) -> list[Order]:
    """The orders whose file is not there, or with `overwrite` is not this picture.

    Raises:
        Refused: files that are there and are something else, each with what differs.
    """
    missing, problems = [], []
    for order in orders:
        problem = _standing(order, weights)
        if problem == "":
            continue
        if problem is None or overwrite:
            missing.append(order)
        else:
            problems.append(f"{order.origin}: {problem}; remove it, name another output, or give --overwrite")
    if problems:
        raise Refused(problems)
    return missing


def make_batches(orders: Sequence[Order], size: int) -> list[Batch]:
    """Orders of alike jobs, at most `size` together, by the first of each."""
    groups: dict[Any, list[Order]] = {}
    for order in orders:
        groups.setdefault(order.job.alike, []).append(order)
    return [
        tuple(group[start : start + size])
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


def make_pictures(
    orders: Sequence[Order], spec: ModelSpec, weights: dict[str, Any], pool: PoolSpec, *, batch_size: int
) -> Outcome:
    """Make and write every order. Raises what stops a run; what is written by then stays.

    Where a batch fails its pictures are tried one by one, so that only those are missing that are the cause.

    Args:
        weights: of `weights_record`.
    """
    outcome, common = Outcome(), weights | made_on(spec)
    with Progress().phase("generate", total=len(orders), unit="picture") as bar:

        def make(batches: Sequence[Batch]) -> list[tuple[Batch, DataFailure]]:
            lost = []
            for batch, result in _results(batches, spec, pool):
                if isinstance(result, DataFailure):
                    lost.append((batch, result))
                    continue
                for order, pixels in zip(batch, result, strict=True):
                    record = common | asdict(order.job) | {"batch": len(batch)}
                    atomic_write_bytes(order.output, png_bytes(pixels, record))
                    outcome.made.append(order.output)
                bar.advance(len(batch))
            return lost

        lost = make(make_batches(orders, batch_size))
        alone = [order for batch, _ in lost if len(batch) > 1 for order in batch]
        lost = [(batch, error) for batch, error in lost if len(batch) == 1]
        lost += make(make_batches(alone, 1)) if alone else []
    outcome.failed = [f"{order.origin}: {order.output} is not made: {error}" for (order,), error in lost]
    return outcome


def _results(batches: Sequence[Batch], spec: ModelSpec, pool: PoolSpec) -> Iterator[tuple[Batch, Any]]:
    """Pictures of each batch, or the DataFailure that says why there are none."""
    calls = ((key, partial(_arguments, batch)) for key, batch in enumerate(batches))
    for key, result in run_calls(Generator, spec, "generate", calls, pool):
        yield batches[key], result


def _arguments(batch: Batch) -> tuple[list[Job], list[list[bytes]]]:
    jobs = [order.job for order in batch]
    try:
        return jobs, [job_pictures(job) for job in jobs]
    except ValueError as error:
        raise DataFailure(str(error)) from error


def _standing(order: Order, weights: dict[str, Any]) -> str | None:
    """None where the file is absent, "" where it is this picture, else what it is instead."""
    if not order.output.exists():
        return None
    try:
        found = read_record(order.output)
    except ValueError as error:
        return str(error)
    other = differences(found, weights | asdict(order.job))
    return f"{order.output} was made with other settings: {', '.join(other)}" if other else ""
