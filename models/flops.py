"""Floating-point operations of the SD3 / Kontext transformer by formula: from its config and token counts alone.

Counted: matrix products (linears, LoRA, patch convolution, attention), one multiply-add as 2. Not counted:
norms, activations, softmax, sampler arithmetic, and anything computed twice (gradient checkpointing, the recomputed
scores of fused attention): these are the model's operations, whatever an implementation spends on them.

Per block, for image tokens I, text tokens L, width D (a last block makes no use of its text output):

    linears    2 n D² for each of: q k v out (4 D²) and feed-forward (8 D²), in both streams; q k v out again
               for the image stream of a dual-attention block; modulation on 1 token
    attention  4 (I + L)² D, and 4 I² D for the second attention of a dual block
    LoRA       2 n r (in + out) on each adapted linear
    backward   each linear's input gradient (the base is frozen, so it has no weight gradient), twice the
               attention, both LoRA factors and their inputs; nothing flows into modulation or embeddings
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_TIME_CHANNELS = 256  # sinusoidal channels of diffusers' timestep embedding


@dataclass(frozen=True)
class Tokens:
    """Sequence of one sample: tokens of the image being made, of all its reference images, of its text."""

    target: int
    reference: int
    text: int

    @property
    def image(self) -> int:
        return self.target + self.reference


@dataclass(frozen=True)
class _Linear:
    """`inputs -> outputs` on `tokens` rows; `gradient`: whether a gradient flows back into its input."""

    tokens: int
    inputs: int
    outputs: int
    adapted: bool = False
    gradient: bool = True

    def forward(self, rank: int) -> int:
        base = 2 * self.tokens * self.inputs * self.outputs
        return base + (2 * self.tokens * rank * (self.inputs + self.outputs) if self.adapted else 0)

    def backward(self, rank: int) -> int:
        base = 2 * self.tokens * self.inputs * self.outputs if self.gradient else 0
        if not self.adapted:
            return base
        inputs = self.inputs * (2 if self.gradient else 1)
        return base + 2 * self.tokens * rank * (2 * self.outputs + inputs)


def forward_flops(config: Mapping[str, Any], tokens: Tokens, *, lora_rank: int = 0) -> int:
    """One forward of one sample. `lora_rank` > 0: unmerged LoRA on `models.lora.targets.DEFAULT_TARGETS`."""
    return sum(linear.forward(lora_rank) for linear in _linears(config, tokens)) + attention_flops(
        config, tokens
    )


def backward_flops(config: Mapping[str, Any], tokens: Tokens, *, lora_rank: int) -> int:
    """The backward that belongs to it, with only the LoRA matrices trained."""
    linears = sum(linear.backward(lora_rank) for linear in _linears(config, tokens))
    return linears + 2 * attention_flops(config, tokens)


def rollout_flops(
    config: Mapping[str, Any], tokens: Tokens, *, lora_rank: int, num_steps: int, guided: bool
) -> int:
    """One sampled trajectory: `num_steps` forwards, twice as many with classifier-free guidance."""
    return num_steps * (2 if guided else 1) * forward_flops(config, tokens, lora_rank=lora_rank)


def update_flops(
    config: Mapping[str, Any], tokens: Tokens, *, lora_rank: int, train_steps: int, guided: bool, kl: bool
) -> int:
    """One sample's share of an update: `train_steps` replayed steps.

    Each is a forward and a backward of the conditional half, with guidance a forward of the unconditional half
    without gradient, and for the KL reference both halves again through the base model.
    """
    policy = forward_flops(config, tokens, lora_rank=lora_rank)
    step = policy + backward_flops(config, tokens, lora_rank=lora_rank)
    if guided:
        step += policy
    if kl:
        step += (2 if guided else 1) * forward_flops(config, tokens)
    return train_steps * step


def _width(config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] * config["attention_head_dim"]


def attention_flops(config: Mapping[str, Any], tokens: Tokens) -> int:
    """The part of one forward that no weight belongs to; a backward costs twice as much."""
    joint = config["num_layers"] * (tokens.image + tokens.text) ** 2
    dual = len(config["dual_attention_layers"]) * tokens.image**2
    return 4 * _width(config) * (joint + dual)


def _linears(config: Mapping[str, Any], tokens: Tokens) -> Iterator[_Linear]:
    width, pooled = _width(config), config["pooled_projection_dim"]
    patch = config["patch_size"] ** 2 * config["in_channels"]
    yield _Linear(tokens.image, patch, width, gradient=False)
    yield _Linear(tokens.text, config["joint_attention_dim"], width, gradient=False)
    for inputs in (_TIME_CHANNELS, width, pooled, width):
        yield _Linear(1, inputs, width, gradient=False)
    for index in range(config["num_layers"]):
        yield from _block(config, tokens, index)
    yield _Linear(1, width, 2 * width, gradient=False)
    yield _Linear(tokens.target, width, config["patch_size"] ** 2 * config["out_channels"])


def _block(config: Mapping[str, Any], tokens: Tokens, index: int) -> Iterator[_Linear]:
    width = _width(config)
    dual, last = index in config["dual_attention_layers"], index == config["num_layers"] - 1
    fed = index > 0  # before the first block nothing is trained, so no gradient is needed at its projections
    yield _Linear(1, width, (9 if dual else 6) * width, gradient=False)
    yield _Linear(1, width, (2 if last else 6) * width, gradient=False)
    for count in (tokens.image, tokens.text, *([tokens.image] if dual else [])):
        for _ in range(3):
            yield _Linear(count, width, width, adapted=True, gradient=fed)
    yield _Linear(tokens.image, width, width, adapted=True)
    if dual:
        yield _Linear(tokens.image, width, width, adapted=True)
    for count in (tokens.image, *(() if last else (tokens.text,))):
        yield _Linear(count, width, 4 * width)
        yield _Linear(count, 4 * width, width)
    if not last:
        yield _Linear(tokens.text, width, width, adapted=True)
