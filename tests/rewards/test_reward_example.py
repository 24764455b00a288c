"""The worked example of the documentation does what it says."""

import math
import statistics
from pathlib import Path

import pytest
from PIL import Image

from recipes.examples.custom_reward import Restraint, colourfulness
from rewards.base import RewardSet, RewardSpec
from rewards.checks import check_rewards

EXAMPLE = Path(__file__).parents[2] / "recipes/examples/custom_reward.py"
RED, GREY = (255, 0, 0), (90, 90, 90)


def call(reward, images, references):
    count = len(images)
    return reward(images=images, prompts=["p"] * count, references=references, metadata=[{}] * count)


def test_colourfulness_equals_its_definition_and_stays_within_0_and_1():
    image = Image.new("RGB", (2, 1))
    image.putdata([(100, 60, 20), (30, 80, 60)])
    rg, yb = [40, -50], [60, -5]  # R - G and (R + G) / 2 - B
    spread = math.hypot(statistics.pstdev(rg), statistics.pstdev(yb))
    expected = (spread + 0.3 * math.hypot(statistics.mean(rg), statistics.mean(yb))) / 109
    vivid = Image.new("RGB", (2, 1))
    vivid.putdata([(255, 0, 0), (0, 255, 0)])
    scores = call(colourfulness, [Image.new("RGB", (4, 4), GREY), image, vivid], [[]] * 3)
    assert scores == pytest.approx([0.0, expected, 1.0])


def test_restraint_is_the_share_of_pixels_left_alone():
    before = Image.new("RGB", (4, 4), GREY)
    half = before.copy()
    half.paste(RED, (0, 0, 2, 4))
    output = call(Restraint().score, [before, half, half], [[before], [before, half], []])
    assert output.scores == [1.0, 0.5, None]
    assert output.components["moved"] == [0.0, pytest.approx(165 / 255), None]


@pytest.mark.parametrize(("attribute", "task"), [("colourfulness", "t2i"), ("Restraint", "edit")])
def test_the_example_passes_the_check_that_a_run_makes(attribute, task):
    assert check_rewards(RewardSet("example", task, [RewardSpec(f"{EXAMPLE}:{attribute}")])) == []
