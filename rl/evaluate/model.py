"""What keeps a model from making the pictures that are to be evaluated."""

from __future__ import annotations

from pathlib import Path

from models.lora.load import load_adapter
from models.preflight import model_problems as folder_problems
from models.sizes import geometry


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
    return problems + [
        f"--size: pictures of {height} x {width} px need sides that are multiples of {found.multiple} and at most "
        f"{found.largest}"
        for height, width in sorted(sizes)
        if any(side % found.multiple or side > found.largest for side in (height, width))
    ]
