"""One learner rank: the objective on replayed trajectories, under DeepSpeed, LoRA parameters only.

Gradients accumulate over all micro-batches and trained steps of an update (DeepSpeed's unmanaged accumulation: the
boundary is `engine.step()`), so the loss is scaled here and nowhere else: a rank's loss is
sum(w l) * world_size / N_global, and DeepSpeed's mean over ranks makes it the global mean. ZeRO-1 reduces the adapter's
gradient once, in `step()`; ZeRO-2 and 3 reduce it in every backward.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.failures import ClusterError
from core.training.ema import MovingAverage
from core.training.supervised import deepspeed_config
from models.compiling import compile_blocks
from models.components import load_transformer, torch_dtype
from models.conditioning import Conditioning, ConditioningBatch
from models.lora.attach import (
    LoraSettings,
    adapter_state,
    attach_lora,
    hash_state,
    load_adapter_state,
    use_adapter,
)
from models.lora.load import starting_adapter
from models.sampling import guided_velocity
from rl.learner.batching import TrainSample
from rl.learner.gate import LogProbGate
from rl.learner.grpo import gaussian_kl, grpo_loss
from rl.learner.rehearsal import Rehearsal, RehearsalBatch
from rl.learner.stats import StatsAccumulator, UpdateStats
from rl.recipe.schema import LearnerConfig
from rollout.engine import ReplicaSpec, attach_rollout_adapter
from rollout.flow_sde import FlowSDEStep
from rollout.sampler import SamplingSpec, replay_step

POLICY, REFERENCE = "policy", "reference"


@dataclass(frozen=True)
class LearnerSpec:
    """What every rank is built from; `collective_timeout_s` bounds how long ranks wait for each other once all are set
    up, `start_timeout_s` until then. `adapter`: what training starts from, whose `hash_state` the replica's `held` has;
    None for a fresh one."""

    replica: ReplicaSpec
    config: LearnerConfig
    sampling: SamplingSpec
    seed: int
    inprocess: bool
    gradient_checkpointing: bool
    collective_timeout_s: float
    start_timeout_s: float
    adapter: str | None = None


class Learner:
    """Owns the policy adapter, its frozen reference, the optimizer and the moving average.

    `torch.distributed` must be initialised by DeepSpeed before (see `rl/learner/worker.py`).
    """

    def __init__(self, spec: LearnerSpec):
        import deepspeed

        replica, config, seed = spec.replica, spec.config, spec.seed
        self.replica, self.config, self.sampling = replica, config, spec.sampling
        self.dtype = torch_dtype(replica.dtype)
        torch.manual_seed(seed)
        replica.check_base()
        transformer = load_transformer(replica.model_path, dtype=self.dtype, device=replica.device)
        lora: dict[str, Any] = {
            "rank": replica.lora_rank,
            "alpha": replica.lora_alpha,
            "targets": list(replica.lora_targets),
        }
        attach_lora(transformer, **lora, adapter_name=POLICY, seed=seed)
        if spec.adapter is not None:
            load_adapter_state(transformer, _read_start(spec.adapter, replica), POLICY)
        attach_lora(transformer, **lora, adapter_name=REFERENCE, seed=seed, trainable=False)
        if spec.inprocess:
            attach_rollout_adapter(transformer, replica)
        if spec.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        if replica.compile:
            compile_blocks(transformer, replica.shapes)
        self.transformer = transformer.train()
        trainable = [p for p in transformer.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(
            trainable,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
        )
        zero = {"stage": config.zero_stage}
        settings = deepspeed_config(
            replica.dtype, zero, micro_batch_size=config.micro_batch_size, clip=config.max_grad_norm
        )
        self.engine, *_ = deepspeed.initialize(model=transformer, optimizer=optimizer, config=settings)
        self.world_size = torch.distributed.get_world_size()
        self.reference: str | None = None
        self.negative: Conditioning | None = None
        self.rehearsal: Rehearsal | None = None
        self.ema: MovingAverage | None = None
        self.begin_stage()

    # ---- stages -------------------------------------------------------------------------------------------

    def begin_stage(self) -> None:
        """Continue from what the stage before ships, freeze that as the KL reference, restart optimizer and average.

        Where a moving average is kept it is what was evaluated, and live weights at a high learning rate score less.
        """
        if self.ema is not None:
            with self._gathered(modify=True):
                load_adapter_state(self.transformer, self.ema.state(self.dtype), POLICY)
            self.engine.optimizer.refresh_fp32_params()
        state = self.adapter()
        self._set_reference(state)
        self.rehearsal = None
        self.engine.optimizer.optimizer.state.clear()
        ema = self.config.ema
        self.ema = MovingAverage(state, decay=ema.decay, every=ema.every) if ema.enabled else None

    def _set_reference(self, state: dict[str, Tensor]) -> None:
        """An adapter whose B matrices are all zero is the base model: then the disabled adapter serves."""
        untrained = all(not bool(tensor.any()) for name, tensor in state.items() if "lora_B" in name)
        if self.config.kl_reference == "base" or untrained:
            self.reference = None
            return
        with self._gathered(modify=True):
            load_adapter_state(self.transformer, state, REFERENCE)
        self.reference = REFERENCE

    def adapter(self) -> dict[str, Tensor]:
        """The live adapter's tensors (CPU, the model's dtype); with ZeRO-3 a collective over all ranks."""
        with self._gathered():
            return adapter_state(self.transformer, POLICY)

    def shipped_adapter(self) -> dict[str, Tensor]:
        """What is evaluated and saved: the moving average where one is kept, else the live adapter."""
        return self.ema.state(self.dtype) if self.ema else self.adapter()

    def _gathered(self, *, modify: bool = False) -> Any:
        """ZeRO-3 holds only a shard of each parameter on a rank; gather the adapters whole for reading/writing."""
        import deepspeed

        adapters = [p for n, p in self.transformer.named_parameters() if "lora_" in n]
        enabled = self.config.zero_stage == 3
        return deepspeed.zero.GatheredParameters(
            adapters, modifier_rank=0 if modify else None, enabled=enabled
        )

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the updates from here on; a checkpoint brings back that of its own step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate

    # ---- the update ---------------------------------------------------------------------------------------

    def update(self, updates: Sequence[tuple[Sequence[TrainSample], int]]) -> list[UpdateStats]:
        """Train this rank's shares of one rollout: `(samples, global count)` for each optimizer update.

        Raises LogProbMismatch, on all ranks alike, when the rollout's log-probabilities are not those of this
        learner's weights: the replicas sampled with another policy, or other arithmetic.
        """
        old = self._old_log_probs(updates)
        stats = []
        for u, (samples, count) in enumerate(updates):
            gate = self._gate() if u == 0 else None
            accumulated = self.accumulate(samples, count, old[u], gate)
            if self.rehearsal is not None:
                self._rehearse(self.rehearsal, samples[0].group, accumulated)
            gaps = gate.check() if gate else None
            self.engine.step()
            skipped = not self.engine.was_step_applied()  # DeepSpeed leaves out a gradient that is not finite
            if not skipped and self.ema is not None and self.ema.due():
                self.ema.update(self.adapter())
            norm = self.engine.get_global_grad_norm()
            stats.append(accumulated.result(norm, gaps, skipped=skipped))
        return stats

    def _gate(self) -> LogProbGate:
        return LogProbGate(self.config.log_prob_bound(self.replica.dtype), self.sampling.num_steps)

    def accumulate(
        self, samples: Sequence[TrainSample], count: int, old: Tensor | None, gate: LogProbGate | None
    ) -> StatsAccumulator:
        """Forward and backward over all micro-batches and trained steps of one update, without stepping.

        `old` [n, S'] are the old log-probabilities; None means this forward's own (replay at the first update).
        """
        statistics = StatsAccumulator(self.replica.device)
        size = self.config.micro_batch_size
        pairs = count * len(samples[0].positions)
        for start in range(0, len(samples), size):
            batch = _MicroBatch(samples[start : start + size], self.replica.device, self.dtype)
            for s in range(len(samples[0].positions)):
                x, prev, index, rollout_log_prob = batch.step(s)
                trunks = self._trunks(batch, s)
                step = self._replay(x, prev, index, batch, trunks, grad=True)
                assert step.log_prob is not None
                if gate is not None:
                    gate.add(index, step.log_prob.detach(), rollout_log_prob, batch.weights)
                before = step.log_prob.detach() if old is None else old[start : start + size, s].to(x.device)
                loss = grpo_loss(
                    log_prob=step.log_prob,
                    old_log_prob=before,
                    advantages=batch.advantages,
                    clip_range=self.config.clip_range,
                    weights=batch.weights / pairs * self.world_size,
                    kl=self._kl(x, prev, index, batch, trunks, step),
                    kl_beta=self.config.kl_beta,
                )
                self.engine.backward(loss.loss)
                statistics.add(loss, batch.weights, self.config.kl_beta)
        return statistics

    def _old_log_probs(self, updates: Sequence[tuple[Sequence[TrainSample], int]]) -> list[Tensor | None]:
        if self.config.old_log_prob == "rollout":
            return [torch.stack([s.log_probs[list(s.positions)] for s in samples]) for samples, _ in updates]
        # At the first update the weights have not moved since the rollout, so its own forward is the replay.
        return [None] + [self._replayed_log_probs(samples) for samples, _ in updates[1:]]

    def _replayed_log_probs(self, samples: Sequence[TrainSample]) -> Tensor:
        """Log-probabilities [n, S'] under the present weights, at the training micro-batch's shape.

        A compiled model has another graph where a gradient is recorded, which rounds differently: then one is here too.
        """
        size, rows = self.config.micro_batch_size, []
        for start in range(0, len(samples), size):
            batch = _MicroBatch(samples[start : start + size], self.replica.device, self.dtype)
            columns = []
            for s in range(len(samples[0].positions)):
                x, prev, index, _ = batch.step(s)
                trunks = self._trunks(batch, s)
                log_prob = self._replay(x, prev, index, batch, trunks, grad=self.replica.compile).log_prob
                assert log_prob is not None
                columns.append(log_prob.detach())
            rows.append(torch.stack(columns, 1))
        return torch.cat(rows)

    def _trunks(self, batch: _MicroBatch, s: int) -> Tensor | None:
        """Which samples [B] share the forward of the s-th trained step: a branching group's, until it has branched."""
        return batch.groups if self.sampling.branch and batch.at_branch(s) else None

    def _kl(
        self,
        x: Tensor,
        prev: Tensor,
        index: Tensor,
        batch: _MicroBatch,
        trunks: Tensor | None,
        step: FlowSDEStep,
    ) -> Tensor | None:
        if self.config.kl_beta == 0:
            return None
        with use_adapter(self.transformer, self.reference):
            reference = self._replay(x, prev, index, batch, trunks, grad=False)
        return gaussian_kl(step.mean, reference.mean, step.diffusion, step.step_std, self.config.kl_form)

    def _rehearse(self, rehearsal: Rehearsal, group: int, statistics: StatsAccumulator) -> None:
        """Forward and backward of `beta |v - v_start|^2`; `group`, the first of this rank's share, names the states."""
        for batch in rehearsal.batches(group, device=self.replica.device, dtype=self.dtype):
            velocity = self._rehearsed_velocity(self.engine, batch)
            with torch.no_grad(), use_adapter(self.transformer, self.reference):
                start = self._rehearsed_velocity(self.transformer, batch)
            distance = (velocity - start).square().mean()
            self.engine.backward(rehearsal.beta * distance / rehearsal.micro_batches)
            statistics.add_rehearsal(distance.detach(), rehearsal.beta)

    def _rehearsed_velocity(self, transformer: torch.nn.Module, batch: RehearsalBatch) -> Tensor:
        return guided_velocity(
            transformer,
            batch.x,
            batch.sigma,
            batch.conditioning,
            self.negative,
            self.sampling.guidance_scale,
            cfg_gradient=self.config.cfg_gradient,
        ).float()

    def _replay(
        self, x: Tensor, prev: Tensor, index: Tensor, batch: _MicroBatch, trunks: Tensor | None, *, grad: bool
    ) -> FlowSDEStep:
        with torch.set_grad_enabled(grad):
            return replay_step(
                self.engine if grad else self.transformer,
                x,
                prev,
                index,
                batch.sigmas,
                batch.conditioning,
                self.negative,
                self.sampling,
                cfg_gradient=self.config.cfg_gradient,
                trunks=trunks,
            )

    # ---- checkpoint ---------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Optimizer and trainable weights of all ranks (DeepSpeed layout, no frozen weights), the stage's reference and
        the moving average; a collective."""
        self.engine.save_checkpoint(
            str(folder), tag="engine", exclude_frozen_parameters=True, save_latest=False
        )
        reference = self.reference_state()
        if torch.distributed.get_rank() == 0:
            save_file(reference, folder / "reference.safetensors")
            if self.ema is not None:
                save_file(self.ema.average, folder / "ema.safetensors")
                (folder / "ema.json").write_text(json.dumps({"updates": self.ema.updates}))

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote; the caller has verified the folder's hashes."""
        loaded, _ = self.engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no checkpoint in {folder}")
        self._set_reference(load_file(folder / "reference.safetensors"))
        if self.ema is not None:
            if not (folder / "ema.json").is_file():
                raise RuntimeError(f"{folder}: no moving average was saved, but learner.ema.enabled is true")
            average = load_file(folder / "ema.safetensors")
            self.ema.average = {name: tensor.float() for name, tensor in average.items()}
            self.ema.updates = json.loads((folder / "ema.json").read_text())["updates"]

    def reference_state(self) -> dict[str, Tensor]:
        """The stage-start adapter, for the checkpoint (the untrained one while it serves as the base)."""
        with self._gathered():
            return adapter_state(self.transformer, REFERENCE)


def _read_start(path: str, replica: ReplicaSpec) -> dict[str, Tensor]:
    """The adapter that training starts from. Raises ClusterError where this node has another than the driver."""
    settings = LoraSettings(replica.lora_rank, replica.lora_alpha, replica.lora_targets)
    state = starting_adapter(Path(replica.model_path), Path(path), settings)
    if hash_state(state) != replica.held.get("model.adapter"):
        raise ClusterError(
            f"{os.uname().nodename} has another adapter in {path} than the driver (model.adapter): copy the same to "
            "every node, or put it on a file system that all share"
        )
    return state


class _MicroBatch:
    """B samples on the device, read one trained step at a time."""

    def __init__(self, samples: Sequence[TrainSample], device: str, dtype: torch.dtype):
        self.samples, self.device = samples, device
        self.sigmas = samples[0].sigmas
        self.conditioning = ConditioningBatch.stack(
            [s.conditioning for s in samples], device=device, dtype=dtype
        )
        self.advantages = torch.tensor([s.advantage for s in samples], dtype=torch.float32, device=device)
        self.weights = torch.tensor([s.weight for s in samples], dtype=torch.float32, device=device)
        self.groups = torch.tensor([s.group for s in samples])

    def at_branch(self, s: int) -> bool:
        """Whether the s-th trained step is the first stochastic one of every sample."""
        return all(sample.positions[s] == 0 for sample in self.samples)

    def step(self, s: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x_t, x_{t-1} [B, C, H, W], step index [B] and rollout log-prob [B] of the s-th trained step."""
        where = [sample.positions[s] for sample in self.samples]
        pairs = list(zip(self.samples, where, strict=True))
        x = torch.stack([sample.latents[p] for sample, p in pairs]).to(self.device)
        prev = torch.stack([sample.latents[p + 1] for sample, p in pairs]).to(self.device)
        index = torch.tensor([sample.steps[p] for sample, p in pairs], device=self.device)
        log_prob = torch.stack([sample.log_probs[p] for sample, p in pairs]).to(self.device)
        return x, prev, index, log_prob
