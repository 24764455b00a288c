"""A frozen Qwen2.5-VL: loading, its pictures, and its own answers to questions (understanding).

Works without torchvision: pictures go through transformers' PIL image processor.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from core.pictures import to_rgb
from models.folders import check_vlm_folder, require


@dataclass(frozen=True)
class Pictures:
    """Pictures as the vision tower reads them.

    Attributes:
        pixels: patches of all pictures, [P, patch values] float32.
        grids: rows and columns of patches, [N, 3] int64 as (1, rows, columns).
        tokens: how many tokens of the language model each picture becomes, N numbers.
    """

    pixels: Tensor
    grids: Tensor
    tokens: list[int]


def load_vlm(
    folder: str | Path, *, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Qwen2_5_VLForConditionalGeneration, Any, Qwen2VLImageProcessorPil]:
    """Model (frozen, eval mode, SDPA), tokenizer with a chat template, and image processor of a folder.

    Raises:
        FileNotFoundError: every file that is missing.
        ValueError: weights are missing, there is no chat template, or patches of another size are prepared than
            the model reads.
    """
    require(check_vlm_folder(folder))
    loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
    )
    vlm, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]}: download it again"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.chat_template = tokenizer.chat_template or _processor_template(Path(folder))
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    vision = vlm.config.vision_config
    read = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
    made = (processor.patch_size, processor.merge_size, processor.temporal_patch_size)
    if read != made:
        raise ValueError(
            f"{folder}: the vision tower reads (patch_size, merge_size, temporal_patch_size) {read}, "
            f"preprocessor_config.json makes {made}"
        )
    return vlm.to(device).eval().requires_grad_(False), tokenizer, processor


def token_side(processor: Any) -> int:
    """Pixels along a side of what one token sees: 28 for the released models."""
    return processor.patch_size * processor.merge_size


def shown_size(width: float, height: float, processor: Any) -> tuple[int, int]:
    """Width and height at which a picture is shown: whole tokens, within the processor's limits on the area.

    Raises:
        ValueError: no such size keeps an aspect ratio like this one.
    """
    try:
        rows, columns = smart_resize(
            max(1, round(height)),
            max(1, round(width)),
            factor=token_side(processor),
            min_pixels=processor.size["shortest_edge"],
            max_pixels=processor.size["longest_edge"],
        )
    except ValueError as error:
        raise ValueError(f"a picture of {width:g} x {height:g} cannot be shown: {error}; crop it") from error
    return columns, rows


def prepare_pictures(images: Sequence[Image.Image], processor: Any, *, scale: float = 1.0) -> Pictures:
    """Pictures of any mode at `scale` times their size, rounded to whole tokens.

    Raises:
        ValueError: as `shown_size` and `to_rgb` do.
    """
    shown = []
    for image in map(to_rgb, images):
        size = shown_size(image.width * scale, image.height * scale, processor)
        shown.append(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
    features = processor(images=shown, do_resize=False, return_tensors="pt")
    grids = features["image_grid_thw"]
    tokens = (grids.prod(1) // processor.merge_size**2).tolist()
    return Pictures(features["pixel_values"], grids, tokens)


def refuse_control_tokens(text: str, tokenizer: Any) -> None:
    """Raise ValueError for text in which the tokenizer would read a picture or the end of a turn."""
    special = {str(token) for token in tokenizer.get_added_vocab()}
    found = sorted(token for token in special if token in text)
    if found:
        raise ValueError(f"the text {text[:80]!r} holds control tokens of the VLM: {', '.join(found)}")


def expand_pictures(ids: Sequence[int], image_token: int, tokens: Sequence[int]) -> Tensor:
    """Token ids [T] with the one token of each picture repeated as often as the picture needs."""
    counts = iter(tokens)
    expanded: list[int] = []
    for token in ids:
        expanded += [token] * (next(counts) if token == image_token else 1)
    return torch.tensor(expanded)


@torch.no_grad()
def answer_question(
    vlm: Qwen2_5_VLForConditionalGeneration,
    tokenizer: Any,
    processor: Any,
    images: Sequence[Image.Image],
    question: str,
    max_new_tokens: int,
) -> str:
    """The VLM's answer to a question about none, one or several pictures, as it writes it.

    Greedy, so that it repeats. Its own chat template (with the system prompt that has) and real multimodal RoPE.
    Boxes in the answer are in pixels of the picture as shown: see `shown_size`.

    Raises:
        ValueError: a picture cannot be shown, the question holds control tokens, or the chat template shows
            another number of pictures.
    """
    refuse_control_tokens(question, tokenizer)
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": question})
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    image_token = vlm.config.image_token_id
    if ids.count(image_token) != len(images):
        raise ValueError(f"the VLM's chat template shows {ids.count(image_token)} of {len(images)} pictures")
    inputs: dict[str, Tensor] = {}
    tokens: list[int] = []
    if images:
        pictures = prepare_pictures(images, processor)
        inputs = {"pixel_values": pictures.pixels, "image_grid_thw": pictures.grids}
        tokens = pictures.tokens
    input_ids = expand_pictures(ids, image_token, tokens)[None]
    inputs |= {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": (input_ids == image_token).int(),
    }
    inputs = {name: tensor.to(vlm.device) for name, tensor in inputs.items()}
    model: Any = vlm
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, use_cache=True)
    new = output[0, input_ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _processor_template(folder: Path) -> str:
    """The template of folders that keep it with the processor, as older releases of Qwen2.5-VL do."""
    path = folder / "chat_template.json"
    template = json.loads(path.read_text(encoding="utf-8")).get("chat_template") if path.is_file() else None
    if not isinstance(template, str):
        raise ValueError(
            f"{folder}: no chat template (chat_template.jinja, chat_template.json, tokenizer_config.json)"
        )
    return template
