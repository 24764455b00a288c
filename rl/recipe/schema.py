"""The schema of a recipe of `rl.train`: every key with its type, bounds, one default and meaning.

Rules that join several keys live in `rl/recipe/validate.py`. Needs neither torch nor ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Le
from omegaconf import MISSING

from core.keys import (
    MOVES_BITS,
    AtLeast0,
    AtLeast2,
    Count,
    Decay,
    Device,
    Finite,
    FolderName,
    ModelDtype,
    NonNegative,
    PositionMode,
    Positive,
    Seed,
    Task,
    ZeroStage,
)
from core.recipe import read_recipe
from models.lora.targets import DEFAULT_TARGETS
from rewards.recipe import RewardConfig, StagePartConfig

NoiseLevel = Annotated[Finite, Ge(0), Le(2)]
AlarmAction = Literal["warn", "stop"]


@dataclass
class LoraConfig:
    """Low-rank adapters on the transformer, the only weights that are trained (paper section 4.1)."""

    rank: Count = 32
    """Rank of each adapter."""
    alpha: Positive = 64.0
    """Adapters are scaled by alpha / rank."""
    targets: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))
    """Linears that get an adapter, by the ends of their names inside a transformer block."""


@dataclass
class SizeConfig:
    """One of several sizes that text-to-image groups draw theirs from."""

    height: Count = MISSING
    """Height in pixels."""
    width: Count = MISSING
    """Width in pixels."""
    weight: Positive = 1.0
    """How often it is drawn, beside the weights of the others."""


@dataclass
class ModelConfig:
    """The model that is trained and the pictures it draws."""

    path: str = MISSING
    """Folder in the released layout; with `conditioner/` in it the model is a UniPic2-MetaQuery."""
    vlm: str | None = None
    """Folder of a MetaQuery model's Qwen2.5-VL; null for models with text encoders."""
    position_mode: PositionMode = "flat"
    """How the VLM sees positions: flat, as the released inference does, or mrope."""
    adapter: str | None = None
    """Adapter to start from, a PEFT folder or a LoRA file of `model.lora`'s rank, alpha and targets; null: a fresh one.
    It is the first stage's KL reference too."""
    dtype: ModelDtype = "bfloat16"
    """Type of the weights, of the activations and of a published adapter."""
    height: Count = 512
    """Height of the pictures, in pixels."""
    width: Count = 512
    """Width of the pictures, in pixels."""
    sizes: list[SizeConfig] = field(default_factory=list)
    """Sizes of text-to-image, one drawn for each group; empty: all are height x width."""
    longer_edge: Count | None = None
    """Longer edge of edits in pixels, which then keep their picture's proportions; null: all are height x width."""
    reference_pixels: Count | None = None
    """Pixels of all references of a prompt together; null: each further one has as many as the picture drawn."""
    max_sequence_length: Count = 256
    """T5 tokens of a prompt."""
    embedding_cache_gib: NonNegative = 4.0
    """Host memory for embeddings of prompts that come again, in GiB."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the transformer's blocks in rollout workers and learner; wants `learner.old_log_prob: replay`."""
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class RolloutConfig:
    """How groups of samples are drawn: T = `num_steps`, G = `group_size`, a = `noise_level` (paper section 4.1)."""

    workers: Count = 8
    """Processes that sample."""
    num_steps: Count = 10
    """Denoising steps of a sample (T)."""
    group_size: Count = 16
    """Samples of each prompt (G), which advantages are relative to."""
    prompts_per_rollout: Count = 32
    """Prompts, and so groups, of a rollout step."""
    chunk_size: Count = 8
    """Samples of one group that are drawn together as one unit of work."""
    noise_level: NoiseLevel = 0.7
    """Strength of the SDE's noise (a)."""
    variant: Literal["sde", "cps", "ode"] = "sde"
    """How a step draws noise: Flow-GRPO's SDE, coefficients-preserving sampling, or not at all."""
    guidance_scale: NonNegative = 4.5
    """Classifier-free guidance; up to 1 there is none."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    window_size: AtLeast0 = 0
    """Consecutive steps that are stochastic, from a first one drawn per group; 0: all steps."""
    window_first: AtLeast0 = 0
    """First step that the window may hold."""
    window_last: AtLeast0 = 10
    """First step behind the last that the window may hold."""
    branch: bool = False
    """A group's samples share their noise up to its first stochastic step (Flow-GRPO-Fast; not in the paper)."""
    max_failed_prompts: AtLeast0 = 16
    """Prompts of the whole run that may fail to be sampled before it stops."""


@dataclass
class EmaConfig:
    """Moving average of the adapter, which is what is evaluated and shipped (as Flow-GRPO does)."""

    enabled: bool = True
    """Off: the trained adapter itself is evaluated and shipped."""
    decay: Decay = 0.9
    """What remains of the average when it takes in an update."""
    every: Count = 8
    """Optimizer updates between two times that it takes one in."""


@dataclass
class LearnerConfig:
    """The objective (eq. 1 and 2) and its optimizer."""

    ranks: Count = 8
    """Data-parallel ranks."""
    zero_stage: ZeroStage = 1
    """DeepSpeed's ZeRO stage."""
    micro_batch_size: Count = 8
    """Samples of a forward pass; with `rollout.branch` a group is one row at its first stochastic step."""
    updates_per_rollout: Count = 2
    """Optimizer updates on the samples of each rollout."""
    learning_rate: Positive = 3e-4
    """Of AdamW."""
    final_learning_rate: Positive | None = None
    """The rate falls linearly over each stage towards this, after its last step; null keeps it constant (paper)."""
    adam_beta1: Decay = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: Decay = 0.999
    """AdamW's decay of the mean squared gradient."""
    adam_eps: Positive = 1e-8
    """AdamW's term against division by zero."""
    max_grad_norm: Positive = 1.0
    """Norm that gradients are clipped to."""
    max_skipped_updates: AtLeast0 = 3
    """Updates of the whole run that may be skipped, for a gradient that is not finite, before it stops."""
    clip_range: Positive = 1e-4
    """Epsilon: the importance ratio is clipped to 1 -/+ this (not in the paper)."""
    kl_beta: NonNegative = 0.04
    """Weight of the KL penalty; 0 does without the reference."""
    kl_form: Literal["without_dt", "exact"] = "without_dt"
    """without_dt: (mu - mu_ref)^2 / (2 g^2), for which the paper's .04 is meant; exact divides by -dt too (.004)."""
    kl_reference: Literal["stage_start", "base"] = "stage_start"
    """The policy that KL is measured from: the stage's first one, or the untrained model."""
    advantage_std: Literal["group", "batch"] = "group"
    """Whose standard deviation advantages are divided by."""
    advantage_eps: Positive = 1e-4
    """Added to that standard deviation."""
    advantage_clip: Positive = 5.0
    """Advantages are clipped to -/+ this."""
    cfg_gradient: Literal["conditional", "both"] = "conditional"
    """Which halves of guidance get a gradient: the prompted one, or the unconditional one too."""
    old_log_prob: Literal["rollout", "replay"] = "rollout"
    """Whose log-probabilities the ratio divides by: the rollout's, or the learner's own before its first update."""
    log_prob_tolerance: Positive | None = None
    """Bound of the mean gap between the rollout's and the learner's; null: 1e-5, with `replay` in bfloat16 1e-3."""
    train_steps: AtLeast0 = 0
    """Stochastic steps that are trained on, drawn per group; 0: all of them."""
    drop_last_steps: AtLeast0 = 1
    """Last steps that are not trained, whose log-probability is at the mercy of rounding."""
    ema: EmaConfig = field(default_factory=EmaConfig)

    def log_prob_bound(self, dtype: str) -> float:
        """The gate's bound, in nat an element on average over a step.

        A replica one update old is 8e-5 away (6.5e-4 at most). Equal shapes and eager kernels leave 0 in bfloat16 and
        1e-6 in float32; a compiled model, or batches of another size, up to 3e-4, which only `replay` puts up with: the
        hash of the weights alone tells then that a replica is stale.
        """
        if self.log_prob_tolerance is not None:
            return self.log_prob_tolerance
        return 1e-3 if dtype == "bfloat16" and self.old_log_prob == "replay" else 1e-5


@dataclass
class RehearsalConfig:
    """Holds a stage near its first policy on the other tasks of earlier stages (not in the paper)."""

    beta: Positive = MISSING
    """Weight of the mean squared change of velocity in each optimizer update."""
    num_prompts: Count = 256
    """Prompts of those stages, drawn once."""
    samples: Count = 32
    """Noised pictures of them in each update."""


@dataclass
class StageConfig:
    """One stage of the staged order (PDTR: editing, then text-to-image)."""

    name: FolderName = MISSING
    """What the stage is called in logs, metrics and files."""
    task: Literal["edit", "t2i", "joint"] = MISSING
    """What is trained; the `parts` of a joint stage take turns, one rollout each."""
    prompts: str | None = None
    """JSONL file of prompts; null in a joint stage."""
    steps: Count = MISSING
    """Rollout steps."""
    rewards: list[RewardConfig] = field(default_factory=list)
    parts: list[StagePartConfig] = field(default_factory=list)
    rehearsal: RehearsalConfig | None = None


@dataclass
class EvaluationTaskConfig:
    """Held-out prompts of one task and the rewards that score them."""

    task: Task = MISSING
    """What is evaluated."""
    prompts: str = MISSING
    """JSONL file of held-out prompts."""
    num_prompts: AtLeast2 = 512
    """How many of them, from the first."""
    rewards: list[RewardConfig] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """ODE sampling on held-out prompts before, between and after the stages, paired by prompt and seed."""

    tasks: list[EvaluationTaskConfig] = field(default_factory=list)
    num_steps: Count = 28
    """Denoising steps."""
    guidance_scale: NonNegative = 4.5
    """Classifier-free guidance; up to 1 there is none."""
    baseline_guidance: list[NonNegative] = field(default_factory=list)
    """Further guidance scales for the untrained model, so that guidance is not mistaken for learning."""
    batch_size: Count = 8
    """Pictures that are drawn together."""
    seed: Seed = 1234
    """What the noise is drawn from."""
    every: AtLeast0 = 0
    """Steps between evaluations of a stage's own task inside the stage; 0: none there."""
    cross_task_margin: NonNegative = 0.05
    """An alarm is raised when another task's score drops by more than this during a stage."""


@dataclass
class AlarmsConfig:
    """What becomes of a run when an alarm goes off at an evaluation. warn: a line in the log, `alarms.txt` and the
    report; stop: besides, the run saves and ends. To go on all the same, resume it with warn."""

    cross_task: AlarmAction = "warn"
    """A task that a stage does not train fell by more than `evaluation.cross_task_margin` over it."""
    reward_hacking: AlarmAction = "warn"
    """The trained reward rose on held-out prompts while the task's own score fell, each beyond its interval."""
    trained_task: AlarmAction = "warn"
    """The held-out score of the task that is trained fell beyond its interval, whatever its reward did."""


@dataclass
class ResourcesConfig:
    """Who gets what. CPUs and GPUs are Ray's logical ones, for each process. A resume may change all of it."""

    device: Annotated[Device, MOVES_BITS] = "cuda"
    """Where models run."""
    placement: Annotated[Literal["shared", "separate", "inprocess"], MOVES_BITS] = "shared"
    """shared: ranks and rollout workers take turns on a GPU; separate: GPUs of their own; inprocess: ranks sample."""
    rollout_cpus: NonNegative = 2.0
    """CPUs of a rollout worker."""
    learner_cpus: NonNegative = 4.0
    """CPUs of a learner rank."""
    reward_cpus: NonNegative = 2.0
    """CPUs of a reward worker."""
    reward_gpus: Annotated[NonNegative, MOVES_BITS] = 0.0
    """GPUs of a reward worker; a part of one joins a learner's under placement shared."""
    reward_workers: Count = 2
    """Processes that score."""
    reward_concurrency: Count = 4
    """Calls of a reward that one of them has under way at once."""
    encode_workers: Count = 1
    """Processes that encode prompts."""
    encode_cpus: NonNegative = 2.0
    """CPUs of one of them."""
    encode_gpus: Annotated[NonNegative, MOVES_BITS] = 0.0
    """GPUs of one of them; under placement shared it joins a learner's."""
    threads: Annotated[Count, MOVES_BITS] = 4
    """CPU threads that each process really uses."""
    placement_timeout_s: Positive = 600.0
    """Longest wait for the cluster's resources, in seconds."""
    start_timeout_s: Positive = 900.0
    """Longest wait for a process to be ready, in seconds."""
    call_timeout_s: Positive = 1800.0
    """Longest wait for the answer of a process, in seconds; a group's score may take longer where its rewards may."""
    stop_timeout_s: Positive = 120.0
    """Longest that a run asked to stop (Ctrl-C, SIGTERM) takes to save, in seconds; then it leaves without."""
    max_restarts: AtLeast0 = 3
    """Times that a worker is started again after it died."""
    learner_restarts: AtLeast0 = 3
    """Times that a lost learner rank (killed, hanging, machine failed, out of memory) has all ranks started again, from
    the last checkpoint. 3: a lost node should not idle all others until morning; a step that kills each time must end.
    """
    min_rollout_workers: Count = 1
    """Rollout workers that must be alive, or the run stops."""


@dataclass
class KeepBestConfig:
    """The best checkpoints by a held-out score, kept beside the last ones; of equal ones the earlier."""

    task: Task = MISSING
    """Task whose held-out mean decides; only a checkpoint evaluated at its step (`evaluation.every`) has one."""
    reward: str | None = None
    """Label of one of that task's rewards; null: their weighted sum."""
    count: Count = 1
    """How many."""


@dataclass
class CheckpointConfig:
    """What a run is resumed from. Those of stage borders are kept besides."""

    every: Count = 10
    """Steps between two."""
    keep_last: Count = 2
    """How many of the last ones are kept."""
    keep_best: KeepBestConfig | None = None


@dataclass
class GalleryConfig:
    """Fixed held-out prompts that are drawn again and again, and the best and worst group of such a step."""

    prompts: AtLeast0 = 8
    """Prompts per task; 0: no gallery."""
    every: Count = 10
    """Steps between two times that they are drawn (and scored), with the same seeds."""


@dataclass
class RunConfig:
    """A whole recipe."""

    name: FolderName = MISSING
    """What the run, and its folder in `output_dir`, is called."""
    output_dir: str = "runs"
    """Folder of runs."""
    seed: Seed = 0
    """What prompts, noise and fresh weights are drawn from."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    stages: list[StageConfig] = field(default_factory=list)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    gallery: GalleryConfig = field(default_factory=GalleryConfig)


def load_config(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    rules: Callable[[RunConfig], list[str]] | None = None,
    defer_values: bool = False,
) -> RunConfig:
    """Read a recipe of `rl.train`; the arguments are those of `read_recipe`, which raises ConfigError."""
    return read_recipe(recipe, overrides, RunConfig, rules=rules, defer_values=defer_values)
