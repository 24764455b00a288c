"""LoRA files in other tools' names are read as what they mean; what they cannot say is refused by name."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from models.lora.attach import LoraSettings, adapter_parameters, attach_lora, hash_state
from models.lora.files import PEFT_WEIGHTS, read_adapter, save_adapter
from models.lora.load import starting_adapter
from models.lora.targets import DEFAULT_TARGETS
from tests.fakes.tiny_models import make_tiny_transformer

TARGETS = ("attn.to_q", "attn.to_out.0", "attn2.to_q")
SETTINGS = LoraSettings(4, 8.0, TARGETS)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    transformer = make_tiny_transformer()
    attach_lora(transformer, rank=4, alpha=8.0, targets=TARGETS)
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator) for n, p in adapter_parameters(transformer).items()}


def renamed(state, prefix: str, a: str, b: str) -> dict[str, torch.Tensor]:
    return {prefix + n.replace("lora_A", a).replace("lora_B", b): t.contiguous() for n, t in state.items()}


def alphas(state, value: float) -> dict[str, torch.Tensor]:
    return {f"diffusion_model.{n.rsplit('.', 2)[0]}.alpha": torch.tensor(value) for n in state}


FORMS = {
    "a module's state dict": (lambda s: renamed(s, "", "lora_A.default", "lora_B.default"), None, 4.0),
    "PEFT": (lambda s: renamed(s, "base_model.model.", "lora_A", "lora_B"), None, 4.0),
    "diffusers": (
        lambda s: renamed(s, "transformer.", "lora_A", "lora_B"),
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})},
        8.0,
    ),
    "older diffusers": (lambda s: renamed(s, "transformer.", "lora.down", "lora.up"), None, 4.0),
    "with alphas": (
        lambda s: renamed(s, "diffusion_model.", "lora_down", "lora_up") | alphas(s, 8.0), None, 8.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_naming_gives_the_same_state(tmp_path: Path, state, form: str) -> None:
    rename, metadata, alpha = FORMS[form]
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(rename(state), path, metadata)
    read, settings = read_adapter(path)
    assert hash_state(read) == hash_state(state)
    assert settings == LoraSettings(4, alpha, tuple(sorted(TARGETS)))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: renamed(s, "", "hada_w1", "hada_w2"), "is no part of a plain LoRA"),
        (lambda s: renamed(s, "lora_unet_", "lora_down", "lora_up"), "as sd-scripts does"),
        (lambda s: renamed(s, "text_encoder.", "lora_A", "lora_B"), "adapts a text encoder"),
        (lambda s: {n: t for n, t in s.items() if "lora_A" in n}, "needs lora_A"),
        (lambda s: s | dict.fromkeys(list(s)[:1], torch.zeros(2, 3)), "needs lora_A"),
        (lambda s: s | {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}, "rank 2 in a and 4"),
        (lambda s: s | {"a.alpha": torch.tensor(1.0), "b.alpha": torch.tensor(2.0)}, "alpha 1 in a and 2 in b"),
        (lambda s: s | {"a.alpha": torch.tensor(0.0)}, "alpha is 0.0"),
        (lambda s: {n: t * torch.nan for n, t in s.items()}, "holds NaN"),
        (lambda s: {"a.alpha": torch.tensor(1.0)}, "holds no LoRA tensors"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_the_transformer_is_refused(tmp_path: Path, state, change, reason: str) -> None:
    path = tmp_path / "theirs.safetensors"
    safetensors.torch.save_file(change(state), path)
    with pytest.raises(ValueError, match=f"theirs.safetensors: .*{reason}"):
        read_adapter(path)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs.safetensors").write_bytes(b"PK")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_adapter(tmp_path / "theirs.safetensors")


def test_training_starts_from_the_linears_rank_and_alpha_that_it_trains(tmp_path: Path, folder: Path) -> None:
    transformer = make_tiny_transformer()
    attach_lora(transformer, rank=4, alpha=8.0, targets=TARGETS)
    own = {n: torch.ones(p.shape) for n, p in adapter_parameters(transformer).items()}
    save_adapter(own, tmp_path, rank=4, alpha=8.0, targets=TARGETS)
    assert hash_state(starting_adapter(folder, tmp_path, SETTINGS)) == hash_state(own)
    for wanted, remedy in (
        (LoraSettings(8, 8.0, TARGETS), "set model.lora.rank=4 model.lora.alpha=8"),
        (LoraSettings(4, 16.0, TARGETS), "set model.lora.rank=4 model.lora.alpha=8"),
        (
            LoraSettings(4, 8.0, DEFAULT_TARGETS),
            r"set model.lora.targets=\[attn.to_out.0,attn.to_q,attn2.to_q\]",
        ),
    ):
        with pytest.raises(ValueError, match=remedy):
            starting_adapter(folder, tmp_path, wanted)
    name = next(iter(own))
    wide = own | {name: torch.ones(own[name].shape[0], 7)}
    save_adapter(wide, tmp_path, rank=4, alpha=8.0, targets=TARGETS)
    with pytest.raises(ValueError, match=f"do not fit the transformer of .*{name}"):
        starting_adapter(folder, tmp_path, SETTINGS)


def test_the_weights_of_a_peft_folder_alone_do_not_say_their_alpha(tmp_path: Path, state) -> None:
    save_adapter(state, tmp_path, rank=4, alpha=8.0, targets=TARGETS)
    with pytest.raises(FileNotFoundError, match=f"the adapter is in {tmp_path}"):
        read_adapter(tmp_path / PEFT_WEIGHTS)
