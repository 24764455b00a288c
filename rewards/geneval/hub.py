"""Backend `transformers`: a Mask2Former in the hub's folder layout, scored as mmdet scores.

The same family of network trained by other people: its figures are not GenEval's, and its components in the log
begin with `transformers` where those of mmdet begin with `mmdet`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from rewards.base import FatalRewardError
from rewards.geneval.checkpoint import shown_keys, weights_sha256
from rewards.geneval.detection import Detections
from rewards.geneval.instances import (
    PAD_DIVISOR,
    Instances,
    detect_in_batches,
    instances,
    mask_logits_at_image_size,
    network_input,
    pad_batch,
    resized_shape,
    same_shape_batches,
)
from rewards.geneval.names import CLASS_NAMES, class_order_problems
from rewards.geneval.settings import DetectorSettings

logger = logging.getLogger(__name__)


class HubMask2Former:
    """A `Mask2FormerForUniversalSegmentation` behind the `Detector` interface."""

    def __init__(
        self,
        model: transformers.Mask2FormerForUniversalSegmentation,
        settings: DetectorSettings,
        label: str,
        *,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """mean, std: of R, G, B in 0 to 1. Raises FatalRewardError for other than COCO's 80 classes in order."""
        config = model.config
        if config.num_labels != len(CLASS_NAMES):
            raise FatalRewardError(
                f"detector 'transformers': the model has {config.num_labels} classes; GenEval needs COCO's "
                f"{len(CLASS_NAMES)} objects, as in the coco-instance models"
            )
        problems = class_order_problems({int(k): name for k, name in (config.id2label or {}).items()})
        if problems:
            raise FatalRewardError(f"detector 'transformers': not COCO's order: {'; '.join(problems[:3])}")
        self.scoring = f"transformers{settings.scoring_suffix}"
        self.label = label
        self._model, self._settings = model, settings
        self._mean, self._std = 255 * torch.tensor(mean), 255 * torch.tensor(std)
        self._lock = threading.Lock()

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """See `Detector.detect`. Images share a forward pass as in the mask2former backend."""
        scale = self._settings.scale
        shapes = [resized_shape(image.height, image.width, scale) for image in images]

        def forward(batch: list[int]) -> Iterator[Instances]:
            pixels = pad_batch([self.network_input(images[k]) for k in batch])
            padded = (pixels.shape[2], pixels.shape[3])
            outputs = self._model(pixel_values=pixels.to(self._model.device))
            for k, classes, logits in zip(
                batch, outputs.class_queries_logits, outputs.masks_queries_logits, strict=True
            ):
                size = (images[k].height, images[k].width)
                yield instances(classes, mask_logits_at_image_size(logits, padded, shapes[k], size))

        with self._lock:
            batches = same_shape_batches(shapes, PAD_DIVISOR, self._settings.batch_size)
            return detect_in_batches(forward, batches)

    def network_input(self, image: Image.Image) -> torch.Tensor:
        """What the network sees of an image before padding, [3, h, w]: red first, resized and normalised."""
        return network_input(image, self._settings.scale, self._mean, self._std)


def load(settings: DetectorSettings, device: torch.device) -> HubMask2Former:
    """Load the folder without a network. Raises FatalRewardError, naming folder and keys."""
    if settings.checkpoint is None:
        raise FatalRewardError("detector 'transformers': checkpoint is missing")
    folder = Path(settings.checkpoint)
    model = load_pretrained(transformers.Mask2FormerForUniversalSegmentation, folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    label = (
        f"transformers {transformers.__version__} Mask2Former with mmdet's scores, scale "
        f"{settings.scale[0]}x{settings.scale[1]}, torch {torch.__version__} on {device.type}, weights sha256 "
        f"{weights_sha256(folder)}"
    )
    logger.info("geneval detector: %s, checkpoint %s", label, folder)
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if mean is None or std is None:
        raise FatalRewardError(f"{folder / 'preprocessor_config.json'}: image_mean or image_std is missing")
    return HubMask2Former(model.to(device), settings, label, mean=mean, std=std)


def load_pretrained(kind: Any, folder: Path) -> Any:
    """A transformers model in eval mode and float32 from a local folder's safetensors.

    Raises FatalRewardError when the folder cannot be read, or leaves weights of the model unset, which the
    library itself would only warn of.
    """
    try:
        model, report = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises many kinds for a bad folder
        raise FatalRewardError(f"{folder}: not a {kind.__name__}: {type(error).__name__}: {error}") from error
    unset = set(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if unset:
        raise FatalRewardError(
            f"{folder} does not fit {kind.__name__}: {shown_keys(unset, 'missing or of another shape')}"
        )
    return model.eval()
