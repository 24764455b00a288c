"""Colour rules: the crop CLIP sees, a real CLIP that knows red from blue, and the rule without CLIP."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from rewards.geneval.clip_colors import ClipColors, load, object_crop
from rewards.geneval.detection import NO_COLOR, ColorQuestion, Detection
from rewards.geneval.lab_colors import SRGB, LabColors, linear_to_lab, srgb_to_linear
from rewards.geneval.names import COLORS
from rewards.geneval.rewards import GenEval, judge_images
from tests.fakes.tiny_detectors import noise
from worlds.shapes.scenes.render import render
from worlds.shapes.scenes.world import Scene, Shape
from worlds.shapes.scoring.backend import Detector

RED_AND_BLUE = Scene("grey", (Shape("circle", "red", 8.0, 8.0), Shape("square", "blue", 23.0, 20.0)))
RECORD = {
    "tag": "color_attr",
    "include": [
        {"class": "circle", "count": 1, "color": "red"},
        {"class": "square", "count": 1, "color": "blue"},
    ],
}


@pytest.fixture(scope="module")
def clip(tiny_clip) -> ClipColors:
    return load(str(tiny_clip), torch.device("cpu"))


def disc(rgb, *, size: int = 20) -> ColorQuestion:
    """A disc in the middle of a picture of noise; only the mask says where it is."""
    rows, columns = np.indices((2 * size, 2 * size))
    mask = (rows - size + 0.5) ** 2 + (columns - size + 0.5) ** 2 < (size / 2) ** 2
    pixels = np.array(noise(2 * size, 2 * size))
    pixels[mask] = rgb
    box = (size / 2, size / 2, 1.5 * size, 1.5 * size)
    return ColorQuestion(Image.fromarray(pixels), "circle", Detection(box, 1.0, mask))


def test_the_crop_shows_the_object_on_grey():
    question = disc((10, 200, 30))
    crop = np.array(object_crop(question))
    inside = question.detection.mask[10:30, 10:30]
    assert crop.shape == (20, 20, 3)
    assert (crop[inside] == (10, 200, 30)).all()
    assert (crop[~inside] == 0x99).all()
    whole = Detection((9.6, 10.4, 30.4, 29.6), 1.0)
    crop = np.array(object_crop(ColorQuestion(question.image, "circle", whole)))
    assert (crop == np.array(question.image)[10:30, 10:30]).all(), "without a mask the whole box counts"


def test_boxes_outside_slivers_and_wrong_masks():
    image = Image.new("RGB", (40, 30), "red")
    outside = Detection((-10.0, 20.0, 8.0, 50.0), 1.0)
    assert object_crop(ColorQuestion(image, "cat", outside)).size == (8, 10)
    sliver = Detection((0.0, 3.0, 40.0, 4.0), 1.0)
    assert object_crop(ColorQuestion(image, "cat", sliver)).size == (8, 1)
    with pytest.raises(ValueError, match=r"mask of \(40, 30\) on an image of \(30, 40\)"):
        object_crop(ColorQuestion(image, "cat", Detection((0, 0, 9, 9), 1.0, np.ones((40, 30), bool))))


EMPTY = [
    Detection((5.0, 5.0, 5.3, 9.0), 1.0),
    Detection((50.0, 5.0, 60.0, 9.0), 1.0),
    Detection((9.0, 9.0, 3.0, 3.0), 1.0),
    Detection((0.0, 0.0, 0.0, 0.0), 1.0, np.zeros((30, 40), bool)),
    Detection((0.0, 0.0, 9.0, 9.0), 1.0, np.zeros((30, 40), bool)),
]


def test_an_empty_crop_has_no_colour_and_does_not_disturb_the_others(clip):
    image = Image.new("RGB", (40, 30), "red")
    empty = [ColorQuestion(image, "circle", detection) for detection in EMPTY]
    assert clip.classify(empty) == LabColors().classify(empty) == [NO_COLOR] * len(EMPTY)
    mixed = [empty[0], disc(SRGB["blue"]), empty[3], disc(SRGB["red"])]
    assert clip.classify(mixed) == ["", "blue", "", "red"]
    assert LabColors().classify(mixed) == ["", "blue", "", "red"]
    assert clip.classify([]) == []


@pytest.mark.parametrize("rule", ["clip", "lab"])
def test_all_ten_colours_are_told_apart(clip, rule):
    colors = clip if rule == "clip" else LabColors()
    assert colors.classify([disc(SRGB[color]) for color in COLORS]) == list(COLORS)


@pytest.mark.parametrize("rule", ["clip", "lab"])
def test_the_colour_path_is_right_way_round(tiny_clip, rule):
    """From pixels to verdict: a red circle and a blue square are right, and wrong with channels exchanged.

    Fails when the channels are swapped anywhere between the picture and the colour rule.
    """
    reward = GenEval(
        credit="correct", detector="shapes", colors=rule, clip=str(tiny_clip) if rule == "clip" else None
    )
    picture = render(RED_AND_BLUE)
    images = [Image.fromarray(picture), Image.fromarray(np.ascontiguousarray(picture[:, :, ::-1]))]
    output = reward.score(images=images, prompts=[""] * 2, references=[[]] * 2, metadata=[RECORD] * 2)
    assert output.scores == [1.0, 0.0]


def test_clip_sees_rgb(clip):
    """Pixel values at CLIP's door: red paint is high in the first channel, low in the last."""
    seen = []
    handle = clip._model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    image = Image.new("RGB", (40, 30), (200, 100, 50))
    clip.classify([ColorQuestion(image, "circle", Detection((0, 0, 40, 30), 1.0))])
    handle.remove()
    mean, std = (np.array(v) for v in (clip._processor.image_mean, clip._processor.image_std))
    expected = (np.array([200, 100, 50]) / 255 - mean) / std
    assert seen[0].mean((0, 2, 3)).tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_one_clip_call_for_a_batch_and_cached_texts(tiny_clip):
    colors = load(str(tiny_clip), torch.device("cpu"))
    calls = {"image": [], "text": []}
    for name, tower in (("image", colors._model.vision_model), ("text", colors._model.text_model)):
        tower.register_forward_hook(
            lambda _, args, output, name=name: calls[name].append(len(output.pooler_output))
        )
    images = [Image.fromarray(render(RED_AND_BLUE))] * 5
    for _ in range(2):
        results = judge_images(images, [RECORD] * 5, Detector(), colors)
        assert [result.correct for result in results] == [True] * 5
    assert calls == {"image": [10, 10], "text": [30, 30]}, "ten colours, three templates, two classes, once"
    plain = {"tag": "single_object", "include": [{"class": "circle", "count": 1}]}
    judge_images(images, [plain] * 5, Detector(), colors)
    assert len(calls["image"]) == 2, "nothing asks for a colour"


def test_zero_shot_as_geneval_has_it(tiny_clip, clip):
    """By hand: three prompts a colour, normalised means, nearest in angle; and the batch changes nothing."""
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_clip)
    questions = [disc(np.random.default_rng(seed).integers(0, 256, 3)) for seed in range(12)]
    unit = torch.nn.functional.normalize
    with torch.inference_mode():
        texts = []
        for color in COLORS:
            prompts = [
                f"a photo of a {color} circle",
                f"a photo of a {color}-colored circle",
                f"a photo of a {color} object",
            ]
            tokens = tokenizer(prompts, padding=True, return_tensors="pt")
            texts.append(unit(unit(model.get_text_features(**tokens).pooler_output, dim=1).mean(0), dim=0))
        expected = []
        for question in questions:
            crop = object_crop(question).resize((32, 32), Image.Resampling.BICUBIC)
            pixels = (np.array(crop) / 255 - clip._processor.image_mean) / clip._processor.image_std
            tensor = torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None]
            image = model.get_image_features(pixel_values=tensor).pooler_output[0]
            expected.append(COLORS[int((torch.stack(texts) @ image).argmax())])
    assert clip.classify(questions) == expected
    assert len(set(expected)) > 3


def test_lab_of_known_colours():
    """Reference values of CIE L*a*b* (D65) for sRGB red, green, blue, white and black."""
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0]])
    expected = [
        [53.24, 80.09, 67.20],
        [87.73, -86.18, 83.18],
        [32.30, 79.19, -107.86],
        [100, 0, 0],
        [0, 0, 0],
    ]
    assert np.allclose(linear_to_lab(srgb_to_linear(colors)), expected, atol=0.05)


def test_another_clip_is_another_metric(clip):
    assert clip.scoring == "clip-64-8" and "sha256" in clip.label
    assert LabColors().scoring == "lab"
