"""Backend transformers: a tiny random Mask2Former against mmdet's own scoring of the same logits."""

import json

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

from rewards.base import FatalRewardError
from rewards.geneval.detection import SCORE_THRESHOLD
from rewards.geneval.hub import HubMask2Former, load
from rewards.geneval.instances import instances, mask_boxes, resized_shape
from rewards.geneval.names import CLASS_NAMES
from rewards.geneval.settings import DetectorSettings, folder_problems
from tests.fakes.tiny_detectors import noise, save_tiny_hub

CPU = torch.device("cpu")
SCALE = (100, 72)
MEAN, STD = np.float32([123.675, 116.28, 103.53]), np.float32([58.395, 57.12, 57.375])


@pytest.fixture(scope="module")
def detector(tiny_hub) -> HubMask2Former:
    return load(DetectorSettings("transformers", str(tiny_hub), scale=SCALE), CPU)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [
        noise(width, height, k) for k, (width, height) in enumerate([(64, 64), (90, 60), (64, 64), (60, 90)])
    ]


def ranked(rows) -> list[tuple]:
    """(score, class name, box, mask), surest first."""
    return sorted(rows, key=lambda row: row[:3], reverse=True)


def flat(detections) -> list[tuple]:
    return ranked([(d.score, name, d.box, d.mask) for name, found in detections.items() for d in found])


def mmdet_rows(tiny_hub, picture) -> list[tuple]:
    """The picture through OpenCV, the model, and mmdet's fusion head, which removes padding and scores."""
    from rewards.geneval.mmcv_ops import prepare_ops

    prepare_ops()
    from mmdet.models.seg_heads import MaskFormerFusionHead
    from mmdet.structures import DetDataSample
    from mmengine.config import ConfigDict

    model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(tiny_hub).eval()
    height, width = resized_shape(picture.height, picture.width, SCALE)
    pixels = cv2.resize(np.asarray(picture, np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    tensor = torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1)
    padded = F.pad(tensor, (0, -width % 32, 0, -height % 32))
    with torch.inference_mode():
        output = model(pixel_values=padded[None])
    masks = F.interpolate(
        output.masks_queries_logits, size=padded.shape[1:], mode="bilinear", align_corners=False
    )
    head = MaskFormerFusionHead(80, 0, ConfigDict(panoptic_on=False, instance_on=True, max_per_image=100))
    sample = DetDataSample(
        metainfo={"img_shape": (height, width), "ori_shape": (picture.height, picture.width)}
    )
    found = head.predict(output.class_queries_logits, masks, [sample], rescale=True)[0]["ins_results"]
    return ranked(
        (float(s), CLASS_NAMES[int(label)], tuple(b.tolist()), m.numpy())
        for s, label, b, m in zip(found.scores, found.labels, found.bboxes, found.masks, strict=True)
    )


@pytest.fixture
def every_mask(monkeypatch):
    """Masks also of objects that cannot count."""
    monkeypatch.setattr("rewards.geneval.instances.SCORE_THRESHOLD", -1.0)


def test_only_masks_that_can_count_leave_the_device(detector, pictures, monkeypatch):
    """What the rules read is the same with and without the others, and so are all scores and boxes."""
    lean = flat(detector.detect(pictures[:1])[0])
    monkeypatch.setattr("rewards.geneval.instances.SCORE_THRESHOLD", -1.0)
    whole = flat(detector.detect(pictures[:1])[0])
    assert [row[:3] for row in lean] == [row[:3] for row in whole]
    assert {mask is None for score, *_, mask in lean if score <= SCORE_THRESHOLD} == {True}
    for (score, *_, mask), (*_, expected) in zip(lean, whole, strict=True):
        assert score <= SCORE_THRESHOLD or (mask == expected).all()


def test_boxes_scores_and_masks_are_mmdet_s(detector, tiny_hub, pictures, every_mask):
    for picture, found in zip(pictures, detector.detect(pictures), strict=True):
        rows, expected = flat(found), mmdet_rows(tiny_hub, picture)
        assert len(rows) == 100 and rows[0][0] > 0.3
        for ours, theirs in zip(rows, expected, strict=True):
            assert ours[:2] == (pytest.approx(theirs[0], abs=1e-4), theirs[1])
            assert np.allclose(ours[2], theirs[2], atol=1)
            assert (ours[3] != theirs[3]).mean() < 2e-3


def test_instances_by_hand():
    """Two queries, two classes: probability times the mean mask probability where it exceeds .5."""
    class_logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    mask_logits = torch.tensor([[[1.0, -1.0], [2.0, -1.0]], [[-1.0, -1.0], [-1.0, -1.0]]])
    found = instances(class_logits, mask_logits)
    exp = np.exp(class_logits.numpy())
    shares = exp / exp.sum(1, keepdims=True)
    inside = np.mean([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(-2))])
    rows = sorted(zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist(), strict=True))[::-1]
    assert rows[0] == (pytest.approx(shares[0, 0] * inside, abs=1e-5), 0, [0, 0, 1, 2])
    assert rows[1] == (pytest.approx(shares[0, 1] * inside, abs=1e-5), 1, [0, 0, 1, 2])
    assert rows[2][0] == rows[3][0] == 0.0 and rows[2][2] == [0, 0, 0, 0]


def test_mask_boxes_are_the_bounds():
    masks = torch.rand(40, 9, 7, generator=torch.Generator().manual_seed(0)) > 0.97
    for mask, box in zip(masks, mask_boxes(masks), strict=True):
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
        assert box.tolist() == [float(value) for value in bounds]


def test_a_batch_of_four_is_four_singles(detector, pictures, every_mask):
    for picture, found in zip(pictures, detector.detect(pictures), strict=True):
        for ours, single in zip(flat(found), flat(detector.detect([picture])[0]), strict=True):
            assert ours[1:3] == single[1:3] and ours[0] == pytest.approx(single[0], abs=1e-5)
            assert ours[3].shape == (picture.height, picture.width) and ours[3].dtype == bool


def test_the_network_sees_red_first(detector):
    """Fails when the channels are swapped on the way."""
    seen = []
    backbone = detector._model.model.pixel_level_module.encoder
    handle = backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    detector.detect([Image.new("RGB", (64, 64), (200, 100, 50))])
    handle.remove()
    expected = (np.float32([200, 100, 50]) - MEAN) / STD
    assert seen[0][:, :72, :72].mean((1, 2)).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_the_scoring_is_named_apart_from_mmdet_s(detector):
    assert detector.scoring == "transformers-100x72"
    assert "with mmdet's scores" in detector.label


def test_unfit_folders_are_refused(tiny_hub, tmp_path):
    assert folder_problems("checkpoint", None) == [
        "checkpoint is missing; give the path of a folder with config.json and *.safetensors"
    ]
    assert "is not a folder here" in folder_problems("checkpoint", str(tmp_path / "none"))[0]
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    found = folder_problems("checkpoint", str(tmp_path / "pickled"))
    assert len(found) == 3 and "pickled weights (.bin) are not read" in found[2]

    other = save_tiny_hub(tmp_path / "other", classes=133)
    with pytest.raises(FatalRewardError, match="133 classes"):
        load(DetectorSettings("transformers", str(other)), CPU)

    config = json.loads((tiny_hub / "config.json").read_text())
    broken = save_tiny_hub(tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps(config | {"decoder_layers": 4}))
    with pytest.raises(FatalRewardError, match="keys missing or of another shape: model.transformer_module"):
        load(DetectorSettings("transformers", str(broken)), CPU)
    names = {str(k): name for k, name in enumerate(["bicycle", "person", *CLASS_NAMES[2:]])}
    (broken / "config.json").write_text(json.dumps(config | {"id2label": names}))
    with pytest.raises(FatalRewardError, match="not COCO's order: class 0 is called 'bicycle'"):
        load(DetectorSettings("transformers", str(broken)), CPU)
    (broken / "config.json").write_text("{}")
    with pytest.raises(FatalRewardError, match="not a Mask2FormerForUniversalSegmentation"):
        load(DetectorSettings("transformers", str(broken)), CPU)
