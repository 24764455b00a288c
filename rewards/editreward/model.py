"""`EditRewardModel`: Qwen2.5-VL without its output matrix, and one linear `score` on the last token.

On disk its tensors bear the names under which stock vLLM loads `Qwen2_5_VLForSequenceClassification`: the released
checkpoint's for the body (`model.*`, `visual.*`), and `language_model.score.{weight,bias}` (DESIGN section 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from models.qwen25_vl import load_backbone
from rewards.editreward.processing import EditBatch

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
            prefix = next(prefix for prefix in _FILE_PREFIXES if name.startswith(prefix))
            yield _FILE_PREFIXES[prefix] + name.removeprefix(prefix), tensor


def build_model(
    folder: str | Path, num_dimensions: int, *, bias: bool, dtype: torch.dtype
) -> EditRewardModel:
    """A fresh head on the released Qwen2.5-VL in `folder`, on the CPU."""
    backbone = load_backbone(folder, dtype)
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
    model = EditRewardModel(load_backbone(folder, dtype), num_dimensions, bias="bias" in head)
    model.score.load_state_dict(head)
    return model.eval().requires_grad_(False).to(device)


def meta_model(config: Qwen2_5_VLConfig, num_dimensions: int, *, bias: bool = True) -> EditRewardModel:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return EditRewardModel(Qwen2_5_VLModel(config), num_dimensions, bias=bias)


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
