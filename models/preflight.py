"""Everything that keeps a model folder, and the VLM that it may need, from loading. Reads names and JSON only."""

import json
from pathlib import Path

from models.folders import (
    METAQUERY_PARTS,
    PARTS,
    check_model_folder,
    check_vlm_folder,
    is_metaquery_folder,
)
from models.metaquery.config import read_metaquery_config


def model_problems(folder: Path, vlm: Path | None, *, model_key: str, vlm_key: str) -> list[str]:
    """Every problem, each beginning with the key to mend.

    Args:
        folder: a Kontext folder, or a MetaQuery folder, which has `conditioner/` and needs a `vlm`.
        model_key, vlm_key: what the caller's user calls the two, such as `model.path` or `--vlm`.
    """
    metaquery = is_metaquery_folder(folder) or (vlm is not None and not folder.is_dir())
    checked = check_model_folder(folder, METAQUERY_PARTS if metaquery else PARTS)
    problems = [f"{model_key}: {problem}" for problem in checked]
    if vlm is None and metaquery:
        problems.append(
            f"{vlm_key} is not set, and {model_key}={folder} is a MetaQuery folder (it has conditioner/): give its "
            f"Qwen2.5-VL as {vlm_key}"
        )
    elif vlm is not None and not metaquery:
        problems.append(
            f"{vlm_key}={vlm}: {model_key}={folder} is a Kontext folder (it has no conditioner/), which reads prompts "
            f"with its text encoders; leave {vlm_key} out, or give the folder of a MetaQuery model"
        )
    elif vlm is not None:
        problems += [f"{vlm_key}: {problem}" for problem in check_vlm_folder(vlm)]
        if not problems:
            conditioner = folder / "conditioner"
            found = conditioner_problems(conditioner, (model_key, folder / "transformer"), (vlm_key, vlm))
            problems += [f"{model_key}: {conditioner}: {problem}" for problem in found]
    return problems


def conditioner_problems(folder: Path, transformer: tuple[str, Path], vlm: tuple[str, Path]) -> list[str]:
    """Where a `conditioner/` cannot be used, or does not fit its neighbours: the key and the folder of each."""
    try:
        config = read_metaquery_config(folder)
    except ValueError as error:
        return [str(error)]
    sizes, language = _read(transformer[1]), _read(vlm[1])
    # The released folders of Qwen2.5-VL have the language model's keys at the top.
    wanted = {"llm_hidden_size": (vlm[0], language.get("text_config", language).get("hidden_size"))}
    for name in ("joint_attention_dim", "pooled_projection_dim"):
        wanted[name] = (transformer[0], sizes.get(name))
    return [
        f"its {name} is {getattr(config, name)}, {owner} has {value}; take a conditioner made for them"
        for name, (owner, value) in wanted.items()
        if getattr(config, name) != value
    ]


def _read(folder: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
