"""From (source, result, instruction) to model inputs, and to a request for vLLM: the same pictures, text and tokens.

Pictures are brought to their final size here, with PIL, whoever scores them: the image processors of transformers
(PIL or torchvision) and of vLLM then have nothing left to resize, so their interpolations cannot differ.

Shapes: `B` samples, `T` tokens, `P` patches of all pictures, `N` pictures.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from rewards.base import RESERVED
from rewards.editreward.settings import EditRewardSettings, SettingsError

if TYPE_CHECKING:
    from torch import Tensor


class InputError(ValueError):
    """A sample that cannot be shown to the model; it is not scored."""


@dataclass(frozen=True)
class Encoded:
    """One sample. input_ids, token_types [T] (1 at image tokens); pixels [P, D] float32; grids [N, 3] in patches."""

    input_ids: Tensor
    token_types: Tensor
    pixels: Tensor
    grids: Tensor


@dataclass(frozen=True)
class EditBatch:
    """input_ids, token_types, attention_mask [B, T], padded on the right; pixels [P, D]; grids [N, 3], in order."""

    input_ids: Tensor
    token_types: Tensor
    attention_mask: Tensor
    pixels: Tensor
    grids: Tensor

    def to(self, device: str) -> EditBatch:
        return EditBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def shown_size(
    width: int, height: int, min_pixels: int, max_pixels: int, token_pixels: int
) -> tuple[int, int]:
    """Width and height at which the model sees a picture: sides divisible by `token_pixels`, area within the limits.

    Raises InputError where the aspect ratio leaves no such size.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    limits = {"factor": token_pixels, "min_pixels": min_pixels, "max_pixels": max_pixels}
    try:
        rows, columns = smart_resize(height, width, **limits)
        settled = smart_resize(rows, columns, **limits) == (rows, columns)
    except (ValueError, ZeroDivisionError) as error:
        raise InputError(f"a picture of {width} x {height} cannot be resized: {error}") from error
    if not settled:
        raise InputError(
            f"a picture of {width} x {height} has no size of [{min_pixels}, {max_pixels}] pixels with sides "
            f"divisible by {token_pixels}; crop it"
        )
    return columns, rows


def prepare_picture(picture: Image.Image, settings: EditRewardSettings) -> Image.Image:
    """RGB at the size the model sees. Raises InputError as `shown_size` does."""
    size = shown_size(*picture.size, settings.min_pixels, settings.max_pixels, settings.token_pixels)
    rgb = picture.convert("RGB")
    return rgb if rgb.size == size else rgb.resize(size, Image.Resampling.BICUBIC)


def refuse_reserved(instruction: str) -> None:
    """Raise InputError for text that the tokenizer could take for a picture or for the end of a turn."""
    if RESERVED in instruction:
        raise InputError(f"the instruction holds {RESERVED!r}, with which the model's control tokens begin")


def shown_pictures(
    source: Image.Image, result: Image.Image, settings: EditRewardSettings
) -> list[Image.Image]:
    """The prepared pictures of one sample, in the order of the user turn."""
    pictures = [source, result] if settings.view == "full" else [result]
    return [prepare_picture(picture, settings) for picture in pictures]


def classify_request(
    source: Image.Image, result: Image.Image, instruction: str, settings: EditRewardSettings, *, model: str
) -> dict[str, Any]:
    """The JSON body of vLLM's `POST /classify` for one edit. The K raw outputs come back in `data[0].probs`.

    The server needs `--runner pooling --pooler-config '{"use_activation": false}'`, or it answers probabilities.
    """
    refuse_reserved(instruction)
    parts: list[dict[str, Any]] = []
    for picture in shown_pictures(source, result, settings):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": settings.text(instruction)})
    return {
        "model": model,
        "messages": [{"role": "user", "content": parts}],
        "add_generation_prompt": settings.add_generation_prompt,
    }


class EditProcessor:
    """Tokenizer and image processor of a model folder, under the constants of `settings`. Needs no torchvision."""

    def __init__(self, folder: str | Path, settings: EditRewardSettings):
        """Raises SettingsError for a chat template that does not show the pictures, InputError for other patches."""
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.settings = settings
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        self.image_token_id: int = config["image_token_id"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(
            folder, size={"shortest_edge": settings.min_pixels, "longest_edge": settings.max_pixels}
        )
        side = self.image_processor.patch_size * self.image_processor.merge_size
        if side != settings.token_pixels:
            raise InputError(
                f"{folder}: an image token sees {side} x {side} pixels, the settings say {settings.token_pixels}"
            )
        pictures = 2 if settings.view == "full" else 1
        found = self._tokens("an instruction", pictures).count(self.image_token_id)
        if found != pictures:
            raise SettingsError(f"{folder}: the chat template shows {found} of {pictures} pictures")

    def encode(self, source: Image.Image, result: Image.Image, instruction: str) -> Encoded:
        """Model inputs of one sample. Raises InputError as `shown_size` and `refuse_reserved` do."""
        import torch

        refuse_reserved(instruction)
        pictures = shown_pictures(source, result, self.settings)
        features = self.image_processor(images=pictures, return_tensors="pt")
        grids = features["image_grid_thw"]
        counts = iter((grids.prod(1) // self.image_processor.merge_size**2).tolist())
        ids: list[int] = []
        for token in self._tokens(instruction, len(pictures)):
            ids += [token] * (next(counts) if token == self.image_token_id else 1)
        input_ids = torch.tensor(ids)
        return Encoded(input_ids, (input_ids == self.image_token_id).int(), features["pixel_values"], grids)

    def _tokens(self, instruction: str, pictures: int) -> list[int]:
        """Token ids of the whole prompt, with one image token for each picture."""
        content: list[dict[str, Any]] = [{"type": "image"} for _ in range(pictures)]
        content.append({"type": "text", "text": self.settings.text(instruction)})
        turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self.settings.chat_template,
            add_generation_prompt=self.settings.add_generation_prompt,
            tokenize=False,
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def collate(self, samples: Sequence[Encoded]) -> EditBatch:
        """One batch, padded on the right to its longest sample."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        pad = self.tokenizer.pad_token_id or 0
        return EditBatch(
            input_ids=pad_sequence([s.input_ids for s in samples], batch_first=True, padding_value=pad),
            token_types=pad_sequence([s.token_types for s in samples], batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(s.input_ids) for s in samples], batch_first=True),
            pixels=torch.cat([s.pixels for s in samples]),
            grids=torch.cat([s.grids for s in samples]),
        )
