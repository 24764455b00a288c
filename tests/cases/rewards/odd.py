"""Rewards as people write them: wrong and odd ones, each an attribute of this file."""

import sys
import time

import numpy as np


def swapped(prompts, images):
    return [0.5] * len(images)


def swapped_kw(prompts, images, **kw):
    return [float(np.asarray(i).mean() / 255) for i in images]


def positional(images, prompts, references, metadata, /):
    return [0.5] * len(images)


def kw_only_other(*, image, prompt, **kw):
    return [0.5] * len(image)


class Swaps:
    def __call__(self, prompts, images, references, metadata):
        return [float(len(p)) for p in prompts]


class Swaps2:
    def __call__(self, pictures, texts, **kw):
        return [0.5] * len(pictures)


def string(**kw):
    return ["0.5"] * len(kw["images"])


def numpy0d(**kw):
    return np.float32(0.5)


def column(**kw):
    return np.full((len(kw["images"]), 1), 0.5)


def gen(**kw):
    return (0.5 for _ in kw["images"])


def dct(**kw):
    return {i: 0.5 for i, _ in enumerate(kw["images"])}


def boolean(**kw):
    return [True] * len(kw["images"])


def nan(**kw):
    return [float("nan")] * len(kw["images"])


def huge(**kw):
    return [1e308] * len(kw["images"])


def bigint(**kw):
    return [10**400] * len(kw["images"])


def cplx(**kw):
    return [1j] * len(kw["images"])


def none(**kw):
    return None


def exits(**kw):
    sys.exit(3)


def kbd(**kw):
    raise KeyboardInterrupt


def mutates(**kw):
    for i in kw["images"]:
        i.paste((0, 0, 0), (0, 0, 8, 8))
    kw["metadata"][0].clear()
    kw["images"].pop()
    return [0.5, 0.5]


def prints(**kw):
    print("x" * 10)
    return [0.5] * len(kw["images"])


def tuplescore(**kw):
    return ([0.5] * len(kw["images"]), {"a": 1})


def stopiter(**kw):
    raise StopIteration


def recursion(**kw):
    return recursion(**kw)


def slow(**kw):
    time.sleep(30)
    return [0.5] * len(kw["images"])


async def asyn(**kw):
    return [0.5] * len(kw["images"])


async def asyngen(**kw):
    yield 0.5


def decimal(**kw):
    from decimal import Decimal

    return [Decimal("0.5")] * len(kw["images"])


def fraction(**kw):
    from fractions import Fraction

    return [Fraction(1, 2)] * len(kw["images"])
