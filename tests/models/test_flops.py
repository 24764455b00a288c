"""The formula against PyTorch's own counter, and against the figures in the documentation."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.sizes import random_transformer, transformer_config
from models.flops import Tokens, backward_flops, forward_flops, rollout_flops, update_flops
from models.lora.attach import attach_lora
from models.sd35_medium import sd35_medium_config

RANK = 4
TOKENS = {"t2i": Tokens(target=16, reference=0, text=11), "edit": Tokens(target=16, reference=16, text=11)}


def make_inputs(config: dict[str, Any], task: str) -> dict[str, torch.Tensor]:
    latents = torch.randn(1, config["in_channels"], 8, 8)
    inputs = {
        "hidden_states": latents,
        "encoder_hidden_states": torch.randn(1, TOKENS[task].text, config["joint_attention_dim"]),
        "pooled_projections": torch.randn(1, config["pooled_projection_dim"]),
        "timestep": torch.tensor([500.0]),
    }
    return inputs | ({"reference_hidden_states": latents} if task == "edit" else {})


def counted(call: Any) -> tuple[int, Any]:
    """What PyTorch counts, with attention spelled out as matrix products (fused kernels recompute)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = call()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("task", ["t2i", "edit"])
@pytest.mark.parametrize("rank", [0, RANK])
def test_forward_formula_is_what_pytorch_counts(task: str, rank: int) -> None:
    config = transformer_config("tiny")
    transformer = random_transformer(config, dtype=torch.float32, device=torch.device("cpu"))
    if rank:
        attach_lora(transformer, rank=rank, alpha=8)
    with torch.no_grad():
        flops, _ = counted(lambda: transformer(**make_inputs(config, task)))
    assert forward_flops(config, TOKENS[task], lora_rank=rank) == flops


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_backward_formula_is_what_pytorch_counts(task: str) -> None:
    config = transformer_config("tiny")
    transformer = random_transformer(config, dtype=torch.float32, device=torch.device("cpu"))
    attach_lora(transformer, rank=RANK, alpha=8)
    # The backward is that of the kernel which ran forward, so the choice must cover both.
    with sdpa_kernel(SDPBackend.MATH):
        velocity = transformer(**make_inputs(config, task)).sample
    flops, _ = counted(lambda: velocity.square().sum().backward())
    assert backward_flops(config, TOKENS[task], lora_rank=RANK) == flops


def test_a_run_is_made_of_these_passes() -> None:
    config, tokens = transformer_config("tiny"), TOKENS["edit"]
    policy, base = forward_flops(config, tokens, lora_rank=RANK), forward_flops(config, tokens)
    backward = backward_flops(config, tokens, lora_rank=RANK)
    shared = {"lora_rank": RANK}
    assert rollout_flops(config, tokens, num_steps=10, guided=False, **shared) == 10 * policy
    assert rollout_flops(config, tokens, num_steps=10, guided=True, **shared) == 20 * policy
    guided = update_flops(config, tokens, train_steps=9, guided=True, kl=True, **shared)
    assert guided == 9 * (2 * policy + backward + 2 * base)
    plain = update_flops(config, tokens, train_steps=9, guided=False, kl=False, **shared)
    assert plain == 9 * (policy + backward)


def test_sd35_medium_at_512_pixels() -> None:
    """The figures that bench/README.md states."""
    config = sd35_medium_config()
    t2i, edit = Tokens(1024, 0, 333), Tokens(1024, 1024, 333)

    def sample(tokens: Tokens) -> float:
        rollout = rollout_flops(config, tokens, lora_rank=32, num_steps=10, guided=True)
        return rollout + update_flops(config, tokens, lora_rank=32, train_steps=9, guided=True, kl=True)

    assert forward_flops(config, t2i) / 1e12 == pytest.approx(2.44, abs=0.005)
    assert forward_flops(config, edit) / 1e12 == pytest.approx(4.90, abs=0.005)
    assert sample(t2i) / 1e12 == pytest.approx(163.6, abs=0.05)
    assert sample(edit) / 1e12 == pytest.approx(332.2, abs=0.05)
