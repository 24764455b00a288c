"""Every group of a run with what each sample earned, and pictures of each step's best and worst group.

`groups.jsonl` has one line per group and step. `groups/step_NNNNNN_<group>.png` with its index beside it (the form
of `rl/record/gallery.py`) shows the samples of the two groups at the ends, at the steps at which the gallery is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.prompts import Prompt, load_references
from rl.record.gallery import GallerySample
from rl.workers.requests import RolloutRequest, RolloutResult
from rollout.shapes import Shape

GROUPS_FILE = "groups.jsonl"
GROUPS_FOLDER = "groups"


@dataclass(frozen=True)
class GroupRecord:
    """One group of G samples at global step `step`; `group` is unique within its stage.

    `rewards` [G] are the weighted sums, `components` the values [G] per reward `label` and per part `label/part`,
    before weights; None means not scored. `dropped` groups taught nothing, for the stated `reason`.
    """

    step: int
    stage: str
    group: int
    prompt: str
    rewards: list[float | None]
    components: dict[str, list[float | None]]
    dropped: bool = False
    reason: str = ""

    @property
    def mean(self) -> float | None:
        """Mean reward of the scored samples; None when there is none."""
        scored = [reward for reward in self.rewards if reward is not None]
        return sum(scored) / len(scored) if scored else None


def group_record(result: RolloutResult, step: int, stage: str) -> GroupRecord:
    """What a group came to; one that could not be sampled has no reward at all."""
    request, score = result.request, result.score
    head = (step, stage, request.id, request.prompts[0].prompt)
    if score is None:
        return GroupRecord(*head, [None] * len(request.seeds), {}, True, result.failure)
    return GroupRecord(*head, score.rewards, score.components, score.dropped, score.reason)


def best_and_worst(records: Sequence[GroupRecord]) -> list[GroupRecord]:
    """The groups of highest and lowest mean reward, ties by group number; one or none where there are no two."""
    ranked = sorted(
        (record for record in records if record.mean is not None),
        key=lambda record: (-(record.mean or 0.0), record.group),
    )
    return [ranked[0], ranked[-1]] if len(ranked) > 1 else ranked


def picture_path(folder: Path, step: int, group: int) -> Path:
    """Where the pictures of a group are, below the run's folder, if they were kept."""
    return folder / GROUPS_FOLDER / f"step_{step:06d}_{group}.png"


def group_samples(
    group: RolloutRequest, images: NDArray[np.uint8], rewards: Sequence[float | None]
) -> list[GallerySample]:
    """All samples of a group for the gallery; `images` [G, H, W, 3]. The first carries the references of all."""
    (prompt,) = group.prompts
    references: list[NDArray[np.uint8] | None] = [None] * len(images)
    references[0] = reference_sheet(prompt, group.shape)
    return [
        GallerySample(prompt.prompt, seed, image, reward, reference)
        for seed, image, reward, reference in zip(group.seeds, images, rewards, references, strict=True)
    ]


def reference_sheet(prompt: Prompt, shape: Shape | None) -> NDArray[np.uint8] | None:
    """A prompt's references as the policy sees them (without a shape as large as they are), side by side; None where it
    has none."""
    pictures = load_references(prompt)
    if shape is not None:
        sizes = [(width, height) for height, width in shape.references]
        pictures = [p.resize(size, Image.Resampling.LANCZOS) for p, size in zip(pictures, sizes, strict=True)]
    if not pictures:
        return None
    sheet = Image.new("RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width
    return np.asarray(sheet)
