"""The released model folder: what it must hold, loading of its parts, writing of one.

Imports torch only inside the loaders, so that a dry run can check folders on a machine without it.
"""

import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    from models.kontext import KontextTransformer
    from models.metaquery.conditioner import MetaQueryConditioner

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
TEXT_PARTS = TEXT_ENCODERS + TOKENIZERS
PARTS = ("transformer", "vae", *TEXT_PARTS, "scheduler")
"""UniPic2-SD3.5M-Kontext's folder."""
METAQUERY_PARTS = ("transformer", "vae", "scheduler", "conditioner")
"""UniPic2-MetaQuery's folder; its Qwen2.5-VL is a folder of its own."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def check_model_folder(folder: str | Path, parts: Collection[str] = PARTS) -> list[str]:
    """Every problem with (the named parts of) a model folder in the released layout; empty when it can load.

    Looks at names, JSON and weight indexes only, never at tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such model folder; download or build the model there, or correct the path"]
    known = dict.fromkeys((*PARTS, *METAQUERY_PARTS))
    return [problem for name in known if name in parts for problem in _check_part(folder / name)]


def is_metaquery_folder(folder: str | Path) -> bool:
    """Whether a model folder is conditioned by MetaQuery (it has `conditioner/`) and not by text encoders."""
    return (Path(folder) / "conditioner").is_dir()


def check_vlm_folder(folder: str | Path) -> list[str]:
    """Every problem with the folder of a Qwen2.5-VL; empty when it can load. Looks at no tensor."""
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder; download Qwen2.5-VL there, or correct the path"]
    problems = _check_json(folder / "config.json") + _check_weights(folder) + _check_tokenizer(folder)
    problems += _check_json(folder / "preprocessor_config.json")
    if not problems:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "qwen2_5_vl":
            problems.append(f"{folder / 'config.json'}: model_type is {kind!r}, expected 'qwen2_5_vl'")
    return problems


def load_transformer(
    folder: str | Path, *, dtype: "torch.dtype", device: "torch.device | str" = "cpu"
) -> "KontextTransformer":
    """Load `folder/transformer`, in eval mode. Raises FileNotFoundError naming what is missing."""
    from models.kontext import KontextTransformer

    part = _require(folder, "transformer")
    transformer = KontextTransformer.from_pretrained(part, torch_dtype=dtype, local_files_only=True)
    return transformer.to(device).eval()


def load_vae(
    folder: str | Path, *, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu"
) -> "AutoencoderKL":
    """Load `folder/vae`, frozen, in eval mode.

    `dtype` defaults to float32, as the VAE's config asks (`force_upcast`); it is small beside the
    transformer. Raises FileNotFoundError naming what is missing.
    """
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    part = _require(folder, "vae")
    vae = AutoencoderKL.from_pretrained(part, torch_dtype=dtype or torch.float32, local_files_only=True)
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoder(
    folder: str | Path, name: str, *, dtype: "torch.dtype", device: "torch.device | str" = "cpu"
) -> Any:
    """Load one of `TEXT_ENCODERS`, frozen, in eval mode. Raises FileNotFoundError naming what is missing."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    kind: Any = T5EncoderModel if name == "text_encoder_3" else CLIPTextModelWithProjection
    encoder = kind.from_pretrained(_require(folder, name), dtype=dtype, local_files_only=True)
    return encoder.to(device).eval().requires_grad_(False)


def load_tokenizer(folder: str | Path, name: str) -> Any:
    """Load one of `TOKENIZERS`. Raises FileNotFoundError naming what is missing."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_require(folder, name), local_files_only=True)


def load_conditioner(
    folder: str | Path, *, dtype: "torch.dtype", device: "torch.device | str" = "cpu"
) -> "MetaQueryConditioner":
    """Load `folder/conditioner`, frozen, in eval mode. Raises as `MetaQueryConditioner.from_pretrained`."""
    from models.metaquery.conditioner import MetaQueryConditioner

    part = _require(folder, "conditioner")
    return MetaQueryConditioner.from_pretrained(part, dtype=dtype, device=device).requires_grad_(False)


def read_weights(part: str | Path) -> "dict[str, torch.Tensor]":
    """All tensors of a part's safetensors, on the CPU.

    Raises:
        FileNotFoundError: there are none, or a shard that the index names is missing.
        ValueError: a tensor is in two files.
    """
    from safetensors.torch import load_file

    problems = _check_weights(Path(part))
    if problems:
        raise FileNotFoundError("; ".join(problems))
    state: dict[str, torch.Tensor] = {}
    for path in sorted(Path(part).glob("*.safetensors")):
        shard = load_file(path)
        twice = sorted(state.keys() & shard.keys())
        if twice:
            raise ValueError(f"{path}: {len(twice)} tensors are in another file too, first {twice[0]}")
        state |= shard
    return state


def load_scheduler(folder: str | Path) -> "FlowMatchEulerDiscreteScheduler":
    """Load `folder/scheduler`; its static shift sets the sigma table."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(
        _require(folder, "scheduler"), local_files_only=True
    )


def save_component(component: Any, part: str | Path) -> None:
    """Write a component's folder; one that is already there is replaced once the new one is whole."""
    part = Path(part)
    part.parent.mkdir(parents=True, exist_ok=True)
    partial = part.with_name(f".{part.name}.{os.getpid()}.partial")
    component.save_pretrained(partial)
    # safetensors makes files that their owner alone can read; give them the mode of any other file.
    for weights in partial.glob("*.safetensors"):
        weights.chmod((partial / "config.json").stat().st_mode)
    if part.exists():
        shutil.rmtree(part)
    os.replace(partial, part)


def _require(folder: str | Path, name: str) -> Path:
    problems = check_model_folder(folder, (name,))
    if problems:
        raise FileNotFoundError("; ".join(problems))
    return Path(folder) / name


def _check_part(part: Path) -> list[str]:
    if not part.is_dir():
        return [f"{part}: missing subfolder of the model"]
    if part.name == "scheduler":
        return _check_json(part / "scheduler_config.json")
    if part.name in TOKENIZERS:
        return _check_json(part / "tokenizer_config.json") + _check_tokenizer(part)
    return _check_json(part / "config.json") + _check_weights(part)


def _check_json(path: Path) -> list[str]:
    if not path.is_file():
        return [f"{path}: missing config file"]
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path}: not readable as JSON ({error})"]
    return []


def _check_weights(part: Path) -> list[str]:
    """A weight file, or an index whose every shard is there."""
    indexes = sorted(part.glob("*.safetensors.index.json"))
    if not indexes:
        return [] if any(part.glob("*.safetensors")) else [f"{part}: no *.safetensors weight file"]
    problems = []
    for index in indexes:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{index}: not a readable weight index ({error!r})")
            continue
        missing = sorted(shard for shard in shards if not (part / shard).is_file())
        problems += [f"{part / shard}: weight shard named by {index.name} is missing" for shard in missing]
    return problems


def _check_tokenizer(part: Path) -> list[str]:
    if not any((part / name).is_file() for name in _TOKENIZER_FILES):
        return [f"{part}: no tokenizer file (one of {', '.join(_TOKENIZER_FILES)})"]
    return []


def torch_dtype(name: str) -> "torch.dtype":
    """`"float32"` or `"bfloat16"` as a torch dtype; KeyError-free because the schema admits no other."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
