"""torch.compile of the transformer's blocks, in rollout workers and learner alike.

At SD3.5-Medium's size on an H100 rollout and update took 0.6 of the time (bench/RESULTS.md): eager mode there waits for
thousands of small kernels. The price: graphs with and without gradient round differently, so that the log-probabilities
of a rollout and of its replay differ by up to 3e-4 in bfloat16, where eager ones agree to the bit. That is more than
the clip range, hence the rule that old log-probabilities are the learner's own (`rl/recipe/validate.py`).
"""

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

_GRAPHS = 64
"""Kept at most: kinds of block (3) x adapter (policy, reference, none) x with and without gradient x batch shapes."""


def compile_blocks(transformer: SD3Transformer2DModel) -> None:
    """Compile every block in place; equal blocks share their graphs. The first forward of each kind takes seconds.

    Intermediate results are rounded to the model's dtype as in eager mode, where a fused kernel would keep float32.
    Shapes are static: a graph for any shape would be slower, and other arithmetic.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False, options={"emulate_precision_casts": True})
