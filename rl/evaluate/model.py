"""Which weights are evaluated: their hashes, and the adapter as rollout workers take it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from core.files import folder_manifest
from models.components import check_model_folder, is_metaquery_folder
from models.lora.load import load_adapter
from models.metaquery.config import check_metaquery
from models.sizes import geometry

if TYPE_CHECKING:
    pass


def vlm_sha256(folder: Path) -> str:
    """The same over all files of a VLM's folder."""
    return hashlib.sha256(json.dumps(folder_manifest(folder), sort_keys=True).encode()).hexdigest()


def model_problems(
    folder: Path, vlm: Path | None, adapter: Path | None, sizes: set[tuple[int, int]]
) -> list[str]:
    """What keeps the model (with VLM and adapter) from generating pictures of `sizes` (height, width in px)."""
    if is_metaquery_folder(folder) and vlm is None:
        return [f"--model: {folder} is a MetaQuery model (it has conditioner/): give its Qwen2.5-VL as --vlm"]
    if vlm is not None and folder.is_dir() and not is_metaquery_folder(folder):
        return [f"--vlm {vlm}: {folder} has no conditioner/ and reads prompts with its text encoders"]
    checked = check_model_folder(folder) if vlm is None else check_metaquery(folder, vlm)
    problems = [f"--model: {problem}" for problem in checked]
    if problems:
        return problems
    try:
        load_adapter(folder, adapter, "float32")
    except (ValueError, OSError, KeyError) as error:
        problems.append(f"--adapter {adapter}: {error}")
    found = geometry(folder)
    return problems + [
        f"--size: pictures of {height} x {width} px need sides that are multiples of {found.multiple} and at most "
        f"{found.largest}"
        for height, width in sorted(sizes)
        if any(side % found.multiple or side > found.largest for side in (height, width))
    ]
