"""What keeps a model from making the pictures that are to be evaluated."""

from __future__ import annotations

from pathlib import Path

from models.lora.load import load_adapter
from models.preflight import model_problems as folder_problems
from models.sizes import check_size, geometry


def model_problems(
    folder: Path, vlm: Path | None, adapter: Path | None, sizes: set[tuple[int, int]]
) -> list[str]:
    """What keeps the model (with VLM and adapter) from generating pictures of `sizes` (height, width in px)."""
    problems = folder_problems(folder, vlm, model_key="--model", vlm_key="--vlm")
    if problems:
        return problems
    try:
        load_adapter(folder, adapter, "float32")
    except (ValueError, OSError, KeyError) as error:
        problems.append(f"--adapter {adapter}: {error}")
    found = geometry(folder)
    for size in sorted(sizes):
        try:
            check_size(found, *size)
        except ValueError as error:
            problems.append(f"--size: {error}")
    return problems
