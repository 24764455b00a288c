"""Your first own reward: one function for text-to-image, one class for editing. Copy this file and change it.

In a recipe, a reward is named by file and function (or class), with whatever parameters it takes:

    rewards:
      - name: recipes/examples/custom_reward.py:colourfulness
        weight: 0.5
        params: {full_score_at: 80}

Both are called by keyword with four lists that have one entry per image of the group:

    images      PIL images in RGB, the samples to be scored
    prompts     the prompt, or the edit instruction, of each
    references  a list of images: the one that was to be edited, then any others of the prompt; empty for text-to-image
                with a keyword `sources` beside these you also get their paths or data URIs, a list for each sample
    metadata    the `metadata` of the prompt's line in the prompt file, a dict

and return one number per image: higher is better, and 0 to 1 is the range the built-in rewards use. Where you
cannot score an image, return None: the sample is then left out of training. Never make up a number for it.
You may also just let an exception rise: the call is repeated, and its samples are left out if that fails too.

Try it before a run, without a GPU: `python -m rl.train YOUR_RECIPE --dry-run`.
"""

import numpy as np
from PIL import Image

from rewards.base import RewardOutput


def colourfulness(*, images, prompts, references, metadata, full_score_at=109.0):
    """How colourful each image is, from 0 (grey) to 1.

    The measure of Hasler and Süsstrunk, "Measuring colourfulness in natural images" (2003), which calls 109
    "extremely colourful"; that or more scores 1. `full_score_at` comes from `params` in the recipe.
    """
    scores = []
    for image in images:
        red, green, blue = np.moveaxis(np.asarray(image, dtype=np.float64), -1, 0)
        red_green = red - green
        yellow_blue = (red + green) / 2 - blue
        spread = np.hypot(red_green.std(), yellow_blue.std())
        mean = np.hypot(red_green.mean(), yellow_blue.mean())
        scores.append(min((spread + 0.3 * mean) / full_score_at, 1.0))
    return scores


class Restraint:
    """Whether an edit left most of the picture alone, from 0 to 1. Use it with a reward for the edit itself.

    A class suits a reward that prepares something once, such as a model: parameters of the recipe go to the
    constructor, and the instance lives as long as the reward worker.
    """

    def __init__(self, tolerance=24):
        """`tolerance`: largest change of a pixel, in levels of 0 to 255, that still counts as left alone."""
        self.tolerance = tolerance

    def score(self, *, images, prompts, references, metadata):
        """The share of pixels left alone. Also logs, as a component, how far the others moved (0 to 1)."""
        kept, moved = [], []
        for image, pictures in zip(images, references, strict=True):
            if not pictures:  # nothing to compare with: not scored, which is not the same as 0
                kept.append(None)
                moved.append(None)
                continue
            before = np.asarray(pictures[0].resize(image.size, Image.Resampling.BICUBIC), dtype=np.int16)
            after = np.asarray(image, dtype=np.int16)
            change = np.abs(after - before).max(axis=-1)
            touched = change > self.tolerance
            kept.append(1.0 - touched.mean())
            moved.append(change[touched].mean() / 255 if touched.any() else 0.0)
        return RewardOutput(scores=kept, components={"moved": moved})
