"""The two engines that a training step is made of, without Ray and without DeepSpeed.

    rollout  rollout.sampler.sample_trajectories: T steps with guidance, as a rollout worker runs them
    update   rollout.sampler.replay_step, rl.learner.grpo, backward, gradient clip and Adam on the LoRA matrices, as
             a learner rank runs them (`rl/learner/learner.py`); the KL reference is the base model

Differs from a run: no text encoder, no autoencoder, no reward, no transport, one process, one optimizer update per
batch, and plain Adam over float32 copies where a run has DeepSpeed's ZeRO around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.measure import Measurement, measure
from bench.sizes import VAE_FACTOR, random_transformer, transformer_config
from models.compiling import compile_blocks
from models.flops import Tokens, rollout_flops, update_flops
from models.kontext import KontextTransformer
from models.lora.attach import attach_lora, use_adapter
from models.lora.targets import DEFAULT_TARGETS
from models.sampling import sigma_table
from rl.learner.grpo import gaussian_kl, grpo_loss
from rollout.sampler import (
    Conditioning,
    ConditioningBatch,
    SamplingSpec,
    Trajectory,
    replay_step,
    sample_trajectories,
)

_CLIP_RANGE, _KL_BETA, _LEARNING_RATE, _MAX_GRAD_NORM = 1e-4, 0.04, 3e-4, 1.0


@dataclass(frozen=True)
class Settings:
    """What is measured. `resolution` in pixels, square; `task` edit adds one reference of the same size."""

    size: str
    task: str
    resolution: int
    batch: int
    steps: int
    train_steps: int
    guidance: float
    text_tokens: int
    lora_rank: int
    dtype: str
    device: str
    gradient_checkpointing: bool = False
    compile: bool = False
    warmup: int = 1
    repeats: int = 3
    seed: int = 0

    def tokens(self) -> Tokens:
        patch = transformer_config(self.size)["patch_size"]
        image = (self.resolution // VAE_FACTOR // patch) ** 2
        return Tokens(image, image if self.task == "edit" else 0, self.text_tokens)


@dataclass(frozen=True)
class EngineResult:
    """Seconds per batch of both engines, operations per sample, and the check that they agree.

    `log_prob_gap`: mean absolute difference between the rollout's log-probabilities and the first replay's.
    """

    rollout: Measurement
    update: Measurement
    rollout_flops: int
    update_flops: int
    log_prob_gap: float


class EngineBench:
    """A transformer with random weights and one LoRA adapter, and a batch of random prompts."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.device = torch.device(settings.device)
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[settings.dtype]
        self.config = transformer_config(settings.size)
        self.transformer = build_transformer(settings, self.config, self.dtype, self.device)
        self.optimizer = MasterAdam(self.transformer)
        self.spec = SamplingSpec(settings.steps, noise_level=0.7, guidance_scale=settings.guidance)
        self.sigmas = sigma_table(_scheduler(), settings.steps)
        side = settings.resolution // VAE_FACTOR
        self.latent_shape = (self.config["in_channels"], side, side)
        generator = torch.Generator().manual_seed(settings.seed)
        rows = [self._conditioning(generator) for _ in range(settings.batch + 1)]
        self.negative = rows.pop()
        self.positive = ConditioningBatch.stack(rows, device=self.device, dtype=self.dtype)

    def run(self) -> EngineResult:
        """Measure the rollout, then updates on the last trajectories it gave."""
        s, kept = self.settings, {}

        def roll_out() -> None:
            kept["trajectory"] = self.rollout()

        rollout = measure(roll_out, device=self.device, warmup=s.warmup, repeats=s.repeats)
        trajectory = kept["trajectory"]
        gap = self.log_prob_gap(trajectory)
        update = measure(
            lambda: self.update(trajectory), device=self.device, warmup=s.warmup, repeats=s.repeats
        )
        shared: dict[str, Any] = {"lora_rank": s.lora_rank, "guided": s.guidance > 1.0}
        return EngineResult(
            rollout,
            update,
            rollout_flops(self.config, s.tokens(), num_steps=s.steps, **shared),
            update_flops(self.config, s.tokens(), train_steps=s.train_steps, kl=True, **shared),
            gap,
        )

    def rollout(self) -> Trajectory:
        """One batch of B trajectories."""
        s = self.settings
        generators = [torch.Generator().manual_seed(s.seed + k) for k in range(s.batch)]
        self.transformer.eval()
        with torch.no_grad():
            return sample_trajectories(
                self.transformer,
                self.positive,
                self.negative,
                self.spec,
                self.sigmas,
                self.latent_shape,
                generators,
                tuple(range(s.steps)),
            )

    def update(self, trajectory: Trajectory) -> Tensor:
        """One optimizer update on the first `train_steps` steps of all samples; returns the loss, a scalar."""
        s, total = self.settings, torch.zeros((), device=self.device)
        advantages = torch.linspace(-1, 1, s.batch, device=self.device)
        weights = torch.full((s.batch,), 1 / (s.batch * s.train_steps), device=self.device)
        self.transformer.train()
        for t in range(s.train_steps):
            step = self.replay(trajectory, t, grad=True)
            with use_adapter(self.transformer, None):
                reference = self.replay(trajectory, t, grad=False)
            loss = grpo_loss(
                log_prob=step.log_prob,
                old_log_prob=trajectory.log_probs[:, t].to(self.device),
                advantages=advantages,
                clip_range=_CLIP_RANGE,
                weights=weights,
                kl=gaussian_kl(step.mean, reference.mean, step.diffusion, step.step_std, "without_dt"),
                kl_beta=_KL_BETA,
            )
            loss.loss.backward()
            total += loss.loss.detach()
        self.optimizer.step()
        return total

    def replay(self, trajectory: Trajectory, t: int, *, grad: bool) -> Any:
        """The t-th step of the stored trajectories under the present weights."""
        with torch.set_grad_enabled(grad):
            return replay_step(
                self.transformer,
                trajectory.latents[:, t].to(self.device),
                trajectory.latents[:, t + 1].to(self.device),
                torch.full((self.settings.batch,), t, device=self.device),
                self.sigmas,
                self.positive,
                self.negative,
                self.spec,
            )

    def log_prob_gap(self, trajectory: Trajectory) -> float:
        """Mean |rollout - replay| of the log-probabilities over samples and trained steps."""
        steps = range(self.settings.train_steps)
        replayed = torch.stack([self.replay(trajectory, t, grad=False).log_prob.cpu() for t in steps], 1)
        return float((replayed - trajectory.log_probs[:, : len(steps)]).abs().mean())

    def _conditioning(self, generator: torch.Generator) -> Conditioning:
        s = self.settings
        references = (torch.randn(self.latent_shape, generator=generator),) if s.task == "edit" else ()
        return Conditioning(
            torch.randn((s.text_tokens, self.config["joint_attention_dim"]), generator=generator),
            torch.randn((self.config["pooled_projection_dim"],), generator=generator),
            references,
        )


class MasterAdam:
    """Adam over float32 copies of the trainable parameters, as DeepSpeed keeps them for bfloat16 models."""

    def __init__(self, transformer: torch.nn.Module):
        self.parameters = [p for p in transformer.parameters() if p.requires_grad]
        self.masters = [p.detach().float().clone() for p in self.parameters]
        self.adam = torch.optim.Adam(self.masters, lr=_LEARNING_RATE)

    @torch.no_grad()
    def step(self) -> Tensor:
        """Clip, update, write back, clear the gradients; returns the norm before clipping."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, _MAX_GRAD_NORM)
        self.adam.step()
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            parameter.copy_(master)
        return norm


def build_transformer(
    settings: Settings, config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> KontextTransformer:
    """Random base, frozen, with a trainable adapter whose scaling is 2 as in the paper."""
    transformer = random_transformer(dict(config), dtype=dtype, device=device, seed=settings.seed)
    rank = settings.lora_rank
    attach_lora(transformer, rank=rank, alpha=2 * rank, targets=DEFAULT_TARGETS, seed=settings.seed)
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if settings.compile:
        compile_blocks(transformer)
    return transformer


def _scheduler() -> Any:
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)
