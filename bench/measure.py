"""Seconds, peak memory and the card's published peak."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Dense bfloat16 tensor-core peaks from NVIDIA's data sheets (half of the figures given "with sparsity").
_BF16_PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
}


@dataclass(frozen=True)
class Measurement:
    """seconds: median of the repeats; fastest and slowest beside it; peak_gib: see `peak_memory_gib`."""

    seconds: float
    fastest: float
    slowest: float
    peak_gib: float


def measure(work: Callable[[], object], *, device: torch.device, warmup: int, repeats: int) -> Measurement:
    """Run `work` `warmup` times unmeasured, then `repeats` times, waiting for the device each time."""
    for _ in range(warmup):
        work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return Measurement(statistics.median(seconds), min(seconds), max(seconds), peak_memory_gib(device))


def peak_memory_gib(device: torch.device) -> float:
    """On CUDA the allocator's peak since `measure` reset it; on CPU the process's largest resident size so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def device_name(device: torch.device) -> str:
    """The card's name, or how many threads of the CPU were used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The published bfloat16 peak of a card known by name; None for other cards, types and CPUs."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return _BF16_PEAK_TFLOPS.get(torch.cuda.get_device_name(device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
