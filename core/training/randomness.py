"""Random numbers as a function of (seed, step, stream): no state to save, so resume is exact."""

import numpy as np
import torch


def torch_generator(seed: int, step: int, stream: int = 0, *place: int) -> torch.Generator:
    """CPU torch generator for one use (`stream`) at one step, or for one place in it."""
    state = np.random.SeedSequence([seed, step, stream, *place]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
