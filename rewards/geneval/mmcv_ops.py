"""Lets mmdet run without mmcv's compiled operators.

mmdet imports `mmcv.ops`, whose modules ask the compiled extension `mmcv._ext` for their functions as they load.
mmcv-lite brings those modules and no extension. Mask2Former calls one operator only, multi-scale deformable
attention, and mmcv holds that in plain PyTorch too: it takes that way on the CPU by itself, and on CUDA once
told that there is no CUDA. A compiled mmcv, where installed, is used untouched.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

logger = logging.getLogger(__name__)

EXTENSION = "mmcv._ext"


class _StandIn(ModuleType):
    """`mmcv._ext` without operators: every name is there, and raises when it is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):  # what Python's own machinery asks of a module must stay absent
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(
                f"{EXTENSION}.{name}: this operator needs a compiled mmcv, and mmcv-lite is installed; "
                "Mask2Former does without it, other detectors may not"
            )

        return missing


def has_compiled_ops() -> bool:
    """Whether mmcv's extension is on the disk. Imports mmcv. Raises ImportError without one."""
    importlib.import_module("mmcv")
    if isinstance(sys.modules.get(EXTENSION), _StandIn):
        return False
    return importlib.util.find_spec(EXTENSION) is not None


def prepare_ops() -> str:
    """Make `mmcv.ops` importable and usable; call it before mmdet is imported.

    Returns `compiled` or `pytorch`, for the log. Raises ImportError without mmcv.
    """
    if has_compiled_ops():
        return "compiled"
    if EXTENSION not in sys.modules:
        module = _StandIn(EXTENSION)
        module.__spec__ = ModuleSpec(EXTENSION, None)  # find_spec raises on a module without one
        sys.modules[EXTENSION] = module
        logger.info("mmcv has no compiled operators: deformable attention runs in plain PyTorch")
    attention: Any = importlib.import_module("mmcv.ops.multi_scale_deform_attn")
    attention.IS_CUDA_AVAILABLE = False  # read at every call to choose between the extension and PyTorch
    return "pytorch"
