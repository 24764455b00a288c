"""Loads the parts of a model folder, and writes one. What a folder must hold is said in `models/folders.py`."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel

from models.folders import check_model_folder, check_weights, require
from models.kontext import KontextTransformer


def torch_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16` as torch's."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_transformer(
    folder: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> KontextTransformer:
    """Load `folder/transformer`, in eval mode. Raises FileNotFoundError naming what is missing."""
    part = _part(folder, "transformer")
    transformer = KontextTransformer.from_pretrained(part, torch_dtype=dtype, local_files_only=True)
    return transformer.to(device).eval()


def transformer_shell(folder: str | Path) -> KontextTransformer:
    """`folder/transformer` on the meta device: its modules and shapes without memory."""
    config: Any = KontextTransformer.load_config(Path(folder) / "transformer")
    with torch.device("meta"):
        return KontextTransformer.from_config(config)


def load_vae(folder: str | Path, *, device: torch.device | str = "cpu") -> AutoencoderKL:
    """Load `folder/vae`, frozen, in eval mode, in float32 as its config asks (`force_upcast`).

    So rollouts, evaluations and pipelines make the same pixels of the same latents whatever the transformer's dtype,
    beside which it is small. Raises FileNotFoundError naming what is missing.
    """
    vae = AutoencoderKL.from_pretrained(
        _part(folder, "vae"), torch_dtype=torch.float32, local_files_only=True
    )
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoder(
    folder: str | Path, name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Any:
    """Load one of `TEXT_ENCODERS`, frozen, in eval mode. Raises FileNotFoundError naming what is missing."""
    kind: Any = T5EncoderModel if name == "text_encoder_3" else CLIPTextModelWithProjection
    encoder = kind.from_pretrained(_part(folder, name), dtype=dtype, local_files_only=True)
    return encoder.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: str | Path, name: str) -> Any:
    """Load one of `TOKENIZERS`. Raises FileNotFoundError naming what is missing."""
    return AutoTokenizer.from_pretrained(_part(folder, name), local_files_only=True)


def load_scheduler(folder: str | Path) -> FlowMatchEulerDiscreteScheduler:
    """Load `folder/scheduler`; its static shift sets the sigma table."""
    part = _part(folder, "scheduler")
    return FlowMatchEulerDiscreteScheduler.from_pretrained(part, local_files_only=True)


def read_weights(part: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a part's safetensors, on the CPU.

    Raises:
        FileNotFoundError: there are none, or a shard that the index names is missing.
        ValueError: a tensor is in two files.
    """
    require(check_weights(Path(part)))
    state: dict[str, torch.Tensor] = {}
    for path in sorted(Path(part).glob("*.safetensors")):
        shard = load_file(path)
        twice = sorted(state.keys() & shard.keys())
        if twice:
            raise ValueError(f"{path}: {len(twice)} tensors are in another file too, first {twice[0]}")
        state |= shard
    return state


def save_component(component: Any, part: str | Path) -> None:
    """Write a component's folder; one that is already there is replaced once the new one is whole."""
    part = Path(part)
    part.parent.mkdir(parents=True, exist_ok=True)
    partial = part.with_name(f".{part.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        component.save_pretrained(partial)
        # safetensors makes files that their owner alone can read; give them the mode of any other file.
        for weights in partial.glob("*.safetensors"):
            weights.chmod((partial / "config.json").stat().st_mode)
    except Exception as error:
        error.add_note(f"while {part} was written")
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if part.exists():
        shutil.rmtree(part)
    os.replace(partial, part)


def _part(folder: str | Path, name: str) -> Path:
    require(check_model_folder(folder, (name,)))
    return Path(folder) / name
