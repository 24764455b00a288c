"""LoRA files as other tools write them, read into our names.

written by              a tensor's name
----------------------  -------------------------------------------------------------
PEFT                    base_model.model.MODULE.lora_A.weight
a module's state dict   MODULE.lora_A.ADAPTER.weight
diffusers               transformer.MODULE.lora_A.weight, with settings as metadata
older diffusers         transformer.MODULE.lora.down.weight
sd-scripts' successors  diffusion_model.MODULE.lora_down.weight, MODULE.alpha

MODULE is the path in diffusers' transformer. A file says its alpha in its metadata or beside each module; where it says
none, alpha is the rank, as diffusers takes it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors
import torch
from safetensors import SafetensorError

from models.lora.attach import LoraSettings, State

_PREFIXES = ("base_model.model.", "transformer.", "diffusion_model.")
_TENSOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<letter>[AB])(?:\.\w+)?|lora[._](?P<word>down|up))\.weight")
_LETTERS = {"down": "A", "up": "B"}
_METADATA = "lora_adapter_metadata"


def read_lora_file(path: Path) -> tuple[State, LoraSettings]:
    """The state of a LoRA file, and its settings as the names, shapes and metadata tell them.

    Raises:
        ValueError: a file that cannot be read; tensors of something else than a plain LoRA of the transformer; ranks
            or alphas that differ between modules.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    state: State = {}
    alphas: dict[str, float] = {}
    for name, tensor in tensors.items():
        plain = _without_prefix(name, path)
        if plain.endswith(".alpha"):
            alphas[plain.removesuffix(".alpha")] = float(tensor)
            continue
        found = _TENSOR.fullmatch(plain)
        if found is None:
            raise ValueError(
                f"{path}: tensor {name} is no part of a plain LoRA (MODULE.lora_A.weight, lora_B, lora.down or "
                "lora_up)"
            )
        state[f"{found['module']}.lora_{found['letter'] or _LETTERS[found['word']]}.weight"] = tensor
    if not state:
        raise ValueError(f"{path}: holds no LoRA tensors")
    rank = _rank(path, state)
    return state, LoraSettings(rank, _alpha(path, alphas, metadata, rank), _targets(state))


def _without_prefix(name: str, path: Path) -> str:
    if name.startswith("text_encoder"):
        raise ValueError(
            f"{path}: {name} adapts a text encoder; only adapters of the transformer alone can be used"
        )
    if name.startswith(("lora_unet_", "lora_te")):
        raise ValueError(
            f"{path}: {name} is named as sd-scripts does, which joins q, k and v in one linear; save the adapter with "
            "diffusers' names"
        )
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _rank(path: Path, state: State) -> int:
    """The one rank of all modules, each of which has A and B."""
    modules = sorted({name.rsplit(".", 2)[0] for name in state})
    ranks = {}
    for module in modules:
        down, up = (state.get(f"{module}.lora_{part}.weight") for part in "AB")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(
                f"{path}: {module} needs lora_A [rank, in] and lora_B [out, rank], and has not both so"
            )
        ranks[module] = int(down.shape[0])
    return int(_one(path, "rank", ranks))


def _alpha(path: Path, alphas: Mapping[str, float], metadata: Mapping[str, str], rank: int) -> float:
    if alphas:
        return _one(path, "alpha", alphas)
    try:
        settings = json.loads(metadata.get(_METADATA, "{}"))
        return float(settings.get("transformer.lora_alpha", rank))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its metadata {_METADATA} cannot be read: {error}") from error


def _one(path: Path, what: str, values: Mapping[str, float]) -> float:
    """The value that all modules share."""
    (first, value), *others = values.items()
    for module, other in others:
        if other != value:
            raise ValueError(
                f"{path}: {what} {value:g} in {first} and {other:g} in {module}; only adapters of one "
                f"{what} can be used"
            )
    return value


def _targets(state: Mapping[str, torch.Tensor]) -> tuple[str, ...]:
    """Ends of module paths, as `attach_lora` takes them: what follows the number of a block."""
    modules = {name.rsplit(".", 2)[0] for name in state}
    return tuple(sorted({re.sub(r"^.*?\.\d+\.", "", module) for module in modules}))
