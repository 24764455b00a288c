"""Training batches from the shapes world: functions of (seed, step) over its training split."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from core.seeds import numpy_generator
from worlds.shapes.scenes.captions import sample_t2i
from worlds.shapes.scenes.edits import sample_edit
from worlds.shapes.scenes.inserts import InsertExample, sample_insert
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import Scene

# One stream of random numbers per use of a step.
_T2I, _EDIT, _INSERT = 101, 102, 103


@dataclass(frozen=True)
class T2IBatch:
    prompts: list[str]
    scenes: list[Scene]


@dataclass(frozen=True)
class EditBatch:
    prompts: list[str]
    sources: list[Scene]
    targets: list[Scene]


def t2i_batch(seed: int, step: int, count: int) -> T2IBatch:
    """Captions of the training split, each with a scene that shows it."""
    rng = numpy_generator(seed, step, _T2I)
    drawn = [sample_t2i(rng, "train") for _ in range(count)]
    return T2IBatch([record["prompt"] for record, _ in drawn], [scene for _, scene in drawn])


def edit_batch(seed: int, step: int, count: int) -> EditBatch:
    """Instructions on scenes of the training split, with source and target."""
    rng = numpy_generator(seed, step, _EDIT)
    drawn = [sample_edit(rng, "train") for _ in range(count)]
    return EditBatch([d.instruction for d in drawn], [d.source for d in drawn], [d.target for d in drawn])


def insert_batch(seed: int, step: int, count: int) -> list[InsertExample]:
    """Insertions into scenes of the training split."""
    rng = numpy_generator(seed, step, _INSERT)
    return [sample_insert(rng, "train") for _ in range(count)]


def scene_batch(seed: int, step: int, count: int) -> list[Scene]:
    """Scenes as both tasks show them, half of each."""
    half = count // 2
    return t2i_batch(seed, step, count - half).scenes + edit_batch(seed, step, half).sources


def to_tensor(scenes: list[Scene]) -> Tensor:
    """Pictures of the scenes, B 3 H W in [-1, 1]."""
    return normalise(render_batch(scenes))


def normalise(images: np.ndarray) -> Tensor:
    """uint8 B H W 3 -> float32 B 3 H W in [-1, 1]."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
