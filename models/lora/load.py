"""An adapter's files as rollout workers take them, checked against the model's transformer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from models.lora.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    import torch

    from models.lora.attach import Adapter, LoraSettings


def load_adapter(folder: Path, adapter: Path | None, dtype: str) -> tuple[LoraSettings, Adapter]:
    """A PEFT folder in the dtype of the replicas, whose live hash is compared with its own; or none.

    Without an adapter the base is evaluated: through an adapter of rank 1 that is zero, and so adds exactly 0.
    Raises ValueError for an adapter that cannot be used or does not fit the model's transformer, FileNotFoundError for
    a part of it.
    """
    import torch

    from models.components import torch_dtype, transformer_shell
    from models.lora.attach import Adapter, LoraSettings, adapter_parameters, attach_lora, hash_state
    from models.lora.files import read_adapter

    transformer = transformer_shell(folder)
    state: dict[str, torch.Tensor] | None = None
    settings = LoraSettings(1, 1.0, DEFAULT_TARGETS[:1])
    if adapter is not None:
        state, settings = read_adapter(adapter)
    attach_lora(transformer, **asdict(settings), trainable=False)
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
