"""One rank of training: its share of the labelled edits, and their loss. `core/training/supervised.py` trains."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import recipes
from core.training.optimization import trained_parameters
from core.training.supervised import SupervisedRank, TrainerSettings
from rewards.editreward.config import Recipe
from rewards.editreward.data.index import Entry, load_corpus, read_entry, whole_groups
from rewards.editreward.model import EditRewardModel, attach_lora, build_model
from rewards.editreward.processing import EditBatch, EditProcessor, Encoded
from rewards.editreward.settings import EditRewardSettings
from rewards.editreward.train.objective import edit_reward_loss
from rewards.editreward.train.order import DataOrder

TRAINABLE_FILE = "trainable.safetensors"


@dataclass(frozen=True)
class LabelledBatch:
    """batch; target [B, K] as z-scores; the group of each sample."""

    batch: EditBatch
    target: Tensor
    groups: tuple[str, ...]


class EncodedEntries(Dataset):
    """Decodes and encodes entries on demand, also in loader processes."""

    def __init__(self, entries: Sequence[Entry], processor: EditProcessor):
        self.entries, self.processor = entries, processor

    def __getitem__(self, i: int) -> tuple[Encoded, Entry]:
        sample = read_entry(self.entries[i])
        return self.processor.encode(sample.source, sample.result, sample.instruction), self.entries[i]

    def collate(self, rows: Sequence[tuple[Encoded, Entry]]) -> LabelledBatch:
        settings = self.processor.settings
        labels = torch.tensor([entry.scores for _, entry in rows], dtype=torch.float64)
        target = (labels - torch.tensor(settings.means)) / torch.tensor(settings.stds)
        encoded = self.processor.collate([encoded for encoded, _ in rows])
        return LabelledBatch(encoded, target.float(), tuple(entry.group for _, entry in rows))


class TrainRank(SupervisedRank):
    """Also owns this rank's data, of the training and of the validation split."""

    def __init__(self, recipe: Recipe, settings: EditRewardSettings, rank: int):
        super().__init__(trainer_settings(recipe), rank)
        self.recipe, self.constants = recipe, settings

    def build(self) -> EditRewardModel:
        train = self.recipe.train
        corpus = load_corpus(self.recipe)
        processor = EditProcessor(recipes.resolve(self.recipe.model.path), self.constants)
        validation = whole_groups(corpus.splits["validation"], train.validation_samples)
        self.training = EncodedEntries(corpus.splits["train"], processor)
        self.validation = EncodedEntries(validation, processor)
        self.order = DataOrder(
            self.training.entries,
            seed=self.recipe.seed,
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            ranks=train.ranks,
            unit=train.ranking.group_size if train.ranking.weight > 0 else 1,
        )
        return make_trainable_model(self.recipe)

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The head apart from the body; no weight decay on biases and norms."""
        rule = self.recipe.train.optimization
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in trained_parameters(model):
            groups.setdefault((name.startswith("score."), parameter.ndim >= 2), []).append(parameter)
        head_lr = rule.lr if rule.head_lr is None else rule.head_lr
        return [
            {
                "params": parameters,
                "lr": head_lr if head else rule.lr,
                "weight_decay": rule.weight_decay if decays else 0.0,
            }
            for (head, decays), parameters in groups.items()
        ]

    def micro_batches(self, first_step: int) -> Iterator[LabelledBatch]:
        return self._loader(self.training, self.order.batches(first_step, self.rank))

    def micro_loss(self, batch: LabelledBatch) -> tuple[Tensor, tuple[float, float]]:
        predicted = self.engine(batch.batch.to(self.device))
        target = batch.target.to(self.device)
        loss = edit_reward_loss(predicted, target, batch.groups, self.recipe.train)
        return loss.total, (float(loss.regression), float(loss.ranking))

    def figures(
        self, parts: Sequence[tuple[float, float]], gradient_norm: float, learning_rate: float
    ) -> dict[str, float]:
        """One optimizer step as this rank saw it: mean losses of its samples, global gradient norm, learning rate."""
        regression, ranking = (sum(each / len(parts) for each in side) for side in zip(*parts, strict=True))
        return {
            "step": self.step,
            "train/loss": regression + self.recipe.train.ranking.weight * ranking,
            "train/regression": regression,
            "train/ranking": ranking,
            "train/gradient_norm": gradient_norm,
            "train/learning_rate": learning_rate,
        }

    def _loader(self, data: EncodedEntries, order: Any) -> Iterator[LabelledBatch]:
        workers = self.recipe.train.loader_workers
        waiting: dict[str, Any] = {}
        if workers:
            # Not fork: threads of gloo, NCCL and Ray are alive here. The server imports once for all loaders.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            waiting = {
                "timeout": self.recipe.resources.collective_timeout_s,
                "multiprocessing_context": context,
            }
        return iter(
            DataLoader(data, batch_sampler=order, num_workers=workers, collate_fn=data.collate, **waiting)
        )

    @torch.no_grad()
    def validate(self) -> list[tuple[int, list[float]]]:
        """(position in the validation set, K raw outputs) of this rank's share.

        All ranks run the same number of forwards, since ZeRO-3 gathers weights in each; surplus rows are dropped.
        """
        self.engine.eval()
        total, size, ranks = (
            len(self.validation.entries),
            self.recipe.evaluate.batch_size,
            self.settings.ranks,
        )
        mine = list(range(self.rank, total, ranks))
        rows = mine + [0] * (math.ceil(total / ranks) - len(mine))
        order = [rows[k : k + size] for k in range(0, len(rows), size)]
        raw = [self.engine(b.batch.to(self.device)).cpu() for b in self._loader(self.validation, order)]
        return list(zip(mine, torch.cat(raw).tolist(), strict=False))

    def save_trainable(self, folder: str) -> None:
        """The trained weights alone, whole, for `export`; a collective under ZeRO-3."""
        import deepspeed
        from safetensors.torch import save_file

        whole: dict[str, Tensor] = {}
        for name, parameter in trained_parameters(self.model):
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.settings.zero_stage == 3):
                if self.rank == 0:
                    whole[name] = parameter.detach().to("cpu", copy=True).contiguous()
        if self.rank == 0:
            save_file(whole, Path(folder) / TRAINABLE_FILE)


def trainer_settings(recipe: Recipe) -> TrainerSettings:
    """The recipe as the trainer reads it."""
    train = recipe.train
    return TrainerSettings(
        ranks=train.ranks,
        steps=train.steps,
        micro_batches=train.batch_size // (train.micro_batch_size * train.ranks),
        micro_batch_size=train.micro_batch_size,
        optimization=train.optimization,
        dtype=recipe.model.dtype,
        resources=recipe.resources,
        zero_stage=train.zero_stage,
    )


def make_trainable_model(recipe: Recipe) -> EditRewardModel:
    """The base with a fresh head, on the CPU (DeepSpeed moves it); what `model.trainable` names has gradients."""
    dtype = getattr(torch, recipe.model.dtype)
    folder = recipes.resolve(recipe.model.path)
    model = build_model(folder, len(recipe.data.dimensions), bias=recipe.model.score_bias, dtype=dtype)
    choose_trainable(model, recipe)
    if recipe.model.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def choose_trainable(model: EditRewardModel, recipe: Recipe) -> None:
    """Freeze and attach as `model.trainable` says. Raises ValueError for LoRA targets that match nothing."""
    if recipe.model.trainable == "full":
        model.requires_grad_(True)
        return
    model.requires_grad_(False)
    model.score.requires_grad_(True)
    if recipe.model.trainable == "language":
        model.backbone.language_model.requires_grad_(True)
    if recipe.model.trainable == "lora":
        lora = recipe.model.lora
        attach_lora(model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=recipe.seed)
