"""Operations of training on one sample, by formula (a multiply-add is 2).

A forward of each model, times the passes it makes:

    transformer   models/flops.py                         trained 3; frozen below a trained conditioner: 2, and its
                                                          attention (which has no weights) once more
    connector     2 P Q + 4 Q² C L                        trained 3; frozen below trained queries 2; else 1
    VLM, text     2 P_text T + 2 T² D L (causal)          2 where the queries are trained, else 1
    VLM, vision   2 P_vision x patches                    1

Q queries, T = Q + picture tokens + TEXT_TOKENS. Not counted: VAE and SD3's text encoders (a cache may hold what they
give), a VLM whose states at the queries are cached, the vision tower's attention, the optimizer, and what gradient
checkpointing computes again.
"""

from __future__ import annotations

from models.flops import Tokens, attention_flops, forward_flops
from models.metaquery.reading import PIXELS_PER_TOKEN
from pretrain.flow.config import FlowRecipe
from pretrain.flow.sizes import ModelSizes

TEXT_TOKENS = 64
"""Assumed length of the chat around the queries: template and prompt."""


def sample_flops(recipe: FlowRecipe, sizes: ModelSizes, *, height: int, width: int, edit: bool) -> float:
    """Operations of forward and backward of one sample of this size in pixels."""
    shape = sizes.transformer
    image = (height // sizes.factor // shape["patch_size"]) * (width // sizes.factor // shape["patch_size"])
    reference = image if edit and recipe.references.transformer else 0
    tokens = Tokens(image, reference, sizes.text_tokens)
    forward = forward_flops(shape, tokens)
    frozen = 2.0 * forward + attention_flops(shape, tokens)
    total = 3.0 * forward if recipe.trains("transformer") else frozen
    seen = (height // PIXELS_PER_TOKEN) * (width // PIXELS_PER_TOKEN) if edit and recipe.references.vlm else 0
    return total + _connector_flops(recipe, sizes) + _vlm_flops(recipe, sizes, seen)


def _connector_flops(recipe: FlowRecipe, sizes: ModelSizes) -> float:
    if sizes.conditioner is None:
        return 0.0
    queries, shape = sizes.conditioner.num_queries, sizes.conditioner.connector_config
    attention = 4 * queries**2 * shape.hidden_size * shape.num_hidden_layers
    passes = 3 if recipe.trains("connector") else 2 if recipe.trains("queries") else 1
    return passes * (2 * sizes.parameters["connector"] * queries + attention)


def _vlm_flops(recipe: FlowRecipe, sizes: ModelSizes, seen: int) -> float:
    if sizes.vlm is None or sizes.conditioner is None or not recipe.loads_vlm:
        return 0.0
    vlm, length = sizes.vlm, sizes.conditioner.num_queries + seen + TEXT_TOKENS
    text = 2 * vlm.text * length + 2 * length**2 * vlm.width * vlm.layers
    return (2 if recipe.trains("queries") else 1) * text + 2 * vlm.vision * 4 * seen
