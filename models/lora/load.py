"""An adapter's files, checked against the model's transformer: as rollout workers take them, and to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from models.lora.targets import DEFAULT_TARGETS

if TYPE_CHECKING:
    import torch

    from models.lora.attach import Adapter, LoraSettings, State


def load_adapter(folder: Path, adapter: Path | None, dtype: str) -> tuple[LoraSettings, Adapter]:
    """A PEFT folder in the dtype of the replicas, whose live hash is compared with its own; or none.

    Without an adapter the base is evaluated: through an adapter of rank 1 that is zero, and so adds exactly 0.
    Raises ValueError for an adapter that cannot be used or does not fit the model's transformer, FileNotFoundError for
    a part of it.
    """
    import torch

    from models.components import torch_dtype
    from models.lora.attach import Adapter, LoraSettings, hash_state
    from models.lora.files import read_adapter

    state: dict[str, torch.Tensor] | None = None
    settings = LoraSettings(1, 1.0, DEFAULT_TARGETS[:1])
    if adapter is not None:
        state, settings = read_adapter(adapter)
    shapes = _shapes(folder, settings)
    if state is None:
        state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    _check_shapes(folder, shapes, state)
    tensors = {name: value.to(torch_dtype(dtype)).contiguous() for name, value in state.items()}
    return settings, Adapter(0, hash_state(tensors), tensors)


def starting_adapter(folder: Path, adapter: Path, wanted: LoraSettings) -> State:
    """The tensors of an adapter that training starts from, of just the linears, rank and alpha that are trained.

    Raises ValueError for one of others, or as `load_adapter`, FileNotFoundError for a part of it.
    """
    from models.lora.files import read_adapter

    state, found = read_adapter(adapter)
    if (found.rank, found.alpha) != (wanted.rank, wanted.alpha):
        raise ValueError(
            f"{adapter} has rank {found.rank} and alpha {found.alpha:g}, and rank {wanted.rank} and alpha "
            f"{wanted.alpha:g} are to be trained: set model.lora.rank={found.rank} model.lora.alpha={found.alpha:g}"
        )
    shapes = _shapes(folder, wanted)
    own, trained = ({name.rsplit(".", 2)[0] for name in names} for names in (state, shapes))
    if own != trained:
        raise ValueError(
            f"{adapter} adapts {len(own)} linears and {len(trained)} are to be trained, the first that only one of "
            f"them has is {min(own ^ trained)}: set model.lora.targets=[{','.join(found.targets)}], or give another "
            "adapter"
        )
    _check_shapes(folder, shapes, state)
    return state


def _shapes(folder: Path, settings: LoraSettings) -> dict[str, tuple[int, ...]]:
    """Of each tensor of an adapter with these settings, by name."""
    from models.components import transformer_shell
    from models.lora.attach import adapter_parameters, attach_lora

    transformer = transformer_shell(folder)
    attach_lora(transformer, **asdict(settings), trainable=False)
    return {name: tuple(value.shape) for name, value in adapter_parameters(transformer).items()}


def _check_shapes(folder: Path, shapes: Mapping[str, tuple[int, ...]], state: State) -> None:
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
