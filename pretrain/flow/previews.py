"""Grids that show how far the averaged weights are: fixed prompts of the data, each task a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

import recipes
from core.files import atomic_file
from core.pictures import contact_sheet
from models.components import load_scheduler
from models.conditioning import ConditioningBatch
from models.latents import decode_latents
from models.sampling import sample_latents, sigma_table
from pretrain.data.batch import PretrainBatch
from pretrain.data.stream import BatchStream
from pretrain.flow.conditions import Encoders, rows_of
from pretrain.flow.config import FlowRecipe
from pretrain.flow.export import averaged_model
from pretrain.flow.loss import draw_noise

_SEARCHED = 64
_MIN_SIDE = 96
"""Pixels of a picture's longer side at least; smaller ones are enlarged."""


@torch.no_grad()
def draw_previews(
    recipe: FlowRecipe,
    stream: BatchStream,
    encoders: Encoders,
    average: Mapping[str, Tensor],
    folder: Path,
    *,
    step: int,
) -> list[str]:
    """Write `step_NNNNNNN_<task>.png` and return the names; the model lives only as long as this call.

    Rows of text-to-image: drawn, and the data's own picture. Rows of editing: source, drawn, and the data's target.
    """
    model = averaged_model(recipe, average).to(encoders.device)
    scheduler = load_scheduler(recipes.resolve(recipe.model.path))
    settings, names = recipe.samples, []
    for batch, unprompted in fixed_batches(recipe, stream):
        encoded = encoders.encode(batch)
        _, noise = draw_noise(
            recipe.seed, 0, batch.indices.tolist(), encoded.clean.shape[1:], recipe.timestep_shift
        )
        negative = model.embed(encoders.prompt(unprompted)) if settings.guidance_scale > 1 else ()
        prompts = ConditioningBatch(
            *model.embed(encoded.prompt),
            () if encoded.references is None else (encoded.references,),
            *negative,
        )
        sigmas = sigma_table(scheduler, settings.steps)
        latents = sample_latents(
            model.transformer, sigmas, noise.to(encoders.device), prompts, settings.guidance_scale
        )
        rows = [latents, encoded.clean]
        if batch.task == "edit":
            source = encoders.latents(batch.reference_latents, batch.references)
            assert source is not None
            rows.insert(0, source)
        scale = max(1, _MIN_SIDE // max(batch.height, batch.width))
        sheet = contact_sheet([decode_latents(encoders.vae, row).numpy() for row in rows], scale)
        names.append(f"step_{step:07d}_{batch.task}.png")
        with atomic_file(folder / names[-1]) as file:
            sheet.save(file, "PNG")
    return names


def fixed_batches(recipe: FlowRecipe, stream: BatchStream) -> Iterator[tuple[PretrainBatch, PretrainBatch]]:
    """Some samples of each task from the end of the run, at its last resolution, and the same with empty prompts.

    They are the same whenever it is called. Samples whose prompt was dropped are left out.
    """
    shown: set[str] = set()
    first = max(0, recipe.steps - _SEARCHED)
    for step in range(first, first + _SEARCHED):
        batch = stream.batch(step)
        kept = [row for row, prompt in enumerate(batch.prompts) if prompt][: recipe.samples.count]
        if batch.task not in shown and kept:
            shown.add(batch.task)
            yield rows_of(batch, kept), rows_of(stream.batch(step, prompt_dropout=1.0), kept)
        if len(shown) == (2 if 0 < recipe.data.edit_share < 1 else 1):
            return
