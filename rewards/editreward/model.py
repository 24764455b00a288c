"""`EditRewardModel`: Qwen2.5-VL without its output matrix, and one linear `score` on the last token.

On disk its tensors bear the names under which stock vLLM loads `Qwen2_5_VLForSequenceClassification`: the released
checkpoint's for the body (`model.*`, `visual.*`), and `language_model.score.{weight,bias}` (DESIGN section 8).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel
from transformers.utils import logging as transformers_logging

from rewards.editreward.processing import EditBatch

log = logging.getLogger(__name__)

_FILE_PREFIXES = {
    "backbone.language_model.": "model.",
    "backbone.visual.": "visual.",
    "score.": "language_model.score.",
}


class ScoreHead(nn.Linear):
    """Linear in float32 whatever the weights' type, as vLLM computes it."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class EditRewardModel(nn.Module):
    """`forward(batch)` gives K raw outputs per sample; `EditRewardSettings` turns them into a reward."""

    def __init__(self, backbone: Qwen2_5_VLModel, num_dimensions: int, *, bias: bool):
        super().__init__()
        self.backbone = backbone
        hidden: int = backbone.config.text_config.hidden_size  # type: ignore[union-attr, assignment]
        weight = next(backbone.parameters())
        self.score = ScoreHead(hidden, num_dimensions, bias=bias, dtype=weight.dtype, device=weight.device)
        # At 0 every answer is the mean of the labels, and nothing random is left to seed.
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)

    def forward(self, batch: EditBatch) -> Tensor:
        """Raw outputs [B, K] in float32.

        Positions are real multimodal RoPE: transformers computes them only when it is given `input_ids`,
        `mm_token_type_ids` and the grids together, and falls back on flat ones in silence otherwise.
        """
        hidden = self.backbone(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            mm_token_type_ids=batch.token_types,
            pixel_values=batch.pixels.to(self.backbone.dtype),
            image_grid_thw=batch.grids,
            use_cache=False,
        ).last_hidden_state
        last = batch.attention_mask.sum(1) - 1
        return self.score(hidden[torch.arange(len(last), device=last.device), last])

    def file_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All weights under the names of the file."""
        for name, tensor in self.state_dict().items():
            yield file_name(name), tensor


def file_name(name: str) -> str:
    """The name in the model folder of one entry of `EditRewardModel.state_dict()`."""
    for prefix, written in _FILE_PREFIXES.items():
        if name.startswith(prefix):
            return written + name.removeprefix(prefix)
    raise KeyError(f"{name} is no weight of an EditRewardModel")


def build_model(
    folder: str | Path, num_dimensions: int, *, bias: bool, dtype: torch.dtype
) -> EditRewardModel:
    """A fresh head on the released Qwen2.5-VL in `folder`, on the CPU."""
    backbone = _load_backbone(folder, dtype)
    return EditRewardModel(backbone, num_dimensions, bias=bias)


def load_model(
    folder: str | Path, num_dimensions: int, *, dtype: torch.dtype, device: str
) -> EditRewardModel:
    """An exported model, for scoring. Raises ValueError where the head is not the one the settings speak of."""
    head = dict(_read_head(Path(folder)))
    weight = head.get("weight")
    if weight is None or weight.shape[0] != num_dimensions:
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"{folder}: language_model.score.weight is {shape}, expected {num_dimensions} rows; export the model again"
        )
    model = EditRewardModel(_load_backbone(folder, dtype), num_dimensions, bias="bias" in head)
    model.score.load_state_dict(head)
    return model.eval().requires_grad_(False).to(device)


def meta_model(config: Qwen2_5_VLConfig, num_dimensions: int, *, bias: bool = True) -> EditRewardModel:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return EditRewardModel(Qwen2_5_VLModel(config), num_dimensions, bias=bias)


def _load_backbone(folder: str | Path, dtype: torch.dtype) -> Qwen2_5_VLModel:
    """Raises FileNotFoundError or ValueError for a folder that does not hold a whole Qwen2.5-VL."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"{config} does not exist: give the folder of a Qwen2.5-VL")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if kind != "qwen2_5_vl":
        raise ValueError(f"{config}: model_type is {kind!r}, EditReward is built on 'qwen2_5_vl'")
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


def _read_head(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open is no mapping
                if name.startswith(_FILE_PREFIXES["score."]):
                    yield name.removeprefix(_FILE_PREFIXES["score."]), file.get_tensor(name)


def attach_lora(model: EditRewardModel, *, rank: int, alpha: float, targets: Sequence[str], seed: int) -> int:
    """LoRA on linears of the language model; the vision tower is left as it is. Returns how many it matched.

    Raises ValueError for a target that matches no linear.
    """
    import re

    from peft import LoraConfig, inject_adapter_in_model

    linears = [n for n, m in model.backbone.language_model.named_modules() if isinstance(m, nn.Linear)]
    dead = [t for t in targets if not any(n.endswith(f".{t}") for n in linears)]
    if dead or not targets:
        raise ValueError(
            f"model.lora.targets: {', '.join(dead) or 'an empty list'} matches no linear layer of the language "
            f"model; its layers end in {', '.join(sorted({n.rpartition('.')[2] for n in linears}))}"
        )
    pattern = rf"backbone\.language_model\..*\.({'|'.join(map(re.escape, targets))})"
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern, lora_dropout=0.0, bias="none")  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    model.score.requires_grad_(True)
    return sum(any(n.endswith(f".{t}") for t in targets) for n in linears)


def merge_lora(model: EditRewardModel) -> None:
    """Add every LoRA product to its linear and put the plain linear back, so that names are the released ones."""
    from peft.tuners.lora import LoraLayer

    for path, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]:
        layer.merge(safe_merge=True)
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
