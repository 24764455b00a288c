"""One rank of a supervised training run under DeepSpeed. `core/training/run.py` tells all ranks what to do.

Every rank's loss is the mean over its samples of the step and DeepSpeed averages over ranks; shares are equal, so the
gradient is that of the global batch, whatever the number of ranks, the micro-batch size and the ZeRO stage. What a
rank draws must follow from (seed, step, place in the batch): then there is no state to save but weights, optimizer
and average, and a resumed run repeats the other one to the bit.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from core.cluster.process_group import join_process_group, limit_collectives
from core.cluster.ranks import RankResources
from core.inputs import check_files
from core.training.ema import ShardedAverage
from core.training.optimization import trained_parameters
from core.training.schedule import AdamW, lr_factor

logger = logging.getLogger(__name__)

MOST_SKIPPED = 3
"""Steps whose gradient is not finite that a training takes without stopping."""

ENGINE = "engine"
GRADIENT_BUCKET = 30_000_000
"""Gradients reduced at once: .12 GB in float32, where DeepSpeed's own 5e8 take 1 GB and more beside a small adapter."""


@dataclass(frozen=True)
class TrainerSettings:
    """What a rank's update follows from.

    steps: of the learning-rate schedule. micro_batches: of one rank in one step, of `micro_batch_size` samples each.
    offload: none, optimizer or parameters (to host memory). ema_decay: None keeps no average.
    """

    ranks: int
    steps: int
    micro_batches: int
    micro_batch_size: int
    optimization: AdamW
    dtype: str
    resources: RankResources
    zero_stage: int
    offload: str = "none"
    ema_decay: float | None = None


class SupervisedRank(ABC):
    """Owns model, optimizer and average. `setup` must be called on all ranks before anything else."""

    def __init__(self, settings: TrainerSettings, rank: int):
        torch.set_num_threads(settings.resources.threads)
        self.settings, self.rank, self.device = settings, rank, settings.resources.device
        self.step = self.skipped = 0
        self.batches: Iterator[Any] | None = None
        self.average: ShardedAverage | None = None

    # ---- what a training gives ----------------------------------------------------------------------------

    @abstractmethod
    def build(self) -> nn.Module:
        """The model on the CPU, with gradients where it is trained; also opens the data. The ranks are joined."""

    @abstractmethod
    def micro_batches(self, first_step: int) -> Iterator[Any]:
        """This rank's micro-batches from a step on, `settings.micro_batches` a step, without end."""

    @abstractmethod
    def micro_loss(self, batch: Any) -> tuple[Tensor, Any]:
        """The mean loss of one micro-batch at `self.step`, and whatever `figures` needs to know of it.

        Raises FloatingPointError where it is no number and that should stop the run.
        """

    @abstractmethod
    def figures(self, parts: Sequence[Any], gradient_norm: float, learning_rate: float) -> Any:
        """What the driver is told of the step just done: from the micro-batches' parts, in order."""

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """AdamW's groups: parameters of two and more dimensions decay, biases and norms do not."""
        groups: dict[bool, list[nn.Parameter]] = {}
        for _, parameter in trained_parameters(model):
            groups.setdefault(parameter.ndim >= 2, []).append(parameter)
        decay = self.settings.optimization.weight_decay
        return [{"params": group, "weight_decay": decay if big else 0.0} for big, group in groups.items()]

    # ---- what the driver calls ----------------------------------------------------------------------------

    def setup(self, address: str, port: int) -> None:
        """Join the other ranks, then build data, model and engine. Raises after `start_timeout_s` without them."""
        settings = self.settings
        if not torch.distributed.is_initialized():
            join_process_group(
                rank=self.rank,
                world_size=settings.ranks,
                address=address,
                port=port,
                device=self.device,
                timeout_s=settings.resources.start_timeout_s,
            )
        self.model = self.build()
        self.engine = self._make_engine(self.model)
        if settings.ema_decay is not None:
            self.average = ShardedAverage(self.engine, settings.ema_decay)
        limit_collectives(settings.resources.collective_timeout_s)

    def sees(self, folder: str) -> bool:
        """Whether this node has the run's folder: every rank writes its part of a checkpoint there."""
        return Path(folder).is_dir()

    def check_files(self, held: Mapping[str, str], roots: Mapping[str, str]) -> None:
        """See `core.inputs.check_files`, for each of these folders."""
        for name, folder in roots.items():
            check_files(held, name, folder)

    def advance(self, to_step: int) -> list[Any]:
        """Train up to, and without, 0-based step `to_step`; the figures of every step."""
        if self.batches is None:
            self.batches = self.micro_batches(self.step)
        self.engine.train()
        return [self._train_step(self.batches) for _ in range(to_step - self.step)]

    def save(self, folder: str) -> None:
        """This rank's part of a checkpoint: trained weights and optimizer in DeepSpeed's layout, and its average."""
        self.engine.save_checkpoint(folder, tag=ENGINE, exclude_frozen_parameters=True, save_latest=False)
        if self.average is not None:
            save_file(
                {name: shard.cpu() for name, shard in self.average.average.items()},
                Path(folder) / f"average_rank_{self.rank:03d}.safetensors",
            )
            if self.rank == 0:
                (Path(folder) / "average.json").write_text(json.dumps({"updates": self.average.updates}))

    def load(self, folder: str, step: int) -> None:
        """Continue from what `save` wrote; the caller has verified the folder's hashes."""
        loaded, _ = self.engine.load_checkpoint(folder, tag=ENGINE, load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        if self.average is not None:
            updates = json.loads((Path(folder) / "average.json").read_text())["updates"]
            self.average.load(load_file(Path(folder) / f"average_rank_{self.rank:03d}.safetensors"), updates)
        self.step, self.batches = step, None

    # ---- the update ---------------------------------------------------------------------------------------

    def _make_engine(self, model: nn.Module) -> Any:
        """DeepSpeed around the model, which it moves to its device."""
        import deepspeed

        rule, groups = self.settings.optimization, self.parameter_groups(model)
        self._peaks = [group.setdefault("lr", rule.lr) for group in groups]
        optimizer = torch.optim.AdamW(groups, betas=rule.betas, eps=rule.eps)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=engine_config(self.settings)
        )
        return engine

    def _train_step(self, batches: Iterator[Any]) -> Any:
        settings = self.settings
        factor = lr_factor(self.step, settings.steps, settings.optimization)
        for group, peak in zip(self.engine.optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        parts = []
        for _ in range(settings.micro_batches):
            loss, part = self.micro_loss(next(batches))
            self.engine.backward(loss / settings.micro_batches)
            parts.append(part)
        self.engine.step()
        if not self.engine.was_step_applied():  # DeepSpeed leaves out a gradient that is not finite
            self._note_skipped()
        elif self.average is not None:
            self.average.step(self.average.live())
        self.step += 1
        norm = float(self.engine.get_global_grad_norm() or 0.0)
        return self.figures(parts, norm, settings.optimization.lr * factor)

    def _note_skipped(self) -> None:
        """Raises FloatingPointError, on all ranks alike, when it happens more often than by accident."""
        self.skipped += 1
        logger.error("step %d: skipped, its gradient is not finite (%d so far)", self.step, self.skipped)
        if self.skipped > MOST_SKIPPED:
            raise FloatingPointError(
                f"step {self.step}: {self.skipped} steps were skipped because their gradients were not finite; "
                "train anew with a lower learning rate"
            )


def engine_config(settings: TrainerSettings) -> dict[str, Any]:
    """The trainer's DeepSpeed configuration."""
    zero: dict[str, Any] = {"stage": settings.zero_stage}
    host = {"device": "cpu", "pin_memory": settings.resources.device == "cuda"}
    if settings.offload != "none":
        zero["offload_optimizer"] = host
    if settings.offload == "parameters":
        zero["offload_param"] = host
    return deepspeed_config(
        settings.dtype,
        zero,
        micro_batch_size=settings.micro_batch_size,
        clip=settings.optimization.gradient_clip,
    )


def deepspeed_config(
    dtype: str, zero: dict[str, Any], *, micro_batch_size: int, clip: float
) -> dict[str, Any]:
    """Gradients accumulate until `engine.step()`; the loss is scaled by the caller and by nothing else.

    They are summed and reduced in float32 whatever the weights' dtype: in bfloat16, 288 additions are 1.7 % off.
    """
    bucket = {"reduce_bucket_size": GRADIENT_BUCKET, "allgather_bucket_size": GRADIENT_BUCKET}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": bucket | {"overlap_comm": False} | zero,
        "zero_allow_untested_optimizer": True,
        # With offload DeepSpeed would insist on an Adam of its own, which it compiles at the first start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
