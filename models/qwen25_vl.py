"""Qwen2.5-VL, UniPic 2.0's VLM and the base of EditReward: its published shape, and what its folder says.

Importing this needs no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import Qwen2_5_VLModel


def qwen25_vl_7b() -> dict[str, Any]:
    """Arguments of `Qwen2_5_VLConfig(**qwen25_vl_7b())`: the published shape."""
    return {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "max_position_embeddings": 128000,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_channels": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
    }


def read_token_pixels(folder: str | Path) -> int:
    """Pixels a side of what one image token of a Qwen2.5-VL folder sees: 28 in the released ones (14, merged 2 x 2).

    Raises ValueError for a folder without a readable config.json.
    """
    path = Path(folder) / "config.json"
    try:
        vision = json.loads(path.read_text(encoding="utf-8")).get("vision_config", {})
        return int(vision.get("patch_size", 14)) * int(vision.get("spatial_merge_size", 2))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: no readable config of a Qwen2.5-VL ({error})") from error


def read_chat_template(folder: str | Path) -> str:
    """The chat template of a released Qwen2.5-VL folder: the processor's, else the tokenizer's.

    Raises ValueError when there is none.
    """
    folder = Path(folder)
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(template, str):
                return template
    raise ValueError(
        f"{folder}: no chat template (chat_template.jinja, chat_template.json, tokenizer_config.json)"
    )


def load_backbone(folder: str | Path, dtype: torch.dtype) -> Qwen2_5_VLModel:
    """The model without its output matrix, on the CPU.

    Raises FileNotFoundError or ValueError for a folder that does not hold a whole Qwen2.5-VL.
    """
    from transformers import Qwen2_5_VLModel
    from transformers.utils import logging as transformers_logging

    config = Path(folder) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist: give the folder of a Qwen2.5-VL")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind != "qwen2_5_vl":
        raise ValueError(f"{config}: model_type is {kind!r}, expected 'qwen2_5_vl'")
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would report the output matrix, or the head, as unexpected
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = Qwen2_5_VLModel.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()
    backbone, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]}: the download is not whole"
        )
    return backbone
