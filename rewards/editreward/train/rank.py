"""One training rank: model, DeepSpeed engine, its share of the data. `train_run.py` tells all ranks what to do.

Every rank's loss is the mean over its samples of the step; DeepSpeed averages over ranks; shares are equal, so the
gradient is that of the global batch, whatever the number of ranks, the micro-batch size and the ZeRO stage.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import recipes
from core.cluster.process_group import join_process_group
from core.training.schedule import Optimization, lr_factor
from rewards.editreward.config import Recipe
from rewards.editreward.data.index import Entry, load_corpus, read_entry, whole_groups
from rewards.editreward.model import EditRewardModel, attach_lora, build_model, trainable
from rewards.editreward.processing import EditBatch, EditProcessor, Encoded
from rewards.editreward.settings import EditRewardSettings
from rewards.editreward.train.objective import edit_reward_loss
from rewards.editreward.train.order import DataOrder

TRAINABLE_FILE = "trainable.safetensors"
INDEX = "index"


@dataclass(frozen=True)
class StepFigures:
    """One optimizer step as a rank saw it: mean losses of its samples, the global gradient norm, the learning rate."""

    step: int
    regression: float
    ranking: float
    gradient_norm: float
    learning_rate: float


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


class TrainRank:
    """Owns model and optimizer. `setup` must be called on all ranks before anything else."""

    def __init__(self, recipe: Recipe, settings: EditRewardSettings, rank: int):
        torch.set_num_threads(recipe.resources.threads)
        self.recipe, self.settings, self.rank = recipe, settings, rank
        self.device = recipe.resources.device
        self.step = 0
        self.batches: Iterator[LabelledBatch] | None = None

    def setup(self, address: str, port: int) -> None:
        """Join the other ranks, then build model, engine and data. Raises after the collective time limit."""
        resources = self.recipe.resources
        if not torch.distributed.is_initialized():
            join_process_group(
                rank=self.rank,
                world_size=self.recipe.train.ranks,
                address=address,
                port=port,
                device=self.device,
                timeout_s=resources.collective_timeout_s,
            )
        self.model = make_trainable_model(self.recipe)
        self.engine = self._engine()
        corpus = load_corpus(self.recipe, self.recipe.run_dir / INDEX)
        processor = EditProcessor(recipes.resolve(self.recipe.model.path), self.settings)
        train = self.recipe.train
        self.training = EncodedEntries(corpus.splits["train"], processor)
        self.validation = EncodedEntries(
            whole_groups(corpus.splits["validation"], train.validation_samples), processor
        )
        self.order = DataOrder(
            self.training.entries,
            seed=self.recipe.seed,
            batch_size=train.batch_size,
            micro_batch_size=train.micro_batch_size,
            ranks=train.ranks,
            unit=train.ranking.group_size if train.ranking.weight > 0 else 1,
        )

    def _engine(self) -> Any:
        import deepspeed

        train, settings = self.recipe.train, self.recipe.train.optimization
        config = {
            "train_micro_batch_size_per_gpu": train.micro_batch_size,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": settings.gradient_clip,
            "bf16": {"enabled": self.recipe.model.dtype == "bfloat16"},
            "zero_optimization": {"stage": train.zero_stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 1_000_000_000,
        }
        optimizer = torch.optim.AdamW(self._parameter_groups(), betas=settings.betas, eps=settings.eps)
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        return engine

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """The head apart from the body; no weight decay on biases and norms."""
        settings = self.recipe.train.optimization
        groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
        for name, parameter in trainable(self.model):
            groups.setdefault((name.startswith("score."), parameter.ndim >= 2), []).append(parameter)
        head_lr = settings.lr if settings.head_lr is None else settings.head_lr
        return [
            {
                "params": parameters,
                "lr": head_lr if head else settings.lr,
                "peak": head_lr if head else settings.lr,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (head, decays), parameters in groups.items()
        ]

    # ---- training -----------------------------------------------------------------------------------------

    def advance(self, to_step: int) -> list[StepFigures]:
        """Train up to, and without, 0-based step `to_step`."""
        if self.batches is None:
            self.batches = self._loader(self.training, self.order.batches(self.step, self.rank))
        self.engine.train()
        return [self._train_step() for _ in range(to_step - self.step)]

    def _train_step(self) -> StepFigures:
        train = self.recipe.train
        assert self.batches is not None
        shape = Optimization(
            warmup_fraction=train.optimization.warmup_fraction,
            final_lr_fraction=train.optimization.final_lr_fraction,
        )
        factor = lr_factor(self.step, train.steps, shape)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        count = train.batch_size // (train.micro_batch_size * train.ranks)
        regression = ranking = 0.0
        for _ in range(count):
            labelled = next(self.batches)
            predicted = self.engine(labelled.batch.to(self.device))
            loss = edit_reward_loss(predicted, labelled.target.to(self.device), labelled.groups, train)
            self.engine.backward(loss.total / count)
            regression += float(loss.regression) / count
            ranking += float(loss.ranking) / count
        self.engine.step()
        self.step += 1
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        return StepFigures(self.step, regression, ranking, norm, train.optimization.lr * factor)

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
            self.recipe.train.ranks,
        )
        mine = list(range(self.rank, total, ranks))
        rows = mine + [0] * (math.ceil(total / ranks) - len(mine))
        order = [rows[k : k + size] for k in range(0, len(rows), size)]
        raw = [self.engine(b.batch.to(self.device)).cpu() for b in self._loader(self.validation, order)]
        return list(zip(mine, torch.cat(raw).tolist(), strict=False))

    # ---- files --------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """This rank's part of a checkpoint: trained weights and optimizer, in DeepSpeed's layout."""
        self.engine.save_checkpoint(folder, tag="engine", exclude_frozen_parameters=True, save_latest=False)

    def load(self, folder: str, step: int) -> None:
        """Continue from what `save` wrote; the caller has verified the folder's hashes."""
        loaded, _ = self.engine.load_checkpoint(folder, tag="engine", load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        self.step, self.batches = step, None

    def save_trainable(self, folder: str) -> None:
        """The trained weights alone, whole, for `export`; a collective under ZeRO-3."""
        import deepspeed
        from safetensors.torch import save_file

        whole: dict[str, Tensor] = {}
        for name, parameter in trainable(self.model):
            with deepspeed.zero.GatheredParameters([parameter], enabled=self.recipe.train.zero_stage == 3):
                if self.rank == 0:
                    whole[name] = parameter.detach().to("cpu", copy=True).contiguous()
        if self.rank == 0:
            save_file(whole, Path(folder) / TRAINABLE_FILE)


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
