"""Attaching, selecting, reading and writing adapters in memory."""

import dataclasses
import hashlib
import logging
import math

import pytest
import torch

from models.kontext import KontextTransformer
from models.lora.attach import (
    DEFAULT_TARGETS,
    Adapter,
    LoraSettings,
    adapter_parameters,
    adapter_settings,
    adapter_state,
    attach_lora,
    attached_adapters,
    hash_state,
    load_adapter_state,
    use_adapter,
)
from models.sd35_medium import NUM_PARAMETERS, NUM_TENSORS, sd35_medium_config
from tests.fakes.tiny_models import make_tiny_transformer

LORA = {"rank": 4, "alpha": 8}


def tiny() -> KontextTransformer:
    torch.manual_seed(0)
    return make_tiny_transformer()


def random_state(
    model: KontextTransformer, seed: int, adapter_name: str = "policy"
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model, adapter_name)
    return {name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in parameters.items()}


@torch.no_grad()
def velocity(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return model(
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.randn(1, 6, 48, generator=generator),
        torch.randn(1, 40, generator=generator),
        torch.tensor([500.0]),
        return_dict=False,
    )[0]


def test_full_size_counts() -> None:
    with torch.device("meta"):
        model = KontextTransformer(**sd35_medium_config())
    state = model.state_dict()
    assert len(state) == NUM_TENSORS == 909
    assert sum(p.numel() for p in model.parameters()) == NUM_PARAMETERS == 2_243_171_520
    assert sum(t.numel() for t in state.values()) == NUM_PARAMETERS + 384 * 384 * 1536
    both = attach_lora(model, rank=32, alpha=64, adapter_name="both")
    assert (both.matched, both.parameters) == (191 + 52, 23_887_872)
    first_only = attach_lora(model, rank=32, alpha=64, targets=DEFAULT_TARGETS[:8], adapter_name="first")
    assert (first_only.matched, first_only.parameters) == (191, 18_776_064)


def test_report_counts_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    with caplog.at_level(logging.INFO, logger="models.lora.attach"):
        report = attach_lora(model, **LORA)
    # 3 blocks of 8 linears, less the last block's to_add_out, plus 4 of one dual block.
    assert report.matched == 3 * 8 - 1 + 4
    assert report.parameters == report.matched * 4 * (32 + 32)
    assert "27 linear layers matched" in caplog.text
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == report.parameters


def test_dead_targets_are_all_named_and_nothing_is_attached() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="match no linear layer .*: attn3.to_q, norm_q, to_quarry"):
        attach_lora(model, **LORA, targets=["attn.to_q", "to_quarry", "attn3.to_q", "norm_q"])
    assert attached_adapters(model) == []
    without_dual = make_tiny_transformer(dual_attention_layers=())
    with pytest.raises(ValueError, match="attn2.to_k, attn2.to_out.0, attn2.to_q, attn2.to_v"):
        attach_lora(without_dual, **LORA)
    with pytest.raises(ValueError, match="non-empty list"):
        attach_lora(model, **LORA, targets="attn.to_q")


def test_start_is_the_base_model() -> None:
    model = tiny()
    before = velocity(model)
    attach_lora(model, **LORA)
    assert torch.equal(velocity(model), before), "B = 0 must leave the output as it was"


def test_initialisation_depends_on_the_seed_alone() -> None:
    def start(global_seed: int, seed: int) -> dict[str, torch.Tensor]:
        model = tiny()
        torch.manual_seed(global_seed)
        attach_lora(model, **LORA, seed=seed)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(global_seed)))
        return adapter_state(model)

    first, same, other = start(1, seed=5), start(2, seed=5), start(1, seed=6)
    assert list(first) == sorted(first)
    assert hash_state(first) == hash_state(same) != hash_state(other)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in first.items():
        if "lora_B" in name:
            assert not tensor.any()
            continue
        bound = 1 / math.sqrt(tensor.shape[1])
        expected = torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator)
        assert torch.equal(tensor, expected)


def test_state_round_trips_as_a_copy() -> None:
    source, target = tiny(), tiny()
    attach_lora(source, **LORA, seed=1)
    attach_lora(target, **LORA, seed=2)
    load_adapter_state(source, random_state(source, seed=3))
    state = adapter_state(source)
    load_adapter_state(target, state)
    assert torch.equal(velocity(target), velocity(source))
    assert (velocity(source) - velocity(tiny())).abs().max() > 1e-3
    for parameter in adapter_parameters(source).values():
        parameter.data.zero_()
    assert hash_state(adapter_state(target)) == hash_state(state), "a state must not alias live weights"


def test_loading_is_strict_and_writes_nothing_on_error() -> None:
    model = tiny()
    attach_lora(model, **LORA)
    state = random_state(model, seed=1)
    before = hash_state(adapter_state(model))
    name = "transformer_blocks.0.attn.to_q.lora_A.weight"
    lacking = {key: tensor for key, tensor in state.items() if key != name}
    with pytest.raises(ValueError, match=rf"1 names missing \['{name}'\], 0 surplus"):
        load_adapter_state(model, lacking)
    with pytest.raises(ValueError, match=r"1 surplus \['x'\]"):
        load_adapter_state(model, state | {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match="attach the adapter with the rank it was saved with"):
        load_adapter_state(model, state | {name: torch.zeros(2, 32)})
    assert hash_state(adapter_state(model)) == before
    with pytest.raises(ValueError, match="no adapter named 'nobody'"):
        load_adapter_state(model, state, "nobody")


def test_hash_covers_name_dtype_shape_and_bytes() -> None:
    tensor = torch.arange(6, dtype=torch.float32)
    digest = hashlib.sha256(b"a|torch.float32|(6,)|" + tensor.numpy().tobytes()).hexdigest()
    assert hash_state({"a": tensor}) == digest
    assert hash_state({"a": torch.arange(12.0)[::2] / 2}) == digest, "strides are not part of the value"
    zeros = torch.zeros(2, 2, dtype=torch.bfloat16)
    variants = [
        {"a": zeros}, {"b": zeros}, {"a": zeros.half()}, {"a": zeros.view(4)}, {"a": zeros + 1},
        {"a": zeros, "b": zeros}, {},
    ]  # fmt: skip
    assert len({hash_state(variant) for variant in variants}) == len(variants)
    assert hash_state({"b": zeros, "a": tensor}) == hash_state({"a": tensor, "b": zeros})


def test_second_frozen_adapter_leaves_the_first_alone() -> None:
    model = tiny()
    attach_lora(model, **LORA)
    policy = random_state(model, seed=1)
    load_adapter_state(model, policy)
    with_policy = velocity(model)
    attach_lora(model, **LORA, adapter_name="reference", trainable=False)
    assert attached_adapters(model) == ["policy", "reference"]
    assert torch.equal(velocity(model), with_policy), "the first adapter stays the active one"
    assert all(p.requires_grad for p in adapter_parameters(model).values())
    assert not any(p.requires_grad for p in adapter_parameters(model, "reference").values())
    with pytest.raises(ValueError, match="already has an adapter named 'policy'"):
        attach_lora(model, **LORA)


def test_second_adapter_on_other_layers_is_not_selected_there() -> None:
    model = tiny()
    attach_lora(model, **LORA, targets=["attn.to_q"])
    load_adapter_state(model, random_state(model, seed=1))
    with_policy = velocity(model)
    attach_lora(model, **LORA, targets=["attn.to_q", "proj_out"], adapter_name="wider", trainable=False)
    load_adapter_state(model, random_state(model, seed=2, adapter_name="wider"), "wider")
    assert torch.equal(velocity(model), with_policy)
    with use_adapter(model, "wider"):
        assert not torch.equal(velocity(model), with_policy)
    assert torch.equal(velocity(model), with_policy)


def test_use_adapter_selects_without_touching_requires_grad() -> None:
    model = tiny()
    base = velocity(model)
    attach_lora(model, **LORA)
    attach_lora(model, **LORA, adapter_name="reference", trainable=False)
    load_adapter_state(model, random_state(model, seed=1))
    load_adapter_state(model, random_state(model, seed=2), "reference")
    with_policy = velocity(model)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}

    with use_adapter(model, None):
        assert torch.equal(velocity(model), base)
        with use_adapter(model, "reference"):
            with_reference = velocity(model)
            assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert torch.equal(velocity(model), base)
    assert not torch.equal(with_reference, base) and not torch.equal(with_reference, with_policy)
    with pytest.raises(RuntimeError, match="inside"), use_adapter(model, "reference"):
        raise RuntimeError("inside")
    assert torch.equal(velocity(model), with_policy)
    with (
        pytest.raises(ValueError, match=r"attached: \['policy', 'reference'\]"),
        use_adapter(model, "polciy"),
    ):
        pass


def test_gradients_reach_the_policy_and_agree_under_checkpointing() -> None:
    model = tiny()
    attach_lora(model, **LORA)
    load_adapter_state(model, random_state(model, seed=1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, 4, 8, 8, generator=generator)
        text, pooled = torch.randn(2, 6, 48, generator=generator), torch.randn(2, 40, generator=generator)
        times = torch.tensor([900.0, 100.0])
        output = model(latents, text, pooled, times, reference_hidden_states=latents.flip(-1))
        output.sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in adapter_parameters(model).items()}

    plain = gradients()
    # The last block drops its text stream, so the text query there cannot matter.
    dead = {name for name, gradient in plain.items() if not gradient.any()}
    assert dead == {f"transformer_blocks.2.attn.add_q_proj.lora_{part}.weight" for part in "AB"}
    model.enable_gradient_checkpointing()
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name])


@torch.no_grad()
def test_compiles_with_a_live_adapter() -> None:
    model = tiny()
    attach_lora(model, **LORA)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(velocity(compiled), velocity(model))
    load_adapter_state(model, random_state(model, seed=1))
    changed = velocity(model)
    torch.testing.assert_close(velocity(compiled), changed)
    with use_adapter(model, None):
        assert (velocity(compiled) - changed).abs().max() > 1e-3, "a compiled model must see the selection"


def test_settings_and_adapter_are_plain_frozen_values() -> None:
    model = tiny()
    attach_lora(model, **LORA, targets=["attn.to_q", "attn.to_k"])
    assert adapter_settings(model) == LoraSettings(rank=4, alpha=8, targets=("attn.to_k", "attn.to_q"))
    state = adapter_state(model)
    adapter = Adapter(version=3, sha256=hash_state(state), tensors=state)
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.version = 4
