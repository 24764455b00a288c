"""Index a recipe's data and encode it ahead: `python -m pretrain.data.cache RECIPE [key=value ...] [--workers 4]`.

Encodes what `data.cache` asks for into shards below `data.cache_dir`; shards that are there already are left, so a
killed run is simply started again. `--part 0/4` does every fourth shard: one command for each of four machines on
the same storage.
"""

import argparse
import concurrent.futures
import logging
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path

import torch

from core.failures import DataError
from core.logs import start_logging
from core.progress import Progress
from core.recipe import ConfigError, read_recipe
from pretrain.data.config import DataConfig, DataRecipe, broken_data_rules
from pretrain.data.encode import Broken, Job, ShardEncoder

log = logging.getLogger(__name__)


def read_data(recipe: str | Path, overrides: Sequence[str]) -> DataConfig:
    """The `data:` section of a recipe. Raises ConfigError with every problem."""
    found = read_recipe(
        recipe, overrides, DataRecipe, others=None, rules=lambda found: broken_data_rules(found.data)
    )
    return found.data


def fill_cache(data: DataConfig, *, workers: int, part: int = 0, parts: int = 1) -> int:
    """Encode the missing shards of this part; returns how many those were.

    Raises:
        DataError: sources or encoders that cannot be used; more broken samples among those encoded than
            `max_corrupt_share` allows.
    """
    encoder = ShardEncoder(data)
    jobs = encoder.jobs()[part::parts]
    missing = [job for job in jobs if not encoder.path(job).is_file()]
    log.info("%d of %d shards are there already", len(jobs) - len(missing), len(jobs))
    broken: set[Broken] = set()
    with Progress().phase("encode", total=len(missing), unit="shard") as bar:
        for found in _run_all(encoder, data, missing, workers):
            for sample in sorted(found - broken, key=astuple):
                log.warning("data.sources[%d]: cannot read %s: %s: %s", *astuple(sample))
            broken |= found
            bar.advance()
    for source, lost in Counter(sample.source for sample in broken).items():
        encoder.check_broken(source, lost)
    return len(missing)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.data.cache", description=__doc__.splitlines()[0]
    )
    parser.add_argument("recipe", help="YAML file with a data: section")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to change")
    parser.add_argument("--workers", type=int, default=1, help="processes, each with its own encoders")
    parser.add_argument(
        "--part", type=_part, default=(0, 1), metavar="I/N", help="every N-th shard from the I-th"
    )
    options = parser.parse_intermixed_args(arguments)
    start_logging()
    try:
        data = read_data(options.recipe, options.overrides)
        fill_cache(data, workers=max(1, options.workers), part=options.part[0], parts=options.part[1])
    except (ConfigError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run_all(encoder: ShardEncoder, data: DataConfig, jobs: list[Job], workers: int) -> Iterator[set[Broken]]:
    if workers == 1 or len(jobs) <= 1:
        yield from (set(encoder.run(job)) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start, (data, workers)) as pool:
        for done in concurrent.futures.as_completed([pool.submit(_run, job) for job in jobs]):
            yield set(done.result())


_own: list[ShardEncoder] = []
"""The encoder of this worker process."""


def _start(data: DataConfig, workers: int) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _own.append(ShardEncoder(data))


def _run(job: Job) -> list[Broken]:
    return _own[0].run(job)


def _part(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as 0/4 to 3/4")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())
