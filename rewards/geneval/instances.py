"""mmdet's way from an image to a network's input and from query logits to instances, in plain PyTorch.

For Mask2Former networks that do not come from mmdet. The transformers library's own post-processing scales all
masks to 384 x 384 px and scores them otherwise, so its figures cannot be compared with GenEval's. The first and the
last step, which images share a batch and detections from instances, serve mmdet's own network too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from rewards.geneval.detection import SCORE_THRESHOLD, Detection, Detections
from rewards.geneval.names import CLASS_NAMES

MAX_INSTANCES = 100
PAD_DIVISOR = 32


@dataclass(frozen=True)
class Instances:
    """N instances of one image: scores [N] in [0, 1], labels [N], boxes [N, 4] (x1 y1 x2 y2, px, x2 and y2
    exclusive), masks bool [N, H, W]."""

    scores: torch.Tensor
    labels: torch.Tensor
    boxes: torch.Tensor
    masks: torch.Tensor


def resized_shape(height: int, width: int, scale: Sequence[int]) -> tuple[int, int]:
    """Height and width that fit into scale (longest, shortest edge) with the aspect ratio kept."""
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def network_input(
    image: Image.Image, scale: Sequence[int], mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    """An RGB image as float [3, h, w]: resized (bilinear, not smoothed, as OpenCV does), then normalised.

    mean, std: [3] for R, G, B in 0 to 255. Not padded.
    """
    pixels = torch.from_numpy(np.array(image.convert("RGB"), np.float32)).permute(2, 0, 1)
    size = resized_shape(image.height, image.width, scale)
    resized = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
    return (resized - mean[:, None, None]) / std[:, None, None]


def pad_batch(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Stack [3, h, w] of one padded size, with zeros to the right and below up to multiples of PAD_DIVISOR."""
    return torch.stack(
        [F.pad(item, (0, -item.shape[2] % PAD_DIVISOR, 0, -item.shape[1] % PAD_DIVISOR)) for item in inputs]
    )


def mask_logits_at_image_size(
    logits: torch.Tensor, padded: tuple[int, int], resized: tuple[int, int], image: tuple[int, int]
) -> torch.Tensor:
    """Mask logits [Q, h, w] of the network at the image's own size [Q, H, W].

    In two bilinear steps: to the padded input's size, whose padding is cut off, then to the image's.
    """
    full = F.interpolate(logits[None], size=padded, mode="bilinear", align_corners=False)
    cut = full[:, :, : resized[0], : resized[1]]
    return F.interpolate(cut, size=image, mode="bilinear", align_corners=False)[0]


def instances(class_logits: torch.Tensor, mask_logits: torch.Tensor) -> Instances:
    """The MAX_INSTANCES likeliest (query, class) pairs as instances; a query may give several.

    class_logits: [Q, C + 1], the last class void. mask_logits: [Q, H, W]. An instance's score is its class's
    softmax probability times the mean probability of the pixels in its mask, those of probability above .5.
    """
    probabilities = class_logits.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    flat = probabilities.flatten()
    class_scores, chosen = flat.topk(min(MAX_INSTANCES, flat.numel()), sorted=False)
    logits = mask_logits[chosen // classes]
    masks = logits > 0
    areas = masks.flatten(1).sum(1)
    inside = (logits.sigmoid() * masks).flatten(1).sum(1) / (areas + 1e-6)
    return Instances(class_scores * inside, chosen % classes, mask_boxes(masks), masks)


def mask_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Bounds of bool masks [N, H, W] as float [N, 4]; zeros for an empty mask."""
    boxes = torch.zeros(len(masks), 4, device=masks.device)
    for low, high, filled in ((0, 2, masks.any(1)), (1, 3, masks.any(2))):
        length = filled.shape[1]
        first = filled.int().argmax(1)
        last = length - filled.int().flip(1).argmax(1)
        some = filled.any(1)
        boxes[:, low] = torch.where(some, first, 0).float()
        boxes[:, high] = torch.where(some, last, 0).float()
    return boxes


def same_shape_batches(shapes: Sequence[tuple[int, int]], divisor: int, batch_size: int) -> list[list[int]]:
    """Indices of `shapes` (height, width) in batches that pad to one size when each is padded by itself.

    divisor: a padded edge is the next multiple of it. The networks also look at padding, so more of it would change
    the scores.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (height, width) in enumerate(shapes):
        padded = (-(-height // divisor) * divisor, -(-width // divisor) * divisor)
        groups.setdefault(padded, []).append(index)
    return [
        group[start : start + batch_size]
        for group in groups.values()
        for start in range(0, len(group), batch_size)
    ]


def detect_in_batches(
    forward: Callable[[list[int]], Iterable[Instances]], batches: list[list[int]]
) -> list[Detections]:
    """What `forward` finds in each image of a batch of indices, in the order of the indices."""
    found: dict[int, Detections] = {}
    with torch.inference_mode():
        for batch in batches:
            found |= zip(batch, map(_detections, forward(batch)), strict=True)
    return [found[k] for k in sorted(found)]


def _detections(found: Instances) -> Detections:
    """The instances by GenEval's class names; masks leave the device only where the score can count."""
    scores = found.scores.tolist()
    sure = [k for k, score in enumerate(scores) if score > SCORE_THRESHOLD]
    masks = dict(zip(sure, found.masks[sure].cpu().numpy(), strict=True))
    result: Detections = {}
    rows = zip(found.labels.tolist(), found.boxes.tolist(), scores, strict=True)
    for k, (label, box, score) in enumerate(rows):
        result.setdefault(CLASS_NAMES[label], []).append(Detection(tuple(box), min(score, 1.0), masks.get(k)))
    return result
