"""What a command logs, and how: every command line of the project calls this first."""

from __future__ import annotations

import logging
import os


def start_logging() -> None:
    """INFO and above to stderr in one format; libraries' own line for every request and lock is left out."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # openai's client logs as httpx2, our own as httpx: a thousand judged pictures would be a thousand lines.
    for noisy in ("httpx", "httpx2", "filelock", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def submitted_job() -> bool:
    """Whether this process is the entry point of `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
