"""Pictures of the longer setting's proof: held-out prompts drawn by the base and by a trained run, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from bench.accept.evidence import IMAGES, ROOT
from models.components import load_transformer
from rl.record.gallery import GallerySample, before_after_sheet
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.training.evaluate import TASKS, Base, Question, heldout_questions, score

BASE = ROOT / "recipes" / "shapes" / "base"
GUIDANCE, STEPS = 1.0, 10
PROMPTS = 8
SIDE = 2
GAP = 2


def draw_pictures(run: Path, seed: int) -> None:
    """`docs/images/learning_{t2i,edit}.png`: the first prompts of `seed`, sampled as in evaluation, noise for noise."""
    torch.set_num_threads(1)
    base = Base.load(BASE)
    trained = Base(load_transformer(run, dtype=torch.float32), base.vae, base.scheduler, base.encoder)
    for task in TASKS:
        models = {"base": base, "after both stages": trained}
        draw_sheet(task, heldout_questions(task, PROMPTS, seed), models, IMAGES / f"learning_{task}.png")


def draw_sheet(task: str, questions: list[Question], models: Mapping[str, Base], path: Path) -> None:
    """A row for each question and a column for each model, under its title."""
    before_after_sheet({title: blocks(task, questions, model) for title, model in models.items()}, path)


def blocks(task: str, questions: list[Question], model: Base) -> list[GallerySample]:
    """A square of samples for each question, under their mean reward."""
    count = SIDE * SIDE
    repeated = [question for question in questions for _ in range(count)]
    pictures = model.draw(repeated, GUIDANCE, STEPS)
    rewards = score(task, repeated, pictures).reshape(len(questions), count)
    found = []
    for number, question in enumerate(questions):
        samples = pictures[number * count : (number + 1) * count]
        seen = [scene for scene in (question.source, question.shown) if scene is not None]
        reference = np.concatenate(render_batch(seen)) if seen else None
        found.append(
            GallerySample(question.prompt, 0, tiled(samples), float(rewards[number].mean()), reference)
        )
    return found


def tiled(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures [SIDE * SIDE, H, W, 3] as one, with white lines between them."""
    _, height, width, _ = pictures.shape
    whole = np.full((SIDE * (height + GAP) - GAP, SIDE * (width + GAP) - GAP, 3), 255, dtype=np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // SIDE * (height + GAP), index % SIDE * (width + GAP)
        whole[top : top + height, left : left + width] = picture
    return whole
