"""Backend `mask2former`: GenEval's detector, mmdet's Mask2Former with Swin-S, in real batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from rewards.base import FatalRewardError
from rewards.geneval.checkpoint import load_strictly, read_checkpoint, weights_sha256
from rewards.geneval.detection import Detections
from rewards.geneval.instances import Instances, detect_in_batches, same_shape_batches
from rewards.geneval.mmcv_ops import prepare_ops
from rewards.geneval.names import CLASS_NAMES, class_order_problems
from rewards.geneval.settings import DetectorSettings

logger = logging.getLogger(__name__)

PUBLISHED_CONFIG = "mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py"
PUBLISHED_SHA256 = "c9d0c4f2"
"""First digits of the sha256 of mmdet's weights for that config, which end the name of the published file."""


class Mask2Former:
    """mmdet's model behind the `Detector` interface.

    Scores are those of mmdet's instance head: class probability times the mean mask probability inside the mask.
    Boxes are the masks' bounds, (x1, y1, x2, y2) with x2, y2 exclusive, px of the image as given.
    """

    def __init__(self, model: Any, config: Any, settings: DetectorSettings, label: str) -> None:
        """model, config: from `build_model`, on its device and in eval mode. Raises FatalRewardError for a
        model of other than COCO's 80 object classes.
        """
        head = model.panoptic_head
        if head.num_things_classes != len(CLASS_NAMES) or head.num_classes != len(CLASS_NAMES):
            raise FatalRewardError(
                f"detector 'mask2former': the model has {head.num_classes} classes, of which "
                f"{head.num_things_classes} are objects; GenEval needs COCO's {len(CLASS_NAMES)} objects alone"
            )
        self.scoring = f"mmdet{settings.scoring_suffix}"
        self.label = label
        self._model, self._batch_size = model, settings.batch_size
        self._pipeline = _pipeline(config, settings.scale)
        self._divisor = model.data_preprocessor.pad_size_divisor
        self._lock = threading.Lock()

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """See `Detector.detect`. Only images of one padded size share a forward pass."""
        inputs = [self._pipeline({"img": _bgr(image)}) for image in images]
        shapes = [tuple(item["inputs"].shape[-2:]) for item in inputs]

        def forward(batch: list[int]) -> Iterator[Instances]:
            for sample in self._model.test_step(_collate([inputs[k] for k in batch])):
                seen = sample.pred_instances
                yield Instances(seen.scores, seen.labels, seen.bboxes, seen.masks)

        with self._lock:
            return detect_in_batches(forward, same_shape_batches(shapes, self._divisor, self._batch_size))

    def network_input(self, image: Image.Image) -> torch.Tensor:
        """What the network sees of an image, [3, h, w]: red first, resized, normalised and padded."""
        data = _collate([self._pipeline({"img": _bgr(image)})])
        return self._model.data_preprocessor(data, False)["inputs"][0]


def load(settings: DetectorSettings, device: torch.device) -> Mask2Former:
    """Build the model and fill it from the checkpoint. Raises FatalRewardError, naming file and keys."""
    if settings.checkpoint is None:
        raise FatalRewardError("detector 'mask2former': checkpoint is missing")
    path = Path(settings.checkpoint)
    _import_mmdet()
    weights, meta = read_checkpoint(path, trust=settings.trust_checkpoint)
    model, config, ops = build_model(settings)
    load_strictly(model, weights, path)
    names = (meta.get("dataset_meta") or {}).get("classes") or meta.get("CLASSES") or ()
    problems = class_order_problems(dict(enumerate(names)))
    if problems:
        raise FatalRewardError(f"checkpoint {path}: not COCO's order of classes: {'; '.join(problems[:3])}")
    label = describe(settings, device, ops, weights_sha256(path))
    logger.info("geneval detector: %s, checkpoint %s", label, path)
    return Mask2Former(model.to(device), config, settings, label)


def build_model(settings: DetectorSettings) -> tuple[Any, Any, str]:
    """The model with random weights on the CPU in eval mode, its config, and `compiled` or `pytorch` operators.

    Nothing is downloaded: the config's references to pretrained backbones are taken out. Raises
    FatalRewardError when mmdet cannot be imported or the config cannot be built.
    """
    mmdet, ops = _import_mmdet()
    path = Path(settings.config) if settings.config else _published_config(mmdet.__path__)
    from mmdet.registry import MODELS
    from mmengine.config import Config

    try:
        config = Config.fromfile(path)
        _strip_pretrained(config.model)
        model = MODELS.build(config.model)
    except Exception as error:  # a config is code and may raise anything
        raise FatalRewardError(f"config {path}: {type(error).__name__}: {error}") from error
    return model.eval(), config, ops


def _import_mmdet() -> tuple[ModuleType, str]:
    """mmdet with all its modules registered, and `compiled` or `pytorch` operators. Raises FatalRewardError."""
    try:
        ops = prepare_ops()
        import mmdet
        from mmdet.utils import register_all_modules
    except (ImportError, AssertionError) as error:  # mmdet asserts the versions of mmcv and mmengine
        raise FatalRewardError(f"detector 'mask2former': mmdet cannot be imported: {error}") from error
    register_all_modules(init_default_scope=True)
    return mmdet, ops


def describe(settings: DetectorSettings, device: torch.device, ops: str, sha256: str) -> str:
    """The detector's label: versions, config, scale, operators, device and the weights' hash."""
    import mmdet

    config = Path(settings.config or PUBLISHED_CONFIG).stem
    whose = "the published ones" if sha256.startswith(PUBLISHED_SHA256) else "not the published ones"
    return (
        f"mmdet {mmdet.__version__}, {config}, scale {settings.scale[0]}x{settings.scale[1]}, {ops} operators, "
        f"torch {torch.__version__} on {device.type}, weights sha256 {sha256} ({whose})"
    )


def _published_config(places: Iterable[str]) -> Path:
    """mmdet's wheel keeps its configs under `.mim`; a source checkout beside the package."""
    for place in places:
        for folder in (Path(place) / ".mim", Path(place).parent):
            path = folder / "configs" / "mask2former" / PUBLISHED_CONFIG
            if path.is_file():
                return path
    raise FatalRewardError(f"detector 'mask2former': this mmdet brings no {PUBLISHED_CONFIG}; set config")


def _strip_pretrained(node: Any) -> None:
    """Take every `init_cfg` and `pretrained` out of a nested config, in place."""
    if isinstance(node, dict):
        for key in ("init_cfg", "pretrained"):
            node.pop(key, None)
        for value in node.values():
            _strip_pretrained(value)
    elif isinstance(node, list | tuple):
        for value in node:
            _strip_pretrained(value)


def _pipeline(config: Any, scale: Sequence[int]) -> Any:
    """The config's test pipeline for arrays in memory: without files, without annotations, at `scale`."""
    from mmdet.utils import get_test_pipeline_cfg
    from mmengine.dataset import Compose

    steps = []
    for step in get_test_pipeline_cfg(config):
        kind = step["type"].rpartition(".")[2]
        if kind == "LoadImageFromFile":
            steps.append({"type": "mmdet.LoadImageFromNDArray", "to_float32": step.get("to_float32", False)})
        elif kind == "Resize":
            steps.append({**step, "type": "mmdet.Resize", "scale": tuple(scale)})
        elif kind == "PackDetInputs":
            meta_keys = ("ori_shape", "img_shape", "scale_factor")
            steps.append({"type": "mmdet.PackDetInputs", "meta_keys": meta_keys})
        elif kind != "LoadAnnotations":
            raise FatalRewardError(f"config: this backend does not know the test pipeline's step {kind!r}")
    return Compose(steps)


def _collate(inputs: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [item[key] for item in inputs] for key in ("inputs", "data_samples")}


def _bgr(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] in OpenCV's channel order, which mmdet reads and its preprocessor turns round."""
    return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
