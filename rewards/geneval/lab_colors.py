"""Colour rule `lab`: the named colour nearest to the object's mean colour. Ours; needs no network.

For runs without CLIP, whose own preferences a policy can learn to please. It sees no texture and knows no
objects (an orange is orange, a "white" bear in shadow is grey and so perhaps brown), so its figures are not
GenEval's, and the names of components say `lab`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rewards.geneval.detection import NO_COLOR, ColorQuestion
from rewards.geneval.names import COLORS

SRGB = {
    "red": (220, 30, 30),
    "orange": (245, 135, 30),
    "yellow": (245, 220, 50),
    "green": (50, 150, 60),
    "blue": (40, 90, 200),
    "purple": (130, 50, 160),
    "pink": (245, 150, 185),
    "brown": (120, 75, 40),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
"""What each name looks like, sRGB 0 to 255. Our choice."""

# sRGB to XYZ (IEC 61966-2-1), rows divided by the white point of D65, then CIE 1976 L*a*b*.
_TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_TO_XYZ /= _TO_XYZ.sum(axis=1, keepdims=True)


class LabColors:
    """Behind the `ColorClassifier` interface: distance is Euclidean in CIE L*a*b* (D65), that is CIE76."""

    scoring = "lab"
    label = "nearest of ten sRGB colours to the mean of the masked pixels, CIE L*a*b* (D65), CIE76"

    def classify(self, questions: Sequence[ColorQuestion]) -> list[str]:
        """See `ColorClassifier.classify`. An object without pixels gets `NO_COLOR`."""
        return [self._nearest(question) for question in questions]

    def _nearest(self, question: ColorQuestion) -> str:
        pixels = _object_pixels(question)
        if not len(pixels):
            return NO_COLOR
        mean = linear_to_lab(srgb_to_linear(pixels).mean(axis=0))
        names = linear_to_lab(srgb_to_linear(np.array([SRGB[color] for color in COLORS])))
        return COLORS[int(np.linalg.norm(names - mean, axis=1).argmin())]


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """sRGB values [..., 3] in 0 to 255 as linear light in 0 to 1."""
    share = values / 255
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def linear_to_lab(values: np.ndarray) -> np.ndarray:
    """Linear sRGB [..., 3] as CIE L*a*b* under D65."""
    xyz = values @ _TO_XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _object_pixels(question: ColorQuestion) -> np.ndarray:
    """The object's pixels [n, 3]: those of its mask, or of its whole box when it has none."""
    pixels = np.asarray(question.image.convert("RGB"))
    if question.detection.mask is not None:
        return pixels[question.detection.mask]
    x1, y1, x2, y2 = (max(round(value), 0) for value in question.detection.box)
    return pixels[y1:y2, x1:x2].reshape(-1, 3)
