"""The LoRA forward of two kernels against the formula, its gradient, and PEFT's switches."""

import pytest
import torch
from peft import LoraConfig
from torch import nn

from models.lora.linear import LoraLinear


def layer(dtype=torch.float32) -> LoraLinear:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, init_lora_weights=False)
    return LoraLinear(nn.Linear(8, 5).to(dtype), "policy", config, r=3, lora_alpha=6).to(dtype)


def expected(made: LoraLinear, x: torch.Tensor, name: str = "policy") -> torch.Tensor:
    return made.base_layer(x) + 2.0 * x @ made.lora_A[name].weight.T @ made.lora_B[name].weight.T


@pytest.mark.parametrize("shape", [(4, 8), (2, 7, 8)])
def test_forward_and_gradients_are_those_of_the_formula(shape):
    made, x = layer(), torch.randn(shape)
    torch.testing.assert_close(made(x), expected(made, x))
    parameters = [made.lora_A["policy"].weight, made.lora_B["policy"].weight]
    found, wanted = (
        torch.autograd.grad(output.square().sum(), parameters) for output in (made(x), expected(made, x))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_bfloat16_rounds_the_sum_once():
    made, x = layer(torch.bfloat16), torch.randn(64, 8, dtype=torch.bfloat16)
    exact = expected(layer().to(torch.bfloat16).to(torch.float64), x.double())
    assert (made(x).double() - exact).abs().max() < 2**-6 * exact.abs().max()
    assert made(x).dtype == torch.bfloat16


def test_the_selected_adapter_counts():
    made, x = layer(), torch.randn(4, 8)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, init_lora_weights=False)
    made.update_layer("reference", 3, 6, config=config)
    torch.testing.assert_close(made(x), expected(made, x))
    made._active_adapter = ["reference"]
    torch.testing.assert_close(made(x), expected(made, x, "reference"))
    made._active_adapter = ["elsewhere"]
    torch.testing.assert_close(made(x), made.base_layer(x), atol=0, rtol=0)
    made._active_adapter, made._disable_adapters = ["policy"], True
    torch.testing.assert_close(made(x), made.base_layer(x), atol=0, rtol=0)


def test_several_adapters_and_merged_ones_are_pefts():
    made, x = layer(), torch.randn(4, 8)
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, init_lora_weights=False)
    made.update_layer("reference", 3, 6, config=config)
    both = expected(made, x) + expected(made, x, "reference") - made.base_layer(x)
    made._active_adapter = ["policy", "reference"]
    torch.testing.assert_close(made(x), both)
    made._active_adapter = ["policy"]
    one = expected(made, x)
    made.merge()
    torch.testing.assert_close(made(x), one)
    torch.testing.assert_close(made(x), made.base_layer(x), atol=0, rtol=0)


def test_hooks_on_both_matrices_run():
    """ZeRO-3 gathers a module's parameters in its hooks."""
    made, seen = layer(), []
    for part in (made.lora_A, made.lora_B):
        part["policy"].register_forward_pre_hook(lambda module, _: seen.append(module))
    made(torch.randn(4, 8))
    assert seen == [made.lora_A["policy"], made.lora_B["policy"]]
