"""One rank of flow-matching training: what its batches are, and their loss. `core/training/supervised.py` trains.

Every random draw belongs to a place of the global batch, so the gradient is that of the global batch whatever the
number of ranks, the micro-batch size and the ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from core.training.supervised import SupervisedRank, TrainerSettings
from pretrain.data.batch import PretrainBatch
from pretrain.data.stream import BatchStream
from pretrain.flow.conditions import Encoders, load_tokenizer, micro_batches
from pretrain.flow.config import FlowRecipe
from pretrain.flow.costs import sample_flops
from pretrain.flow.export import export_model
from pretrain.flow.loss import add_noise, draw_noise, velocity_error
from pretrain.flow.metrics import StepFigures
from pretrain.flow.model import FlowModel, load_model, prepare_blocks, set_trained
from pretrain.flow.previews import draw_previews
from pretrain.flow.sizes import measure


@dataclass(frozen=True)
class _Part:
    """A micro-batch: losses and noise levels of its samples, and its operations."""

    task: str
    losses: tuple[float, ...]
    sigmas: tuple[float, ...]
    flops: float


class FlowRank(SupervisedRank):
    """Also owns the frozen encoders and the data."""

    def __init__(self, recipe: FlowRecipe, rank: int):
        super().__init__(trainer_settings(recipe), rank)
        self.recipe = recipe

    def build(self) -> FlowModel:
        """The recipe's start with gradients where it is trained; opens the data, which is indexed if it is not yet."""
        shown = self.recipe.loads_vlm and self.recipe.references.vlm
        self.stream = BatchStream(
            replace(self.recipe.data, reference_images=shown),
            seed=self.recipe.seed,
            batch_size=self.recipe.batch_size,
            rank=self.rank,
            world_size=self.settings.ranks,
            tokenizer=load_tokenizer(self.recipe),
        )
        self.sizes = measure(self.recipe)
        self.encoders = Encoders(self.recipe)
        model = load_model(self.recipe)
        set_trained(model, self.recipe)
        prepare_blocks(model, self.recipe)
        return model

    def data_lines(self) -> list[str]:
        """What the batches are made of."""
        return self.stream.lines()

    def micro_batches(self, first_step: int) -> Iterator[PretrainBatch]:
        with self.stream.batches(first_step) as batches:
            for batch in batches:
                yield from micro_batches(batch, self.recipe.micro_batch_size)

    def micro_loss(self, batch: PretrainBatch) -> tuple[Tensor, _Part]:
        losses, sigmas = self.losses(batch)
        mean = losses.mean()
        if not math.isfinite(mean.item()):
            raise FloatingPointError(
                f"loss is {mean.item()} at step {self.step} ({batch.task}, {batch.height} x {batch.width} px): lower "
                "optimization.lr, or look at the data of this step"
            )
        edit, size = batch.task == "edit", {"height": batch.height, "width": batch.width}
        flops = len(losses) * sample_flops(self.recipe, self.sizes, edit=edit, **size)
        return mean, _Part(batch.task, tuple(losses.detach().tolist()), tuple(sigmas.tolist()), flops)

    def losses(self, batch: PretrainBatch) -> tuple[Tensor, Tensor]:
        """Squared error of the velocity and noise level of each sample, [B] and [B]."""
        encoded = self.encoders.encode(batch)
        shape, places = encoded.clean.shape[1:], batch.indices.tolist()
        sigma, noise = draw_noise(self.recipe.seed, self.step, places, shape, self.recipe.timestep_shift)
        sigma, noise = sigma.to(self.device), noise.to(self.device)
        noisy = add_noise(encoded.clean, noise, sigma)
        predicted = self.engine(noisy, 1000 * sigma, encoded.prompt, encoded.references)
        return velocity_error(predicted, encoded.clean, noise), sigma

    def figures(self, parts: Sequence[_Part], gradient_norm: float, learning_rate: float) -> StepFigures:
        return StepFigures(
            self.step,
            parts[0].task,
            tuple(loss for part in parts for loss in part.losses),
            tuple(sigma for part in parts for sigma in part.sigmas),
            gradient_norm,
            learning_rate,
            math.fsum(part.flops for part in parts),
        )

    def previews(self, folder: str) -> list[str]:
        """Draw the grids of this step by the averaged weights; names of the files. A collective."""
        average = self._averaged()
        if self.rank != 0:
            return []
        return draw_previews(self.recipe, self.stream, self.encoders, average, Path(folder), step=self.step)

    def export(self, folder: str) -> None:
        """Write the averaged weights in the released layout. A collective."""
        average = self._averaged()
        if self.rank == 0:
            export_model(self.recipe, average, Path(folder))

    def _averaged(self) -> dict[str, Tensor]:
        assert self.average is not None
        return self.average.whole(self.model, keep=self.rank == 0)


def trainer_settings(recipe: FlowRecipe) -> TrainerSettings:
    """The recipe as the trainer reads it."""
    resources = recipe.resources
    return TrainerSettings(
        ranks=resources.ranks,
        steps=recipe.steps,
        micro_batches=recipe.batch_size // (resources.ranks * recipe.micro_batch_size),
        micro_batch_size=recipe.micro_batch_size,
        optimization=recipe.optimization,
        dtype=recipe.model.dtype,
        resources=resources,
        zero_stage=recipe.deepspeed.zero_stage,
        offload=recipe.deepspeed.offload,
        ema_decay=recipe.optimization.ema_decay,
    )
