"""Colour rule `clip`: zero-shot classification of the object's crop, as in GenEval's evaluator.

Where we differ from upstream: the weights are read by transformers instead of open_clip and run in float32
instead of autocast, and all crops of a reward batch go through CLIP together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from rewards.base import FatalRewardError
from rewards.geneval.checkpoint import weights_sha256
from rewards.geneval.detection import NO_COLOR, ColorQuestion
from rewards.geneval.hub import load_pretrained
from rewards.geneval.names import COLORS

logger = logging.getLogger(__name__)

TEMPLATES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)
"""GenEval's prompts. A colour's embedding is the mean over them, each and then the mean scaled to length 1."""

VIT_L_14 = (1024, 14)
"""Width and patch size of the image tower that GenEval's colours come from."""

BACKGROUND = "#999999"

LONGEST = 8
"""Longest edge of a crop over its shortest. CLIP sees the middle square alone, and a sliver enlarged to CLIP's
size would fill the memory, so what lies further out is cut off first."""


class ClipColors:
    """A CLIP in the hub's layout behind the `ColorClassifier` interface; GenEval's is ViT-L/14 of OpenAI.

    Another CLIP is another metric, and `scoring` says so. An object with an empty crop gets `NO_COLOR`. The text
    embeddings of a class are computed once.
    """

    def __init__(
        self,
        model: transformers.CLIPModel,
        tokenizer: transformers.CLIPTokenizer,
        processor: transformers.CLIPImageProcessorPil,
        label: str,
    ) -> None:
        vision: Any = model.config.vision_config
        width, patch = vision.hidden_size, vision.patch_size
        self.scoring = "clip" if (width, patch) == VIT_L_14 else f"clip-{width}-{patch}"
        self.label = label
        self._model, self._tokenizer, self._processor = model, tokenizer, processor
        self._texts: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def classify(self, questions: Sequence[ColorQuestion]) -> list[str]:
        """See `ColorClassifier.classify`. One forward pass of the image tower, whatever the number of crops."""
        answers = [NO_COLOR] * len(questions)
        crops = {
            k: crop for k, question in enumerate(questions) if (crop := object_crop(question)) is not None
        }
        if not crops:
            return answers
        pixels = self._processor(images=list(crops.values()), return_tensors="pt")["pixel_values"]
        with self._lock, torch.inference_mode():
            output = self._model.get_image_features(pixel_values=pixels.to(self._model.device))
            images = torch.nn.functional.normalize(output.pooler_output, dim=-1)
            for k, image in zip(crops, images, strict=True):
                answers[k] = COLORS[int((self._text(questions[k].class_name) @ image).argmax())]
        return answers

    def _text(self, class_name: str) -> torch.Tensor:
        """Embeddings of the ten colours for a class, [10, D], of length 1."""
        if class_name not in self._texts:
            prompts = [t.format(color=color, name=class_name) for color in COLORS for t in TEMPLATES]
            tokens = self._tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
            output = self._model.get_text_features(**tokens.to(self._model.device))
            each = torch.nn.functional.normalize(output.pooler_output, dim=-1)
            mean = each.view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._texts[class_name] = torch.nn.functional.normalize(mean, dim=-1)
        return self._texts[class_name]


def load(folder: str, device: torch.device) -> ClipColors:
    """Load a folder with model, tokenizer and preprocessor. Raises FatalRewardError, naming it."""
    path = Path(folder)
    model = load_pretrained(transformers.CLIPModel, path)
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path, local_files_only=True)
        processor = transformers.CLIPImageProcessorPil.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the library raises many kinds for a bad folder
        raise FatalRewardError(
            f"clip {folder}: tokenizer or preprocessor cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    label = (
        f"clip {model.config.vision_config.hidden_size} wide, patch {model.config.vision_config.patch_size}, "
        f"weights sha256 {weights_sha256(path)}"
    )
    logger.info("geneval colours: %s, from %s", label, folder)
    return ClipColors(model.to(device), tokenizer, processor, label)


def object_crop(question: ColorQuestion) -> Image.Image | None:
    """The box of the object, everything outside its mask in BACKGROUND; None when nothing of it is in the picture.

    Box edges are rounded to whole pixels. A part of the box outside the picture is cut off, where upstream
    would fill it with black; boxes drawn from masks have none. Without a mask the whole box counts.

    Raises ValueError for a mask of another size than the image's.
    """
    image, mask = question.image.convert("RGB"), question.detection.mask
    if mask is not None and tuple(mask.shape) != (image.height, image.width):
        raise ValueError(f"mask of {tuple(mask.shape)} on an image of {(image.height, image.width)}")
    x1, y1, x2, y2 = (round(value) for value in question.detection.box)
    box = (max(x1, 0), max(y1, 0), min(x2, image.width), min(y2, image.height))
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    crop = image.crop(box)
    if mask is not None:
        inside = mask[box[1] : box[3], box[0] : box[2]]
        if not inside.any():
            return None
        crop = Image.composite(crop, Image.new("RGB", crop.size, BACKGROUND), Image.fromarray(inside))
    return _middle(crop)


def _middle(crop: Image.Image) -> Image.Image:
    limit = LONGEST * min(crop.size)
    cut_x, cut_y = max(crop.width - limit, 0) // 2, max(crop.height - limit, 0) // 2
    return crop.crop((cut_x, cut_y, crop.width - cut_x, crop.height - cut_y))
