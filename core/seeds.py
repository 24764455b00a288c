"""Random numbers as a function of what they are for: no state to save, so resume is exact."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any tuple, the same on every machine and Python."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numpy_generator(seed: int, step: int, stream: int = 0) -> np.random.Generator:
    """NumPy generator for one use (`stream`) at one step."""
    return np.random.default_rng([seed, step, stream])
