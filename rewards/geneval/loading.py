"""Loads detectors and colour rules, each once per process."""

from __future__ import annotations

import importlib
import threading
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

from rewards.base import FatalRewardError
from rewards.geneval.detection import ColorClassifier, Detector
from rewards.geneval.settings import EMBEDDED, DetectorSettings
from rewards.thread import RewardThread

if TYPE_CHECKING:
    import torch

COLOR_RULES = ("clip", "lab", "detector")

_turn = threading.Lock()  # `cache` alone would let two threads load the same model side by side


def load_detector(settings: DetectorSettings) -> Detector:
    """The detector of these settings, the same object for equal settings. Raises FatalRewardError."""
    with _turn:
        return _detector(settings)


def load_colors(rule: str, clip: str | None, device: str) -> ColorClassifier:
    """The colour rule; `detector` is that of the shapes world. Raises FatalRewardError."""
    with _turn:
        return _colors(rule, clip, device)


@cache
def thread_of(detector: str) -> RewardThread:
    """The thread of all rewards with this detector: none waits for another's pass while its own clock runs."""
    return RewardThread()


@cache
def _detector(settings: DetectorSettings) -> Detector:
    if settings.backend in EMBEDDED:
        detector: Detector = embedded(settings.backend).Detector()
        return detector
    if settings.backend == "transformers":
        from rewards.geneval import hub

        return hub.load(settings, torch_device(settings.device))
    from rewards.geneval import mask2former

    return mask2former.load(settings, torch_device(settings.device))


@cache
def _colors(rule: str, clip: str | None, device: str) -> ColorClassifier:
    if rule == "lab":
        from rewards.geneval.lab_colors import LabColors

        return LabColors()
    if rule == "detector":
        colors: ColorClassifier = embedded("shapes").Colors()
        return colors
    if clip is None:
        raise FatalRewardError("clip is missing; give the path of a CLIP ViT-L/14 folder, or set colors: lab")
    from rewards.geneval import clip_colors

    return clip_colors.load(clip, torch_device(device))


def embedded(backend: str) -> ModuleType:
    """The module of an embedded world's backend: `Detector`, `Colors` and `self_check_pictures`."""
    return importlib.import_module(EMBEDDED[backend])


def torch_device(name: str) -> torch.device:
    """`auto` is CUDA where torch sees one, else the CPU. Raises FatalRewardError for CUDA that is not there."""
    import torch

    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise FatalRewardError("device is 'cuda', and torch sees no GPU in this process; give the worker one")
    return torch.device("cuda" if there and name != "cpu" else "cpu")
