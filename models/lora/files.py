"""Adapters as files: a PEFT folder, a diffusers LoRA file beside it, the merged transformer."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from core.files import atomic_write_bytes
from models.components import save_component
from models.kontext import KontextTransformer
from models.lora.attach import LoraSettings, State
from models.lora.naming import read_lora_file

PEFT_PREFIX = "base_model.model."
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS_FILE = Path("diffusers") / "pytorch_lora_weights.safetensors"

_PLAIN = [
    "use_dora",
    "use_rslora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "use_bdlora",
]
"""LoraConfig keys whose default is what `attach_lora` makes; an adapter that differs computes something else."""


def save_adapter(
    state: Mapping[str, torch.Tensor], folder: str | Path, *, rank: int, alpha: float, targets: Sequence[str]
) -> None:
    """Write an adapter for PEFT and for diffusers; each file appears whole or not at all.

    `PeftModel.from_pretrained(transformer, folder)` reads `adapter_config.json` and
    `adapter_model.safetensors`; `pipeline.load_lora_weights(folder / "diffusers")` reads the file there. The
    latter carries its LoraConfig as metadata: without it diffusers takes alpha = rank and so, in silence,
    halves an adapter of rank 32 and alpha 64.
    """
    folder = Path(folder)
    config = _config_json(rank, alpha, targets)
    ordered = {name: state[name].detach().cpu().contiguous() for name in sorted(state)}
    for_diffusers = {f"transformer.{name}": tensor for name, tensor in ordered.items()}
    settings = {f"transformer.{key}": value for key, value in config.items()}
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(settings, indent=2, sort_keys=True)}
    atomic_write_bytes(folder / DIFFUSERS_FILE, safetensors.torch.save(for_diffusers, metadata))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    atomic_write_bytes(folder / PEFT_CONFIG, text.encode())
    for_peft = {PEFT_PREFIX + name: tensor for name, tensor in ordered.items()}
    atomic_write_bytes(folder / PEFT_WEIGHTS, safetensors.torch.save(for_peft, {"format": "pt"}))


def read_adapter(folder: str | Path) -> tuple[State, LoraSettings]:
    """Read an adapter, ours or another's, back into a state and its settings: a PEFT folder, or a single LoRA file
    (`models/lora/naming.py`).

    Raises:
        FileNotFoundError: the folder lacks a file; names the adapter's own folder where it is near.
        ValueError: a file that cannot be read, not a plain LoRA of linear layers, tensors that disagree with the
            configured rank, or an adapter whose update is not a number or changes nothing.
    """
    folder = Path(folder)
    # The weights of a PEFT folder do not say their alpha, the file beside them does.
    if folder.is_file() and not (folder.parent / PEFT_CONFIG).is_file():
        state, settings = read_lora_file(folder)
        _check_alpha(folder, "alpha", settings.alpha)
        _check_values(folder, state)
        return state, settings
    for path in (folder / PEFT_CONFIG, folder / PEFT_WEIGHTS):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: missing; {_where(folder)}")
    try:
        config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / PEFT_WEIGHTS)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder}: its {PEFT_CONFIG} or {PEFT_WEIGHTS} is damaged: {error}") from error
    settings = _settings(folder / PEFT_CONFIG, config)
    state = {name.removeprefix(PEFT_PREFIX): tensors[name] for name in sorted(tensors)}
    for name, tensor in state.items():
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(f"{folder / PEFT_WEIGHTS}: tensor {name} is not lora_A.weight or lora_B.weight")
        if tensor.ndim != 2 or tensor.shape[0 if ".lora_A." in name else 1] != settings.rank:
            raise ValueError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, but adapter_config says r = {settings.rank}"
            )
    _check_values(folder / PEFT_WEIGHTS, state)
    return state, settings


def _where(folder: Path) -> str:
    """Where the adapter is that was meant: a run's, those of its checkpoints, or the folder above a file."""
    for pattern in ("adapter", "checkpoints/*/adapter", "*/adapter"):
        found = sorted(str(path.parent) for path in folder.glob(f"{pattern}/{PEFT_CONFIG}"))
        if found:
            return f"the adapter is in {' or '.join(found[-3:])}"
    if (folder.parent / PEFT_CONFIG).is_file():
        return f"the adapter is in {folder.parent}"
    return f"an adapter is a PEFT folder with {PEFT_CONFIG}"


def _settings(path: Path, config: object) -> LoraSettings:
    """What an adapter_config.json says. Raises ValueError for what `attach_lora` would not make."""
    values = config if isinstance(config, dict) else {}
    targets, rank, alpha = (values.get(key) for key in ("target_modules", "r", "lora_alpha"))
    odd = sorted(key for key in _PLAIN if values.get(key))
    if values.get("peft_type") != "LORA" or odd or not isinstance(targets, list):
        raise ValueError(
            f"{path}: only a plain LoRA with a list of target_modules can be read "
            f"(peft_type {values.get('peft_type')!r}, set: {odd}, target_modules {targets!r})"
        )
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r is {rank!r}, and must be a whole number from 1")
    _check_alpha(path, "lora_alpha", alpha)
    return LoraSettings(rank=rank, alpha=float(alpha), targets=tuple(sorted(targets)))  # type: ignore[arg-type]


def _check_alpha(path: Path, name: str, alpha: object) -> None:
    if not isinstance(alpha, int | float) or alpha is True or not math.isfinite(alpha) or alpha == 0:
        raise ValueError(
            f"{path}: {name} is {alpha!r}, and must be a finite number other than 0: with it the adapter would "
            "change nothing or draw noise"
        )


def _check_values(path: Path, state: State) -> None:
    """Raise ValueError for tensors that are no weights, and for an adapter that adds exactly nothing."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} is of type {tensor.dtype}; a quantised adapter cannot be read, save it in float"
            )
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; the training that wrote it diverged")
    still = {name.rsplit(".", 2)[0] for name, tensor in state.items() if not tensor.any()}
    if still >= {name.rsplit(".", 2)[0] for name in state}:
        raise ValueError(
            f"{path}: lora_B (or lora_A) is 0 in every layer, so the adapter changes nothing; leave the adapter out "
            "to use the base, or give one that was trained"
        )


@torch.no_grad()
def merge_adapter(
    transformer: SD3Transformer2DModel, state: Mapping[str, torch.Tensor], *, rank: int, alpha: float
) -> State:
    """The transformer's whole state dict with `W + alpha / rank * B @ A`: plain names, on the CPU.

    The sum is taken in float32 and rounded once to the weight's dtype. Adapters attached to the transformer
    play no part, and it is not changed.

    Raises:
        ValueError: the state names a module that the transformer does not have.
    """
    wrapped = {path for path, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    merged: State = {}
    for name, tensor in transformer.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module.removesuffix(".base_layer") in wrapped:
            name = f"{module.removesuffix('.base_layer')}.{leaf}"
        elif any(part.startswith("lora_") for part in name.split(".")):
            continue
        merged[name] = tensor.detach().cpu()
    for path in sorted({name.rsplit(".", 2)[0] for name in state}):
        weight = f"{path}.weight"
        if weight not in merged:
            raise ValueError(f"the adapter changes {path}, which this transformer does not have")
        down, up = (state[f"{path}.lora_{part}.weight"].float() for part in "AB")
        merged[weight] = (merged[weight].float() + alpha / rank * (up @ down)).to(merged[weight].dtype)
    return merged


def save_merged_transformer(
    transformer: SD3Transformer2DModel,
    state: Mapping[str, torch.Tensor],
    folder: str | Path,
    *,
    rank: int,
    alpha: float,
) -> None:
    """Write the merged transformer as a folder in the released layout, `config.json` and weights.

    A folder that is already there is replaced once the new one is complete.
    """
    merged = merge_adapter(transformer, state, rank=rank, alpha=alpha)
    with torch.device("meta"):
        shell = KontextTransformer.from_config(transformer.config)
    shell.load_state_dict(merged, strict=True, assign=True)
    save_component(shell, folder)


def _config_json(rank: int, alpha: float, targets: Sequence[str]) -> dict[str, object]:
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))  # type: ignore[arg-type]
    config.inference_mode = True
    values = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    return json.loads(json.dumps(values, default=str))
