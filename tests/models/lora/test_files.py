"""Adapter folders against their readers: PEFT, diffusers and ourselves."""

import json
import stat
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from diffusers import SD3Transformer2DModel
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from models.components import load_transformer
from models.folders import check_model_folder
from models.kontext import KontextTransformer
from models.lora.attach import (
    DEFAULT_TARGETS,
    adapter_parameters,
    attach_lora,
    hash_state,
    load_adapter_state,
)
from models.lora.files import merge_adapter, read_adapter, save_adapter, save_merged_transformer
from tests.fakes.tiny_models import make_tiny_transformer

SETTINGS = {"rank": 32, "alpha": 64, "targets": DEFAULT_TARGETS}


@torch.no_grad()
def velocity(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    latents, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 6, 48, generator=generator)
    pooled = torch.randn(1, 40, generator=generator)
    return model(latents, text, pooled, torch.tensor([500.0]), return_dict=False)[0]


def base(folder: Path) -> KontextTransformer:
    return load_transformer(folder, dtype=torch.float32)


@pytest.fixture
def trained(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output of a transformer with a random adapter attached, and that adapter."""
    model = base(folder)
    attach_lora(model, **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    state = {
        n: torch.randn(p.shape, generator=generator) * 0.05 for n, p in adapter_parameters(model).items()
    }
    load_adapter_state(model, state)
    return velocity(model), state


def scalings(model: torch.nn.Module) -> set[float]:
    return {s for layer in model.modules() if isinstance(layer, LoraLayer) for s in layer.scaling.values()}


def test_we_read_back_what_we_wrote(tmp_path: Path, folder: Path, trained: tuple) -> None:
    expected, state = trained
    save_adapter(state, tmp_path / "adapter", **SETTINGS)
    read, settings = read_adapter(tmp_path / "adapter")
    assert hash_state(read) == hash_state(state)
    assert (settings.rank, settings.alpha, settings.targets) == (32, 64, tuple(sorted(DEFAULT_TARGETS)))
    model = base(folder)
    attach_lora(model, rank=settings.rank, alpha=settings.alpha, targets=settings.targets)
    load_adapter_state(model, read)
    assert torch.equal(velocity(model), expected)


def test_peft_reads_the_folder(tmp_path: Path, folder: Path, trained: tuple) -> None:
    expected, state = trained
    save_adapter(state, tmp_path, **SETTINGS)
    model = PeftModel.from_pretrained(base(folder), tmp_path)
    assert scalings(model) == {2.0}
    assert torch.equal(velocity(model), expected)


def test_diffusers_reads_its_file_and_needs_the_metadata(
    tmp_path: Path, folder: Path, trained: tuple
) -> None:
    expected, state = trained
    save_adapter(state, tmp_path, **SETTINGS)
    stock = SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    stock.load_lora_adapter(tmp_path / "diffusers", use_safetensors=True)
    assert scalings(stock) == {2.0}
    assert torch.equal(velocity(stock), expected)

    bare = safetensors.torch.load_file(tmp_path / "diffusers" / "pytorch_lora_weights.safetensors")
    halved = SD3Transformer2DModel.from_pretrained(folder / "transformer").eval()
    halved.load_lora_adapter(bare)
    assert scalings(halved) == {1.0}, "without metadata diffusers assumes alpha = rank"
    assert (velocity(halved) - expected).abs().max() > 1e-3


def test_a_folder_that_peft_wrote_reads_too(tmp_path: Path, folder: Path, trained: tuple) -> None:
    _, state = trained
    save_adapter(state, tmp_path / "ours", **SETTINGS)
    PeftModel.from_pretrained(base(folder), tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    read, settings = read_adapter(tmp_path / "theirs")
    assert hash_state(read) == hash_state(state)
    assert (settings.rank, settings.alpha) == (32, 64)


def test_bfloat16_survives(tmp_path: Path, trained: tuple) -> None:
    state = {name: tensor.bfloat16() for name, tensor in trained[1].items()}
    save_adapter(state, tmp_path, **SETTINGS)
    assert hash_state(read_adapter(tmp_path)[0]) == hash_state(state)


def test_merged_transformer_equals_the_adapter(tmp_path: Path, folder: Path, trained: tuple) -> None:
    expected, state = trained
    model = base(folder)
    attach_lora(model, **SETTINGS, seed=9)
    live = hash_state(model.state_dict())
    save_merged_transformer(model, state, tmp_path / "transformer", rank=32, alpha=64)
    save_merged_transformer(model, state, tmp_path / "transformer", rank=32, alpha=64)
    assert hash_state(model.state_dict()) == live, "merging must not change the live transformer"
    assert [path.name for path in tmp_path.iterdir()] == ["transformer"]
    merged = load_transformer(tmp_path, dtype=torch.float32)
    assert list(merged.state_dict()) == list(base(folder).state_dict())
    torch.testing.assert_close(velocity(merged), expected, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "SD3Transformer2DKontextModel"


def test_merging_sums_in_float32_and_rounds_once(folder: Path, trained: tuple) -> None:
    _, state = trained
    model = load_transformer(folder, dtype=torch.bfloat16)
    merged = merge_adapter(model, state, rank=32, alpha=64)
    path = "transformer_blocks.0.attn.to_q"
    update = 2.0 * state[f"{path}.lora_B.weight"].double() @ state[f"{path}.lora_A.weight"].double()
    exact = model.get_submodule(path).weight.double() + update
    assert merged[f"{path}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(merged[f"{path}.weight"].double(), exact, rtol=2**-8, atol=1e-6)
    other = make_tiny_transformer(num_layers=1)
    with pytest.raises(ValueError, match="which this transformer does not have"):
        merge_adapter(other, state, rank=32, alpha=64)


def test_files_have_ordinary_modes_and_leave_no_partial(tmp_path: Path, trained: tuple) -> None:
    save_adapter(trained[1], tmp_path, **SETTINGS)
    plain = tmp_path / "plain"
    plain.touch()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != plain]
    assert sorted(path.name for path in files) == [
        "adapter_config.json", "adapter_model.safetensors", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_folders_that_mean_something_else_are_refused(tmp_path: Path, trained: tuple) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json: missing"):
        read_adapter(tmp_path)
    save_adapter(trained[1], tmp_path, **SETTINGS)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for change in ({"use_dora": True}, {"target_modules": ".*attn.*"}, {"peft_type": "LOHA"}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match="only a plain LoRA"):
            read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"r": 16}))
    with pytest.raises(ValueError, match="adapter_config says r = 16"):
        read_adapter(tmp_path)


def test_an_adapter_that_would_draw_the_bases_pictures_is_refused(tmp_path: Path, trained: tuple) -> None:
    """Each of these once loaded, and models.generate drew the base without a word."""
    state = trained[1]

    def refusal(change: dict[str, object], tensors: dict[str, torch.Tensor]) -> str:
        save_adapter(tensors, tmp_path, **SETTINGS)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=r"adapter_(config|model)") as caught:
            read_adapter(tmp_path)
        return str(caught.value)

    for alpha in (float("nan"), 0, float("inf"), None, "64", True):
        assert f"lora_alpha is {alpha!r}, and must be a finite number other than 0" in refusal(
            {"lora_alpha": alpha}, state
        )
    assert "r is 32.0, and must be a whole number" in refusal({"r": 32.0}, state)
    first = next(iter(state))
    whole = {name: tensor.to(torch.int8) for name, tensor in state.items()}
    assert f"{first} is of type torch.int8; a quantised adapter cannot be read" in refusal({}, whole)
    broken = state | {first: torch.full_like(state[first], torch.nan)}
    assert f"{first} holds NaN or infinity" in refusal({}, broken)
    for part in ("lora_A", "lora_B"):
        still = {name: tensor * (part not in name) for name, tensor in state.items()}
        assert "the adapter changes nothing; leave the adapter out to use the base" in refusal({}, still)
    one = {name: tensor * (name.startswith(first.rsplit(".", 2)[0])) for name, tensor in state.items()}
    save_adapter(one, tmp_path, **SETTINGS)
    assert hash_state(read_adapter(tmp_path)[0]) == hash_state(one), "one layer that moves is enough"


def test_damaged_files_are_refused_by_their_folder(tmp_path: Path, trained: tuple) -> None:
    save_adapter(trained[1], tmp_path, **SETTINGS)
    whole = (tmp_path / "adapter_model.safetensors").read_bytes()
    for name, data in (
        ("adapter_model.safetensors", whole[: len(whole) // 2]), ("adapter_config.json", b"{"),
        ("adapter_config.json", b"[" * 100_000), ("adapter_config.json", b"\xff"), ("adapter_config.json", b"[]"),
    ):  # fmt: skip
        save_adapter(trained[1], tmp_path, **SETTINGS)
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match="adapter_config.json"):
            read_adapter(tmp_path)


def test_a_refusal_says_where_the_adapter_is(tmp_path: Path, trained: tuple) -> None:
    run = tmp_path / "run"
    for step in (20, 40):
        save_adapter(trained[1], run / "checkpoints" / f"step_{step:06d}" / "adapter", **SETTINGS)
    adapter, checkpoint = run / "adapter", run / "checkpoints" / "step_000040"
    with pytest.raises(FileNotFoundError, match=f"step_000020/adapter or {checkpoint / 'adapter'}"):
        read_adapter(run)
    save_adapter(trained[1], adapter, **SETTINGS)
    for given in (run, tmp_path, adapter / "diffusers", adapter / "adapter_model.safetensors"):
        with pytest.raises(FileNotFoundError, match=f"missing; the adapter is in {adapter}$"):
            read_adapter(given)
    with pytest.raises(FileNotFoundError, match=f"missing; the adapter is in {checkpoint / 'adapter'}$"):
        read_adapter(checkpoint)
    assert check_model_folder(run) == [
        f"{run} is a run's folder: give the model that it trained, and {adapter} as its adapter"
    ]
