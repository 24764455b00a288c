"""How the ranks of a training find each other and join."""

from __future__ import annotations

import os
import socket
import warnings
from datetime import timedelta


def free_port() -> int:
    """A port of this node that is free now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def join_process_group(
    *, rank: int, world_size: int, address: str, port: int, device: str, timeout_s: float
) -> None:
    """Initialise `torch.distributed` through DeepSpeed: gloo on CPU, NCCL on GPUs.

    Raises torch's distributed errors when the other ranks do not come within `timeout_s`, which bounds collectives too
    until `limit_collectives`: ranks load their models at different speed.
    """
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",  # Ray shows each actor its own GPU alone
        "DS_ACCELERATOR": "cpu" if device == "cpu" else "cuda",
    }
    # DeepSpeed calls collectives by names that torch deprecates, once per bucket: noise, not news.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed

    # Beside gloo, DeepSpeed would compile a shared-memory collective of its own at the first start on a machine, which
    # asks for a C++ compiler and gains nothing at an adapter's size.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s))


def limit_collectives(timeout_s: float) -> None:
    """Once all ranks are set up: how long each waits for the others from now on."""
    import torch

    world = torch.distributed.group.WORLD
    assert world is not None, "the process group is not set up yet"
    world.set_timeout(timedelta(seconds=timeout_s))
