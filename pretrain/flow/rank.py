"""One training rank: model, DeepSpeed engine, its share of the data. `run.py` tells all ranks what to do.

Every rank's loss is the mean over its samples of the step; DeepSpeed averages over ranks; shares are equal and every
random draw belongs to a place of the global batch, so the gradient is that of the global batch whatever the number of
ranks, the micro-batch size and the ZeRO stage.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.cluster.process_group import join_process_group
from core.training.schedule import Optimization, lr_factor
from pretrain.data.batch import PretrainBatch
from pretrain.data.prefetch import Prefetch
from pretrain.data.stream import BatchStream
from pretrain.flow.average import ShardedAverage
from pretrain.flow.conditions import Encoders, load_tokenizer, micro_batches
from pretrain.flow.config import FlowRecipe
from pretrain.flow.costs import sample_flops
from pretrain.flow.draws import draw_noise
from pretrain.flow.engine import make_engine
from pretrain.flow.export import export_model
from pretrain.flow.loss import add_noise, velocity_error
from pretrain.flow.model import FlowModel, load_model, prepare_blocks, set_trained
from pretrain.flow.previews import draw_previews
from pretrain.flow.sizes import measure

ENGINE = "engine"


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step as a rank saw it.

    losses, sigmas: of its samples; gradient_norm: global, before clipping; flops: operations of its share.
    """

    step: int
    task: str
    losses: tuple[float, ...]
    sigmas: tuple[float, ...]
    gradient_norm: float
    learning_rate: float
    flops: float


class FlowRank:
    """Owns model, optimizer and average. `setup` must be called on all ranks before anything else."""

    def __init__(self, recipe: FlowRecipe, rank: int):
        torch.set_num_threads(recipe.resources.threads)
        self.recipe, self.rank = recipe, rank
        self.device = recipe.resources.device
        self.step = 0
        self.batches: Prefetch | None = None

    def setup(self, address: str, port: int) -> None:
        """Join the other ranks, then build data, encoders, model and engine. Raises after the collective time limit."""
        resources = self.recipe.resources
        if not torch.distributed.is_initialized():
            join_process_group(
                rank=self.rank,
                world_size=resources.ranks,
                address=address,
                port=port,
                device=self.device,
                timeout_s=resources.collective_timeout_s,
            )
        shown = self.recipe.loads_vlm and self.recipe.references.vlm
        self.stream = BatchStream(
            replace(self.recipe.data, reference_images=shown),
            seed=self.recipe.seed,
            batch_size=self.recipe.batch_size,
            rank=self.rank,
            world_size=resources.ranks,
            tokenizer=load_tokenizer(self.recipe),
        )
        self.sizes = measure(self.recipe)
        self.encoders = Encoders(self.recipe)
        self.model: FlowModel = load_model(self.recipe)
        set_trained(self.model, self.recipe)
        prepare_blocks(self.model, self.recipe)
        self.engine = make_engine(self.model, self.recipe)
        self.average = ShardedAverage(self.engine, self.recipe.optimization.ema_decay)

    def sees(self, folder: str) -> bool:
        """Whether this node has the run's folder: every rank writes its part of a checkpoint there."""
        return Path(folder).is_dir()

    def data_lines(self) -> list[str]:
        """What the batches are made of."""
        return self.stream.lines()

    # ---- training -----------------------------------------------------------------------------------------

    def advance(self, to_step: int) -> list[StepFigures]:
        """Train up to, and without, 0-based step `to_step`."""
        if self.batches is None:
            self.batches = self.stream.batches(self.step)
        self.engine.train()
        return [self._train_step(next(self.batches)) for _ in range(to_step - self.step)]

    def _train_step(self, batch: PretrainBatch) -> StepFigures:
        factor = self._set_learning_rate()
        parts = list(micro_batches(batch, self.recipe.micro_batch_size))
        losses: list[float] = []
        sigmas: list[float] = []
        for part in parts:
            loss, sigma = self.losses(part)
            mean = loss.mean()
            if not math.isfinite(mean.item()):
                raise FloatingPointError(
                    f"loss is {mean.item()} at step {self.step} ({part.task}, {part.height} x {part.width} px): lower "
                    "optimization.lr, or look at the data of this step"
                )
            self.engine.backward(mean / len(parts))
            losses += loss.detach().tolist()
            sigmas += sigma.tolist()
        self.engine.step()
        self.average.update()
        self.step += 1
        flops = sample_flops(
            self.recipe, self.sizes, height=batch.height, width=batch.width, edit=batch.task == "edit"
        )
        return StepFigures(
            self.step,
            batch.task,
            tuple(losses),
            tuple(sigmas),
            float(self.engine.get_global_grad_norm() or 0.0),
            self.recipe.optimization.lr * factor,
            flops * len(losses),
        )

    def losses(self, batch: PretrainBatch) -> tuple[Tensor, Tensor]:
        """Squared error of the velocity and noise level of each sample, [B] and [B]."""
        encoded = self.encoders.encode(batch)
        sigma, noise = draw_noise(
            self.recipe.seed,
            self.step,
            batch.indices.tolist(),
            encoded.clean.shape[1:],
            self.recipe.timestep_shift,
        )
        sigma, noise = sigma.to(self.device), noise.to(self.device)
        noisy = add_noise(encoded.clean, noise, sigma)
        predicted = self.engine(noisy, 1000 * sigma, encoded.prompt, encoded.references)
        return velocity_error(predicted, encoded.clean, noise), sigma

    def _set_learning_rate(self) -> float:
        settings = self.recipe.optimization
        shape = Optimization(
            warmup_fraction=settings.warmup_fraction, final_lr_fraction=settings.final_lr_fraction
        )
        factor = lr_factor(self.step, self.recipe.steps, shape)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        return factor

    # ---- files --------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """This rank's part of a checkpoint: trained weights and optimizer in DeepSpeed's layout, and its average."""
        self.engine.save_checkpoint(folder, tag=ENGINE, exclude_frozen_parameters=True, save_latest=False)
        path = Path(folder)
        save_file(self.average.state(), path / f"average_rank_{self.rank:03d}.safetensors")
        if self.rank == 0:
            (path / "average.json").write_text(json.dumps({"updates": self.average.updates}))

    def load(self, folder: str, step: int) -> None:
        """Continue from what `save` wrote; the caller has verified the folder's hashes."""
        loaded, _ = self.engine.load_checkpoint(folder, tag=ENGINE, load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        path = Path(folder)
        updates = json.loads((path / "average.json").read_text())["updates"]
        self.average.load(load_file(path / f"average_rank_{self.rank:03d}.safetensors"), updates)
        if self.batches is not None:
            self.batches.close()
        self.step, self.batches = step, None

    def previews(self, folder: str) -> list[str]:
        """Draw the grids of this step by the averaged weights; names of the files. A collective."""
        average = self.average.whole(self.model, keep=self.rank == 0)
        if self.rank != 0:
            return []
        return draw_previews(self.recipe, self.stream, self.encoders, average, Path(folder), step=self.step)

    def export(self, folder: str) -> None:
        """Write the averaged weights in the released layout. A collective."""
        average = self.average.whole(self.model, keep=self.rank == 0)
        if self.rank == 0:
            export_model(self.recipe, average, Path(folder))
