"""Compiled blocks compute what eager ones do, with the adapter that is selected at the time."""

import shutil

import pytest
import torch

from models.compiling import compile_blocks
from models.lora.attach import adapter_parameters, attach_lora, use_adapter
from tests.fakes.tiny_models import make_tiny_transformer


def model():
    torch.manual_seed(0)
    transformer = make_tiny_transformer(num_layers=1, dual_attention_layers=())
    attach_lora(transformer, rank=4, alpha=8, targets=["attn.to_q", "attn.to_v"])
    for name, parameter in adapter_parameters(transformer).items():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    return transformer


def velocity(transformer):
    generator = torch.Generator().manual_seed(7)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 6, 48, generator=generator)
    pooled = torch.randn(2, 40, generator=generator)
    return transformer(latents, text, pooled, torch.tensor([500.0, 100.0]), return_dict=False)[0]


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_blocks_are_the_eager_ones():
    eager, compiled = model(), model()
    compile_blocks(compiled)
    for name in ("policy", None):
        with use_adapter(eager, name), use_adapter(compiled, name), torch.no_grad():
            torch.testing.assert_close(velocity(compiled), velocity(eager), atol=1e-5, rtol=1e-5)
    for transformer in (eager, compiled):
        velocity(transformer).square().mean().backward()
    for name, parameter in adapter_parameters(compiled).items():
        torch.testing.assert_close(parameter.grad, adapter_parameters(eager)[name].grad, atol=1e-6, rtol=1e-4)


def test_enough_graphs_are_kept():
    compile_blocks(model())
    assert torch._dynamo.config.recompile_limit >= 64
    compile_blocks(model(), shapes=40)
    assert torch._dynamo.config.recompile_limit >= 64 * 40 <= torch._dynamo.config.accumulated_recompile_limit
