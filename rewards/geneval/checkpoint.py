"""Detector weights from a file: hashed, read without running code from it, and checked key by key."""

from __future__ import annotations

import hashlib
import logging
import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import file_sha256
from rewards.base import FatalRewardError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SHOWN_KEYS = 8


def weights_sha256(path: Path) -> str:
    """Hex sha256 of a file; of a folder, that of its one *.safetensors file, or of the list of their hashes."""
    if path.is_file():
        return file_sha256(path)
    found = {file.name: weights_sha256(file) for file in sorted(path.glob("*.safetensors"))}
    if len(found) == 1:
        return next(iter(found.values()))
    listing = "".join(f"{name} {digest}\n" for name, digest in found.items())
    return hashlib.sha256(listing.encode()).hexdigest()


def read_checkpoint(path: Path, *, trust: bool) -> tuple[dict[str, torch.Tensor], Mapping[str, Any]]:
    """The weights of a checkpoint, and the `meta` that mmengine stores beside them (or nothing).

    `.safetensors` hold tensors only. Every other file is read by `torch.load(weights_only=True)`, which builds
    tensors, plain containers and numbers; mmengine's training log is read over, and whatever else a file asks
    for is refused. `trust` lifts that: unpickling then runs any code that the file holds. Raises
    FatalRewardError.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        elif trust:
            logger.warning("%s: read with trust_checkpoint, which runs the code it holds", path)
            content = torch.load(path, map_location="cpu", weights_only=False)
        else:
            with torch.serialization.safe_globals(_IN_PLACE_OF):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile file may raise anything
        raise FatalRewardError(
            f"checkpoint {path}: cannot be read safely: {_cause(error)}; get the published file, or set "
            "trust_checkpoint: true if you know who made this one (it runs code from the file)"
        ) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(weights, Mapping) or not all(isinstance(v, torch.Tensor) for v in weights.values()):
        raise FatalRewardError(f"checkpoint {path}: holds no state_dict of tensors")
    meta = content.get("meta") if "state_dict" in content else None
    return dict(weights), meta if isinstance(meta, Mapping) else {}


def load_strictly(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Fill the model. Raises FatalRewardError, listing keys, unless keys and shapes agree one for one."""
    own = model.state_dict()
    wrong_shape = [
        f"{key} {list(weights[key].shape)} for {list(own[key].shape)}"
        for key in own.keys() & weights.keys()
        if weights[key].shape != own[key].shape
    ]
    problems = [
        shown_keys(keys, what)
        for what, keys in (
            ("missing", own.keys() - weights.keys()),
            ("unexpected", weights.keys() - own.keys()),
            ("of another shape", wrong_shape),
        )
        if keys
    ]
    if problems:
        raise FatalRewardError(
            f"checkpoint {path} does not fit the model: {'; '.join(problems)}{_hint(weights)}"
        )
    model.load_state_dict(dict(weights))


def shown_keys(keys: Collection[str], what: str) -> str:
    """How many keys there are, and the first of them."""
    return f"{len(keys)} keys {what}: {', '.join(sorted(keys)[:SHOWN_KEYS])}{' ...' if len(keys) > SHOWN_KEYS else ''}"


def _hint(weights: Mapping[str, torch.Tensor]) -> str:
    """mmdet 2.x named the same layers otherwise; loaded leniently, such a file leaves half the model random."""
    if any(".attentions.0." in key for key in weights):
        return (
            ". These look like keys of mmdet 2.x: take the file that mmdet 3.x publishes for this config "
            "(Weights in configs/mask2former/metafile.yml)"
        )
    return ""


class _Ignored:
    """Takes the place of what mmengine stores beside the weights: its training log, made of NumPy arrays."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _method_of_ignored(owner: Any, name: str) -> _Ignored:
    """In place of `getattr`, through which the training log's methods are pickled."""
    if owner is not _Ignored:
        raise FatalRewardError(f"it asks for the attribute {name!r} of {owner!r}")
    return _Ignored()


_IN_PLACE_OF: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_method_of_ignored, "builtins.getattr"),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Ignored, "numpy.ndarray"),
    (_Ignored, "numpy.dtype"),
    *(
        (_Ignored, f"{place}.{name}")
        for place in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("_reconstruct", "scalar")
    ),
]
"""Names in a file that are read as something harmless instead; every other name that is not torch's is refused."""


def _cause(error: Exception) -> str:
    """The reason, without torch's advice on how to switch the protection off."""
    if not isinstance(error, pickle.UnpicklingError):
        return str(error)
    lines = [line for line in str(error).splitlines() if "GLOBAL" in line or "Unpickler" in line]
    return " ".join(lines or [str(error)]).split(". Please use")[0].strip()[:300]
