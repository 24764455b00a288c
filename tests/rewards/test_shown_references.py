"""The references that a reward gets: the very pixels that the model is shown, and where they came from."""

import asyncio
import hashlib

import numpy as np
import pytest
from PIL import Image

from core.failures import DataFailure
from core.pictures import read_picture
from core.prompts import Prompt
from models.sizes import MAX_ASPECT, geometry
from rewards.base import RewardSet, RewardSpec
from rewards.checks import check_rewards
from rewards.worker import RewardScorer
from rollout import encoder
from tests.cases.conftest import CASES
from tests.fakes.tiny_models import make_tiny_folder

SIZES = [(32, 32), (48, 96), (64, 32)]
"""Drawn, height and width in px."""


def digests(pictures):
    return [(one.size, hashlib.sha256(one.tobytes()).hexdigest()) for one in pictures]


def to_picture(pixels):
    """3 H W in [-1, 1] as the VAE gets it."""
    return Image.fromarray(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def seeing_scorer(reward_file, **settings):
    """A scorer whose reward hands over what it is given as references, and the list that it fills."""
    path = reward_file("""
        seen = []
        def look(*, images, prompts, references, metadata):
            seen.extend(references)
            return [1.0] * len(images)
    """)
    rewards = RewardSet("edit", "edit", [RewardSpec(f"{path}:look")], **settings)
    scorer = RewardScorer([rewards])
    (loaded,) = scorer._rewards["edit"]
    return scorer, loaded.function.__globals__["seen"]


def readable_cases():
    found = []
    for file in sorted([*(CASES / "references").iterdir(), *(CASES / "pictures").iterdir()]):
        try:
            picture = read_picture(file)
        except ValueError:
            continue
        if max(picture.size) <= MAX_ASPECT * min(picture.size):
            found.append(str(file))
    return found


@pytest.mark.parametrize("pixels", [None, 7000])
def test_a_reward_gets_the_very_pixels_that_the_model_is_shown(reward_file, monkeypatch, tmp_path, pixels):
    """Of every readable case, at several sizes, alone and behind another one."""
    encoded = []
    monkeypatch.setattr(encoder, "encode_images", lambda _, picture: encoded.append(picture[0]) or picture)
    make_tiny_folder(tmp_path / "model")
    model = encoder.Encoder(
        encoder.EncoderSpec(
            str(tmp_path / "model"), "float32", "cpu", 32, 32, 16, 2**20, 1, reference_pixels=pixels
        )
    )
    multiple = geometry(tmp_path / "model").multiple
    scorer, seen = seeing_scorer(reward_file, reference_multiple=multiple, reference_pixels=pixels)
    files = readable_cases()
    assert len(files) > 15
    for number, (file, other) in enumerate(zip(files, files[1:] + files[:1], strict=True)):
        drawn = SIZES[number % len(SIZES)]
        for references in ((file,), (other, file), (file, other)):
            encoded.clear()
            seen.clear()
            prompt = Prompt(0, "edit", "p", references)
            model.encode_one(prompt, drawn)
            asyncio.run(scorer.score(0, "edit", [prompt], np.zeros((1, *drawn, 3), np.uint8)))
            (given,) = seen
            assert given[0].size == drawn[::-1] and len(given) == len(references)
            assert digests(given) == digests(map(to_picture, encoded)), (references, drawn)
            assert sum(one.width * one.height for one in given) <= (pixels or 2 * drawn[0] * drawn[1])


def test_a_square_of_the_drawn_size_is_not_touched(reward_file, tmp_path):
    rng = np.random.default_rng(0)
    square = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    square.save(tmp_path / "a.png")
    prompt = Prompt(0, "edit", "p", (str(tmp_path / "a.png"),))
    scorer, seen = seeing_scorer(reward_file)
    asyncio.run(scorer.score(0, "edit", [prompt] * 2, np.zeros((2, 32, 32, 3), np.uint8)))
    assert [digests(given) for given in seen] == [digests([square])] * 2


def test_references_stay_as_they_are_where_the_set_says_so(reward_file, tmp_path):
    Image.new("RGB", (50, 20)).save(tmp_path / "a.png")
    prompt = Prompt(0, "edit", "p", (str(tmp_path / "a.png"),))
    for as_given, size in ((True, (50, 20)), (False, (32, 48))):
        scorer, seen = seeing_scorer(reward_file, references_as_given=as_given)
        asyncio.run(scorer.score(0, "edit", [prompt], np.zeros((1, 48, 32, 3), np.uint8)))
        assert [one.size for one in seen.pop()] == [size]


def test_references_beyond_their_pixels_are_the_prompts_failure(reward_file, tmp_path):
    Image.new("RGB", (50, 20)).save(tmp_path / "a.png")
    prompt = Prompt(0, "edit", "p", (str(tmp_path / "a.png"),) * 2)
    scorer, _ = seeing_scorer(reward_file, reference_pixels=32 * 48)
    with pytest.raises(DataFailure, match="2 references in 1536 pixels"):
        asyncio.run(scorer.score(0, "edit", [prompt], np.zeros((1, 48, 32, 3), np.uint8)))


@pytest.mark.parametrize("kind", ["function", "class"])
def test_a_reward_that_asks_for_them_gets_the_addresses_of_references(reward_file, tmp_path, kind):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    code = f"""
        def look(*, images, prompts, references, metadata, sources):
            assert all(len(r) == len(s) for r, s in zip(references, sources, strict=True))
            return [float(sum(one == {str(tmp_path / "a.png")!r} for one in row)) for row in sources]
        class Look:
            score = staticmethod(look)
    """
    path = reward_file(code)
    name = f"{path}:{'look' if kind == 'function' else 'Look'}"
    rewards = RewardSet("edit", "edit", [RewardSpec(name)])
    prompts = [Prompt(0, "edit", "p", (str(tmp_path / "a.png"),) * n) for n in (1, 2)]
    assert check_rewards(rewards, prompts=prompts) == []
    found = asyncio.run(RewardScorer([rewards]).score(0, "edit", prompts, np.zeros((2, 4, 6, 3), np.uint8)))
    assert found.rewards == [1.0, 2.0]
