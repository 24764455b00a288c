"""torch.compile of the transformer's blocks, in rollout workers and learner alike.

At SD3.5-Medium's size on an H100 rollout and update took 0.6 of the time (bench/RESULTS.md): eager mode there waits for
thousands of small kernels. The price: graphs with and without gradient round differently, so that the log-probabilities
of a rollout and of its replay differ by up to 3e-4 in bfloat16, where eager ones agree to the bit. That is more than
the clip range, hence the rule that old log-probabilities are the learner's own (`rl/recipe/validate.py`).
"""

import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

_GRAPHS_A_SHAPE = 64
"""Kinds of block (3) x adapter (policy, reference, none) x with and without gradient x batch sizes."""


def most_graphs(shapes: int) -> int:
    """How many are kept for pictures of so many shapes (sizes of a picture and its references)."""
    return _GRAPHS_A_SHAPE * max(1, shapes)


def compile_blocks(transformer: SD3Transformer2DModel, shapes: int = 1) -> None:
    """Compile every block in place; equal blocks share their graphs. The first forward of each kind takes seconds, for
    each of the `shapes` that come; beyond its limits torch would go on in eager mode, unasked.

    Intermediate results are rounded to the model's dtype as in eager mode, where a fused kernel would keep float32.
    Shapes are static: a graph for any shape would be slower, and other arithmetic.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, most_graphs(shapes))
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, most_graphs(shapes))
    for block in transformer.transformer_blocks:
        block.compile(dynamic=False, options={"emulate_precision_casts": True})
