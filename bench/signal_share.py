"""The share of a set of noisy gradients that they have in common.

With g_i = m + noise_i, independent noise:   share = E[g_i . g_j, i != j] / E|g_i|^2 = |m|^2 / E|g_i|^2.
The mean of n gradients then has the signal-to-noise ratio n x share / (1 - share), and so has an optimizer that sees n.

Shapes: N gradients, P coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """`value` with `error`, its jackknife standard error. A share that is not above 2 errors is not told from 0."""

    value: float
    error: float


def common_share(gradients: Tensor) -> Share:
    """The common share of gradients [N, P] in Adam's metric: every coordinate is divided by its root mean square.

    Raises ValueError for fewer than 3 gradients or all zero ones.
    """
    count = len(gradients)
    if count < 3:
        raise ValueError(f"{count} gradients: at least 3 are needed")
    squares = gradients.square().mean(0)
    if not bool(squares.any()):
        raise ValueError("all gradients are zero: no group has spread in its rewards")
    # Coordinates that hardly ever move would be blown up; Adam's own epsilon is as small beside the others'.
    scaled = gradients * (squares + 1e-4 * squares.mean()).rsqrt()
    products = (scaled @ scaled.T).double()
    own = products.diagonal()
    across = products.sum(1) - own
    whole = _ratio(across.sum(), own.sum(), count)
    without = _ratio(across.sum() - 2 * across, own.sum() - own, count - 1)
    spread = (without - without.mean()).square().sum() * (count - 1) / count
    return Share(float(whole), math.sqrt(float(spread)))


def _ratio(across: Tensor, own: Tensor, count: int) -> Tensor:
    return across / (count * (count - 1)) / (own / count)
