"""Reads every file of a data set once, in processes of its own where there are several."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path

from core.progress import Progress


def index_files(index_one: Callable[[Path], object], files: Sequence[Path], workers: int) -> None:
    """Call `index_one`, which must be picklable, for each file, in up to `workers` processes. Raises what it raised."""
    with Progress().phase("index", total=len(files), unit="file") as bar:
        if workers == 1 or len(files) <= 1:
            for path in files:
                index_one(path)
                bar.advance()
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(min(workers, len(files)), context) as pool:
            for done in concurrent.futures.as_completed([pool.submit(index_one, path) for path in files]):
                done.result()
                bar.advance()
