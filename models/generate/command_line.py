"""What the command lines of this package share: machine options, paths under a submitted job, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from core.cluster.pool import PoolSpec
from core.failures import ClusterError
from core.logs import start_logging
from models.generate.task_lines import Refused

log = logging.getLogger(__name__)

DTYPES = ("bfloat16", "float32")


def add_machine_options(group: Any) -> None:
    """`--dtype`, `--device`, `--workers`, `--threads`."""
    group.add_argument("--dtype", choices=DTYPES, help="default: float32 on CPU, else bfloat16")
    group.add_argument("--device", help="default: cuda where there is one, else cpu")
    group.add_argument(
        "--workers", type=int, default=0, help="Ray workers, one GPU each (default: 0, in this process)"
    )
    group.add_argument("--threads", type=int, help="CPU threads of each worker")


def machine_problems(args: argparse.Namespace, paths: Sequence[str]) -> list[str]:
    """Machine options out of range, and those of the options `paths` that a submitted job cannot take."""
    from core.logs import relative_path_problems

    problems = []
    if args.workers < 0:
        problems.append(f"--workers {args.workers}: must be 0 (this process) or more")
    if args.threads is not None and args.threads < 1:
        problems.append(f"--threads {args.threads}: must be 1 or more")
    given = [(name.replace("_", "-"), getattr(args, name)) for name in paths]
    each = [(name, path) for name, one in given for path in (one if isinstance(one, list) else [one])]
    return problems + relative_path_problems({}, read={f"--{name} {path}": path for name, path in each})


def machine_of(args: argparse.Namespace) -> dict[str, Any]:
    """`dtype`, `device` and `threads` as asked for.

    Else the GPU where this machine has one, and the dtype that the device computes fast; few threads beside a GPU,
    and without one the CPUs of this machine shared out to the workers.
    """
    device = args.device
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    cpus = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    threads = max(1, cpus // max(1, args.workers)) if device == "cpu" else min(4, cpus)
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    return {"dtype": dtype, "device": device, "threads": args.threads or threads}


def pool_of(workers: int, spec: Any) -> PoolSpec:
    """One GPU, where the spec's device is one, and its `threads` as CPUs for each worker."""
    return PoolSpec(workers, cpus=spec.threads, gpus=0.0 if spec.device == "cpu" else 1.0)


def run_command(problems: list[str], work: Callable[[], int], *, refused: str, stays: str) -> int:
    """The exit code of `work`: its own, 2 where it was refused, 3 where it was stopped; with the reason on stderr.

    Args:
        problems: of the arguments; where there are any, the command is refused.
        refused: what did not happen, as the message begins.
        stays: what is kept of a run that was stopped.
    """
    start_logging()
    try:
        if problems:
            raise Refused(problems)
        return work()
    except Refused as error:
        sys.stderr.write(f"{refused}:\n{error}\n")
        return 2
    except Exception as error:  # 1 would say that only some is missing
        log.error("stopped: %s", error, exc_info=not isinstance(error, ClusterError | OSError))
        sys.stderr.write(f"Stopped: {error}\n{stays} stay; run the same command again to go on.\n")
        return 3
