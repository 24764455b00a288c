"""Backend mask2former: real mmdet classes and the published Swin-S config, random weights, small scale."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rewards.base import FatalRewardError
from rewards.geneval.checkpoint import load_strictly, read_checkpoint
from rewards.geneval.instances import same_shape_batches
from rewards.geneval.mask2former import Mask2Former, build_model, describe, load
from rewards.geneval.mmcv_ops import has_compiled_ops, prepare_ops
from rewards.geneval.names import CLASS_NAMES, class_order_problems
from rewards.geneval.settings import DetectorSettings
from tests.fakes.tiny_detectors import SMALL, noise

CPU = torch.device("cpu")
OBJECT_NAMES = Path(__file__).parents[2] / "data" / "geneval" / "object_names.txt"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def detector(swin_s) -> Mask2Former:
    return load(DetectorSettings(checkpoint=str(swin_s), scale=SMALL), CPU)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Two sizes that share a padded size, one that is padded by itself, one of them twice."""
    sizes = [(64, 64), (96, 64), (64, 64), (100, 66)]
    return [noise(width, height, seed) for seed, (width, height) in enumerate(sizes)]


@pytest.fixture(scope="module")
def together(detector, pictures):
    return detector.detect(pictures)


def flat(detections) -> list[tuple]:
    """(score, class name, box, mask), surest first."""
    rows = [(d.score, name, d.box, d.mask) for name, found in detections.items() for d in found]
    return sorted(rows, key=lambda row: row[:3], reverse=True)


def assert_same(one, other, *, tolerance: float) -> None:
    for first, second in zip(flat(one), flat(other), strict=True):
        assert first[:2] == (pytest.approx(second[0], abs=tolerance), second[1])
        assert np.allclose(first[2], second[2], atol=tolerance)
        assert (first[3] != second[3]).mean() <= tolerance


def test_class_names_are_geneval_s_in_coco_s_order():
    assert list(CLASS_NAMES) == OBJECT_NAMES.read_text().splitlines()
    prepare_ops()
    from mmdet.evaluation import coco_classes

    own = coco_classes()
    differing = {CLASS_NAMES[k] for k in range(80) if own[k].replace("_", " ") != CLASS_NAMES[k]}
    assert differing == {"computer mouse", "tv remote", "computer keyboard"}
    assert class_order_problems(dict(enumerate(name.replace("_", " ") for name in own))) == []
    assert class_order_problems({0: "LABEL_0", 1: "cat"}) == [
        "class 1 is called 'cat', which is COCO's class 15"
    ]


def test_a_batch_of_four_is_four_singles(detector, pictures, together):
    assert all(sum(map(len, found.values())) == 100 for found in together)
    assert all(flat(found)[0][0] > 0.5 for found in together)
    for picture, found in zip(pictures, together, strict=True):
        assert_same(detector.detect([picture])[0], found, tolerance=1e-4)


def test_scores_boxes_and_masks_are_those_of_mmdet_s_own_inference(detector, pictures, together):
    """`inference_detector` goes image by image from a file's array; it is told the same scale."""
    from mmdet.apis import inference_detector
    from mmdet.utils import get_test_pipeline_cfg

    model, config, _ = build_model(DetectorSettings())
    assert "http" not in str(config.model), "nothing is left that could be downloaded"
    model.load_state_dict(detector._model.state_dict())
    for step in get_test_pipeline_cfg(config):
        if step.type == "Resize":
            step.scale = SMALL
    model.cfg = config
    for picture, found in zip(pictures, together, strict=True):
        result = inference_detector(model, np.asarray(picture)[:, :, ::-1].copy()).pred_instances
        expected = {}
        for k in range(len(result)):
            name = CLASS_NAMES[int(result.labels[k])]
            detection = type(found[next(iter(found))][0])(
                tuple(result.bboxes[k].tolist()), float(result.scores[k]), result.masks[k].numpy()
            )
            expected.setdefault(name, []).append(detection)
        assert_same(expected, found, tolerance=1e-4)


def test_masks_have_the_image_s_size_and_boxes_are_their_bounds(pictures, together):
    for picture, found in zip(pictures, together, strict=True):
        for _, _, box, mask in flat(found):
            assert mask.dtype == bool and mask.shape == (picture.height, picture.width)
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            if len(rows):
                assert box == (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)


def test_only_images_of_one_padded_size_share_a_pass(detector, pictures):
    passes = []
    handle = detector._model.backbone.register_forward_pre_hook(lambda _, args: passes.append(args[0].shape))
    detector.detect(pictures)
    handle.remove()
    assert sorted(tuple(shape) for shape in passes) == [(2, 3, 128, 128), (2, 3, 128, 160)]
    shapes = [(64, 64), (64, 60), (32, 64), (61, 64), (65, 33)]
    assert same_shape_batches(shapes, 32, 3) == [[0, 1, 3], [2], [4]]
    assert same_shape_batches([(64, 64)] * 5, 32, 2) == [[0, 1], [2, 3], [4]]


def test_the_network_sees_red_first(detector):
    """mmdet takes BGR and turns it round itself; fails when the channels are swapped on the way."""
    seen = []
    handle = detector._model.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    detector.detect([Image.new("RGB", (64, 64), (200, 100, 50))])
    handle.remove()
    expected = [(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375]
    assert torch.allclose(seen[0].mean((1, 2)), torch.tensor(expected), atol=1e-4)


def test_the_label_says_what_scored(detector, swin_s):
    assert detector.scoring == "mmdet-160x128"
    assert hashlib.sha256(swin_s.read_bytes()).hexdigest() in detector.label
    assert "(not the published ones)" in detector.label
    assert "(the published ones)" in describe(DetectorSettings(), CPU, "pytorch", "c9d0c4f2" + 56 * "0")
    assert "mmdet 3.3.0" in detector.label and "swin-s" in detector.label
    assert DetectorSettings().scoring_suffix == ""
    assert DetectorSettings(config="x/own.py", scale=(400, 300)).scoring_suffix == "-own-400x300"


@pytest.mark.parametrize("suffix", ["plain.pth", "mmengine.pth", "weights.safetensors"])
def test_checkpoints_load_back_safely(swin_s, tmp_path, suffix):
    weights, _ = read_checkpoint(swin_s, trust=False)
    path = tmp_path / suffix
    if suffix.startswith("weights"):
        save_file(weights, path)
    elif suffix.startswith("plain"):
        torch.save(weights, path)
    else:
        torch.save(mmengine_checkpoint(weights), path)
    found, meta = read_checkpoint(path, trust=False)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in weights)
    assert suffix != "mmengine.pth" or meta["dataset_meta"]["classes"][0] == "person"


def mmengine_checkpoint(weights) -> dict:
    """What mmengine's CheckpointHook writes, its training log with NumPy arrays included."""
    from mmengine.logging import HistoryBuffer

    return {
        "meta": {"cfg": "model = dict()", "epoch": np.int64(50), "dataset_meta": {"classes": CLASS_NAMES}},
        "state_dict": weights,
        "message_hub": {"log_scalars": {"loss": HistoryBuffer([0.5, 0.25], [1, 1])}, "runtime_info": {}},
    }


class Malicious:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_a_malicious_pickle_is_refused_and_runs_only_when_trusted(tmp_path):
    path, proof = tmp_path / "evil.pth", tmp_path / "proof"
    torch.save({"state_dict": {}, "meta": Malicious(os.mkdir, str(proof))}, path)
    with pytest.raises(FatalRewardError, match=r"evil.pth.*cannot be read safely.*mkdir.*trust_checkpoint"):
        read_checkpoint(path, trust=False)
    assert not proof.exists()
    assert read_checkpoint(path, trust=True)[0] == {}
    assert proof.exists()
    torch.save({"state_dict": {}, "meta": Malicious(getattr, torch.nn.Parameter, "mro")}, path)
    with pytest.raises(FatalRewardError, match="asks for the attribute 'mro'"):
        read_checkpoint(path, trust=False)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(FatalRewardError, match="evil.pth"):
        read_checkpoint(path, trust=False)
    torch.save({"state_dict": {"a": 1}}, path)
    with pytest.raises(FatalRewardError, match="no state_dict of tensors"):
        read_checkpoint(path, trust=False)


def test_keys_are_checked_one_for_one():
    model = torch.nn.Linear(2, 3)
    weights = {"weight": torch.zeros(3, 4), "more": torch.zeros(1)}
    with pytest.raises(FatalRewardError) as caught:
        load_strictly(model, weights, Path("w.pth"))
    for part in (
        "w.pth does not fit",
        "1 keys missing: bias",
        "1 keys unexpected: more",
        "weight [3, 4] for [3, 2]",
    ):
        assert part in str(caught.value)
    with pytest.raises(FatalRewardError, match="keys of mmdet 2.x"):
        load_strictly(model, {"layers.0.attentions.0.weight": torch.zeros(1)}, Path("w.pth"))


def test_other_classes_and_broken_configs_are_refused(detector, swin_s, tmp_path):
    path = tmp_path / "renamed.pth"
    content = torch.load(swin_s, weights_only=True)
    content["meta"]["dataset_meta"] = {"classes": ["bicycle", "person", *CLASS_NAMES[2:]]}
    torch.save(content, path)
    with pytest.raises(FatalRewardError, match="class 0 is called 'bicycle', which is COCO's class 1"):
        load(DetectorSettings(checkpoint=str(path)), CPU)
    from mmdet import __path__ as places

    panoptic = "mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py"
    config = next(Path(places[0]).rglob(panoptic))
    settings = DetectorSettings(checkpoint=str(swin_s), config=str(config))
    with pytest.raises(FatalRewardError, match="does not fit the model"):
        load(settings, CPU)
    model, own, _ = build_model(settings)
    with pytest.raises(FatalRewardError, match="133 classes, of which 80 are objects"):
        Mask2Former(model, own, settings, "")
    config = tmp_path / "broken.py"
    config.write_text("model = dict(type='NoSuchDetector')\n")
    with pytest.raises(FatalRewardError, match="broken.py.*NoSuchDetector"):
        build_model(DetectorSettings(config=str(config)))


def test_without_compiled_operators_pytorch_is_forced_on_cuda_too(detector):
    assert not has_compiled_ops()
    from mmcv.ops import multi_scale_deform_attn

    multi_scale_deform_attn.IS_CUDA_AVAILABLE = True  # as mmcv sets it where torch sees a GPU
    assert prepare_ops() == "pytorch"
    assert multi_scale_deform_attn.IS_CUDA_AVAILABLE is False
    with pytest.raises(RuntimeError, match=r"mmcv\._ext\.nms: this operator needs a compiled mmcv"):
        sys.modules["mmcv._ext"].nms(1)


def test_a_compiled_mmcv_is_used_where_present(tmp_path):
    """The extension is played by a module of that name; mmcv's operators must ask it and no stand-in."""
    (tmp_path / "_ext.py").write_text("def __getattr__(name):\n    return lambda *a, **k: name\n")
    script = (
        "import mmcv\n"
        f"mmcv.__path__.append({str(tmp_path)!r})\n"
        "from rewards.geneval.mmcv_ops import prepare_ops\n"
        "print(prepare_ops())\n"
        "from mmcv.ops.multi_scale_deform_attn import ext_module\n"
        "print(ext_module.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["compiled", str(tmp_path / "_ext.py")]
