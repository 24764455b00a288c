"""What a command logs, and how: every command line of the project calls this first."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import recipes


def start_logging() -> None:
    """INFO and above to stderr in one format; libraries' own line for every request and lock is left out."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # openai's client logs as httpx2, our own as httpx: a thousand judged pictures would be a thousand lines.
    for noisy in ("httpx", "httpx2", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own report, but for Ctrl-C, which needs no traceback; the process ends by the signal all the same."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("Interrupted.\n")
    else:
        sys.__excepthook__(kind, error, trace)


def submitted_job() -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def relative_path_problems(
    paths: Mapping[str, str | Path | None], read: Mapping[str, str | None] | None = None
) -> list[str]:
    """One line for each relative path under a submitted job: its driver runs in a temporary copy of the working
    directory, where results would be lost, and which other nodes do not see.

    paths: what messages begin with, such as `output_dir='runs'`, and the path; None is left out. read: the same of
    what is only read, which may also be packaged.
    """
    if not submitted_job():
        return []
    return [
        f"{named} is relative, and a submitted job runs in a temporary copy of the working directory; give an absolute "
        "path that every node sees"
        for named, path in (*paths.items(), *_unpackaged(read or {}))
        if path is not None and not Path(path).is_absolute()
    ]


def _unpackaged(paths: Mapping[str, str | None]) -> list[tuple[str, str]]:
    return [
        (named, path) for named, path in paths.items() if path is not None and not recipes.is_packaged(path)
    ]
