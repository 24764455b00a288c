"""Memory and speed of a training run before it starts, by formula: what the plans of `--dry-run` share.

Memory of one rank, from P parameters under the engine of which Q are trained, on R ranks, w bytes a weight:

    ZeRO-1   w P      + 4 Q      + k Q / R      weights + gradients in float32 + optimizer, where k is 12 for the fp32
    ZeRO-2   w P      + 4 Q / R  + k Q / R      master copy and both Adam moments, and 16 with a moving average
    ZeRO-3   w P / R  + 4 Q / R  + k Q / R

Activations are an estimate and labelled so: with gradient checkpointing every block keeps its input alone, and one
block at a time its inner values (34 numbers a token and channel, after Korthikanti et al., 2022, without the
attention matrix, which SDPA does not keep); without it every block keeps those.
"""

from __future__ import annotations

from collections.abc import Sequence

GIB = 2**30
WIDTHS = {"float32": 4, "bfloat16": 2}
"""Bytes of a weight."""
PEAK_TFLOPS = {"a100": 312.0, "h100": 989.0, "h200": 989.0}
"""Peaks that MFU is measured on: dense bfloat16, by the makers' data sheets."""
MFU = 0.4
"""Assumed share of the peak that training reaches."""
_INNER = 34

Stream = tuple[int, int, int]
"""(tokens, channels, blocks) of what runs through one stack of blocks."""


def zero_bytes(
    parameters: int, trained: int, *, width: int, ranks: int, stage: int, average: bool
) -> tuple[float, float, float]:
    """(weights, gradients, optimizer) of one rank; see the module's table."""
    weights = width * parameters / (ranks if stage == 3 else 1)
    gradients = 4 * trained / (ranks if stage >= 2 else 1)
    return weights, gradients, (16 if average else 12) * trained / ranks


def activation_numbers(streams: Sequence[Stream], *, checkpointing: bool) -> int:
    """Numbers kept for the backward of one sample (an estimate)."""
    inputs = sum(tokens * channels * blocks for tokens, channels, blocks in streams)
    largest = max(tokens * channels for tokens, channels, _ in streams)
    return inputs + _INNER * largest if checkpointing else _INNER * inputs


def memory_line(
    stage: int, held: float, activations: float, *, what: str, chosen: str = "", host: float = 0.0
) -> str:
    """One ZeRO stage. held, activations, host: bytes; what: is held; chosen: the recipe's key if it is its stage."""
    held, activations, host = held / GIB, activations / GIB, host / GIB
    off = f", {host:.1f} GiB more in host memory" if host else ""
    mark = f" <- {chosen}" if chosen else ""
    return (
        f"memory of a rank, ZeRO-{stage}: {held:.1f} GiB of {what} + about {activations:.1f} GiB of activations "
        f"(estimate) = {held + activations:.1f} GiB{off}{mark}"
    )
