"""What a recipe says about the detector, and what can be found wrong with it without loading anything."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

EMBEDDED = {"shapes": "worlds.shapes.scoring.backend"}
"""Backends of embedded worlds, which need no weights: the module of each."""
BACKENDS = ("mask2former", "transformers", *EMBEDDED)
DEVICES = ("auto", "cpu", "cuda")

PUBLISHED_SCALE = (1333, 800)
"""Longest and shortest edge in px to which the published config resizes, keeping the aspect ratio."""

MMDET_VERSION = "3.3"
MMDET_MODULES = ("mmdet", "mmcv", "mmengine", "cv2", "pycocotools")
INSTALL_MMDET = "pip install 'unipic-rl[geneval]'"


@dataclass(frozen=True)
class DetectorSettings:
    """One detector. Rewards with equal settings share one loaded model in a process.

    backend: `mask2former` (mmdet; GenEval's own), `transformers` (a hub folder) or `shapes`.
    checkpoint: file (mask2former) or folder (transformers) with the weights.
    config: mmdet config for mask2former; None is the published Swin-S config that mmdet brings. Configs are
        Python files and are run, so give only your own.
    device: `auto` is CUDA where torch sees one. batch_size: most images in one forward pass.
    scale: (longest, shortest) edge in px for resizing, in place of the config's own. Any other than
        `PUBLISHED_SCALE` is another metric, which the names of all components then say.
    trust_checkpoint: allow a file that cannot be read safely to run its code.
    """

    backend: str = "mask2former"
    checkpoint: str | None = None
    config: str | None = None
    device: str = "auto"
    batch_size: int = 16
    scale: tuple[int, ...] = PUBLISHED_SCALE
    trust_checkpoint: bool = False

    def problems(self) -> list[str]:
        """Every wrong value, as a sentence that names the key and the remedy."""
        if self.backend not in BACKENDS:
            return [f"detector is {self.backend!r}; choose one of {', '.join(BACKENDS)}"]
        found = []
        if self.device not in DEVICES:
            found.append(f"device is {self.device!r}; choose one of {', '.join(DEVICES)}")
        if self.batch_size < 1:
            found.append(f"batch_size is {self.batch_size}; give 1 or more")
        if len(self.scale) != 2 or not self.scale[0] >= self.scale[1] >= 32:
            found.append(
                f"scale is {list(self.scale)}; give the longest and the shortest edge in px, at least 32"
            )
        if self.backend == "mask2former":
            return found + self._mask2former_problems()
        if self.backend == "transformers":
            return found + folder_problems("checkpoint", self.checkpoint)
        unused = [
            key
            for key, value in (("checkpoint", self.checkpoint), ("config", self.config))
            if value is not None
        ]
        return found + [f"{key} is set, which detector 'shapes' does not use; leave it out" for key in unused]

    @property
    def scoring_suffix(self) -> str:
        """What tells this from the published scoring, for the names of components; "" when nothing does."""
        config = "" if self.config is None else f"-{Path(self.config).stem}"
        scale = "" if self.scale == PUBLISHED_SCALE else f"-{self.scale[0]}x{self.scale[1]}"
        return config + scale

    def _mask2former_problems(self) -> list[str]:
        problems = mmdet_problems()
        if self.checkpoint is None:
            problems.append(
                "checkpoint is missing; give the path of mmdet's mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco weights"
            )
        elif not Path(self.checkpoint).is_file():
            problems.append(
                f"checkpoint {self.checkpoint!r} is not a file here; give a path that every node has"
            )
        if self.config is not None and not Path(self.config).is_file():
            problems.append(
                f"config {self.config!r} is not a file here; give an mmdet config, or leave it out"
            )
        return problems


def folder_problems(key: str, folder: str | None) -> list[str]:
    """What keeps a hub-layout folder from being loaded: it is not named, not there, or lacks safe weights."""
    if folder is None:
        return [f"{key} is missing; give the path of a folder with config.json and *.safetensors"]
    if not Path(folder).is_dir():
        return [f"{key} {folder!r} is not a folder here; give a path that every node has"]
    problems = [
        f"{key} {folder!r} has no {name}; download the whole folder"
        for name in ("config.json", "preprocessor_config.json")
        if not (Path(folder) / name).is_file()
    ]
    if not any(Path(folder).glob("*.safetensors")):
        problems.append(f"{key} {folder!r} has no *.safetensors; pickled weights (.bin) are not read")
    return problems


def mmdet_problems() -> list[str]:
    """Whether what the mask2former backend imports is installed, and mmdet of the tested version."""
    missing = [name for name in MMDET_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        return [
            f"detector 'mask2former' needs {', '.join(missing)}, which is not installed: {INSTALL_MMDET} "
            "(or use detector: transformers, which needs none of it)"
        ]
    version = metadata.version("mmdet")
    if not version.startswith(f"{MMDET_VERSION}."):
        return [f"mmdet is {version}; this backend is written for {MMDET_VERSION}: {INSTALL_MMDET}"]
    return []
