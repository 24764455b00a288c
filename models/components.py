"""The released model folder: what it must hold, and loading of its parts.

Imports torch only inside the loaders, so that a dry run can check folders on a machine without it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    from models.kontext import KontextTransformer

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
SCHEDULER = "scheduler"

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


def check_model_folder(folder: str | Path) -> list[str]:
    """Every problem with a model folder in the released layout; empty when it can be loaded.

    Looks at names, JSON and weight indexes only, never at tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such model folder; download or build the model there, or correct the path"]
    problems = []
    for name in ("transformer", "vae"):
        problems += _check_model(folder / name)
    return problems + check_text_parts(folder) + _check_part(folder / SCHEDULER, "scheduler_config.json")


def check_text_parts(folder: str | Path) -> list[str]:
    """Every problem with the three text encoders and tokenizers of a model folder."""
    folder = Path(folder)
    problems = []
    for name in TEXT_ENCODERS:
        problems += _check_model(folder / name)
    for name in TOKENIZERS:
        problems += _check_part(folder / name, "tokenizer_config.json") or _check_tokenizer(folder / name)
    return problems


def load_transformer(
    folder: str | Path, *, dtype: "torch.dtype", device: "torch.device | str" = "cpu"
) -> "KontextTransformer":
    """Load `folder/transformer`, in eval mode. Raises FileNotFoundError naming what is missing."""
    from models.kontext import KontextTransformer

    part = Path(folder) / "transformer"
    _require(_check_model(part))
    transformer = KontextTransformer.from_pretrained(part, torch_dtype=dtype, local_files_only=True)
    return transformer.to(device).eval()


def load_vae(
    folder: str | Path, *, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu"
) -> "AutoencoderKL":
    """Load `folder/vae`, frozen, in eval mode.

    `dtype` defaults to float32: SD3's decoder loses detail in bfloat16, and it is small beside the
    transformer. Raises FileNotFoundError naming what is missing.
    """
    import torch
    from diffusers import AutoencoderKL

    part = Path(folder) / "vae"
    _require(_check_model(part))
    vae = AutoencoderKL.from_pretrained(part, torch_dtype=dtype or torch.float32, local_files_only=True)
    return vae.to(device).eval().requires_grad_(False)


def load_scheduler(folder: str | Path) -> "FlowMatchEulerDiscreteScheduler":
    """Load `folder/scheduler`; its static shift sets the sigma table."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    part = Path(folder) / SCHEDULER
    _require(_check_part(part, "scheduler_config.json"))
    return FlowMatchEulerDiscreteScheduler.from_pretrained(part, local_files_only=True)


def _require(problems: list[str]) -> None:
    if problems:
        raise FileNotFoundError("; ".join(problems))


def _check_model(part: Path) -> list[str]:
    return _check_part(part, "config.json") or _check_weights(part)


def _check_part(part: Path, config: str) -> list[str]:
    if not part.is_dir():
        return [f"{part}: missing subfolder of the model"]
    if not (part / config).is_file():
        return [f"{part / config}: missing config file"]
    try:
        json.loads((part / config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{part / config}: not readable as JSON ({error})"]
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
        except (OSError, ValueError, KeyError) as error:
            problems.append(f"{index}: not a readable weight index ({error!r})")
            continue
        missing = sorted(shard for shard in shards if not (part / shard).is_file())
        problems += [f"{part / shard}: weight shard named by {index.name} is missing" for shard in missing]
    return problems


def _check_tokenizer(part: Path) -> list[str]:
    if not any((part / name).is_file() for name in _TOKENIZER_FILES):
        return [f"{part}: no tokenizer file (one of {', '.join(_TOKENIZER_FILES)})"]
    return []
