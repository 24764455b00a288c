"""An adapter's files as rollout workers take them, checked against the model's transformer; a model's hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import folder_manifest
from models.components import PARTS
from models.lora.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    import torch

    from models.kontext import KontextTransformer
    from models.lora.attach import Adapter, LoraSettings


def model_sha256(folder: Path, parts: Sequence[str] = PARTS) -> str:
    """sha256 over the names and sha256 sums of all files of all parts, weights and configs alike."""
    manifests = {name: folder_manifest(folder / name) for name in parts}
    return hashlib.sha256(json.dumps(manifests, sort_keys=True).encode()).hexdigest()


def load_adapter(folder: Path, adapter: Path | None, dtype: str) -> tuple[LoraSettings, Adapter]:
    """A PEFT folder in the dtype of the replicas, whose live hash is compared with its own; or none.

    Without an adapter the base is evaluated: through an adapter of rank 1 that is zero, and so adds exactly 0.
    Raises ValueError for an adapter that does not fit the model's transformer, FileNotFoundError for a part of it.
    """
    import torch

    from models.components import torch_dtype
    from models.lora.attach import Adapter, LoraSettings, adapter_parameters, attach_lora, hash_state
    from models.lora.files import read_adapter

    transformer = _shell(folder)
    state: dict[str, torch.Tensor] | None = None
    settings = LoraSettings(1, 1.0, DEFAULT_TARGETS[:1])
    if adapter is not None:
        state, settings = read_adapter(adapter)
    attach_lora(
        transformer,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        trainable=False,
    )
    shapes = {name: tuple(value.shape) for name, value in adapter_parameters(transformer).items()}
    if state is None:
        state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    wrong = sorted(
        name
        for name in shapes.keys() | state.keys()
        if name not in state or tuple(state[name].shape) != shapes.get(name)
    )
    if wrong:
        raise ValueError(
            f"{len(wrong)} of its tensors do not fit the transformer of {folder}, the first: {wrong[0]}; give the "
            "adapter of this model"
        )
    tensors = {name: value.to(torch_dtype(dtype)).contiguous() for name, value in state.items()}
    return settings, Adapter(0, hash_state(tensors), tensors)


def _shell(folder: Path) -> KontextTransformer:
    """The transformer without memory."""
    import torch

    from models.kontext import KontextTransformer

    config: Any = KontextTransformer.load_config(folder / "transformer")
    with torch.device("meta"):
        return KontextTransformer.from_config(config)
