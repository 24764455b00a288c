"""The schema of a recipe: every key, its type, its one default. Loading needs neither torch nor ray.

A recipe is YAML, merged over these defaults, then `key=value` overrides from the command line. Unknown keys are
refused with the nearest known name. Rules that join several keys live in `rl/recipe/validate.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import recipes
from core.recipe import ConfigError, apply_overrides, read_over_bases
from models.lora.targets import DEFAULT_TARGETS


@dataclass
class LoraConfig:
    """Paper section 4.1: r = 32, alpha = 64. `targets` are module-name suffixes inside a transformer block."""

    rank: int = 32
    alpha: float = 64.0
    targets: list[str] = field(default_factory=lambda: list(DEFAULT_TARGETS))


@dataclass
class ModelConfig:
    """`path` is a folder in the released layout; sizes are in pixels.

    With `conditioner/` in it the model is a UniPic2-MetaQuery, and `vlm` is the folder of its Qwen2.5-VL, which sees
    positions by `position_mode`: flat, as the released inference does, or mrope. `compile` compiles the transformer's
    blocks in rollout workers and learner (half a minute at the start; bench/RESULTS.md has what it gains); it wants
    `learner.old_log_prob: replay`, since the two then differ by rounding.
    """

    path: str = MISSING
    vlm: str | None = None
    position_mode: str = "flat"
    dtype: str = "bfloat16"
    height: int = 512
    width: int = 512
    max_sequence_length: int = 256
    embedding_cache_gib: float = 4.0
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class RolloutConfig:
    """T = `num_steps`, G = `group_size`, a = `noise_level` (paper section 4.1).

    `chunk_size` samples of one group are one unit of work. `window_size` > 0 makes only that many consecutive
    steps stochastic, starting at a step drawn per group so that they lie in [window_first, window_last). `branch`: a
    group's samples share their initial noise and part at its first stochastic step (not in the paper; Flow-GRPO-Fast).
    """

    workers: int = 8
    num_steps: int = 10
    group_size: int = 16
    prompts_per_rollout: int = 32
    chunk_size: int = 8
    noise_level: float = 0.7
    variant: str = "sde"
    guidance_scale: float = 4.5
    negative_prompt: str = ""
    window_size: int = 0
    window_first: int = 0
    window_last: int = 10
    branch: bool = False
    max_failed_prompts: int = 16


@dataclass
class EmaConfig:
    """Moving average of the adapter, which is what is evaluated and shipped (as Flow-GRPO does)."""

    enabled: bool = True
    decay: float = 0.9
    every: int = 8


@dataclass
class LearnerConfig:
    """The objective (eq. 1 and 2) and its optimizer.

    With `final_learning_rate` the rate falls linearly over each stage, from `learning_rate` at its first step towards
    this after its last; null keeps it constant (paper).

    `clip_range` is epsilon (not in the paper). `kl_form: without_dt` is (mu - mu_ref)^2 / (2 g^2), for which the
    paper's beta = .04 is meant; `exact` divides by -dt as well and wants about .004. `drop_last_steps` leaves
    out the end of the schedule, whose log-probability is at the mercy of rounding; `train_steps` > 0 trains on
    that many of the remaining steps, drawn per group. `log_prob_tolerance` bounds the gap between the rollout's
    log-probabilities and the learner's replay; null picks 1e-5 for float32 and 2e-2 for bfloat16. `micro_batch_size`
    counts samples; with `rollout.branch` those of one group are a single row at their first stochastic step.
    """

    ranks: int = 8
    zero_stage: int = 1
    micro_batch_size: int = 8
    updates_per_rollout: int = 2
    learning_rate: float = 3e-4
    final_learning_rate: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_grad_norm: float = 1.0
    clip_range: float = 1e-4
    kl_beta: float = 0.04
    kl_form: str = "without_dt"
    kl_reference: str = "stage_start"
    advantage_std: str = "group"
    advantage_eps: float = 1e-4
    advantage_clip: float = 5.0
    cfg_gradient: str = "conditional"
    old_log_prob: str = "rollout"
    log_prob_tolerance: float | None = None
    train_steps: int = 0
    drop_last_steps: int = 1
    ema: EmaConfig = field(default_factory=EmaConfig)


@dataclass
class ServiceConfig:
    """Where a reward is served over HTTP; see rewards/service/README.md. `token_env` names an environment variable."""

    urls: list[str] = field(default_factory=list)
    token_env: str | None = None
    codec: str = "png"
    unavailable_s: float = 120.0


@dataclass
class RewardConfig:
    """One reward of a stage or an evaluation; see rewards/README.md for the protocol and the failure policy.

    With `service` the reward is not loaded here: `python -m rewards.serve RECIPE` scores for this run.
    """

    name: str = MISSING
    label: str | None = None
    weight: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    attempts: int = 3
    on_missing: str = "mask"
    max_missing_share: float = 0.2
    constant_steps: int = 10
    service: ServiceConfig | None = None


@dataclass
class StagePartConfig:
    """One task of a joint stage."""

    task: str = MISSING
    prompts: str = MISSING
    rewards: list[RewardConfig] = field(default_factory=list)


@dataclass
class RehearsalConfig:
    """Holds a stage near its first policy on the other tasks of earlier stages (not in the paper).

    `num_prompts` prompts of those stages are drawn once; each optimizer update adds `beta` times the mean squared
    change of velocity at `samples` noised pictures of them.
    """

    beta: float = MISSING
    num_prompts: int = 256
    samples: int = 32


@dataclass
class StageConfig:
    """One stage of the staged order (PDTR: editing, then text-to-image). `steps` counts rollouts.

    With `task: joint` its `parts` take turns, one rollout each, and have prompts and rewards in the stage's place.
    """

    name: str = MISSING
    task: str = MISSING
    prompts: str | None = None
    steps: int = MISSING
    rewards: list[RewardConfig] = field(default_factory=list)
    parts: list[StagePartConfig] = field(default_factory=list)
    rehearsal: RehearsalConfig | None = None


@dataclass
class EvaluationTaskConfig:
    """Held-out prompts of one task and the rewards that score them."""

    task: str = MISSING
    prompts: str = MISSING
    num_prompts: int = 512
    rewards: list[RewardConfig] = field(default_factory=list)


@dataclass
class EvaluationConfig:
    """ODE sampling on held-out prompts before, between and after the stages, paired by prompt and seed.

    `every` > 0 also evaluates the stage's own task inside a stage. `baseline_guidance` lists further guidance
    scales at which the untrained model is scored, so that guidance is not mistaken for learning.
    `cross_task_margin`: an alarm is raised when another task drops by more than this during a stage.
    """

    tasks: list[EvaluationTaskConfig] = field(default_factory=list)
    num_steps: int = 28
    guidance_scale: float = 4.5
    baseline_guidance: list[float] = field(default_factory=list)
    batch_size: int = 8
    seed: int = 1234
    every: int = 0
    cross_task_margin: float = 0.05


@dataclass
class ResourcesConfig:
    """Who gets what. CPUs are Ray's logical CPUs; `threads` is what each process really uses.

    `shared`: a rollout worker and a learner rank on each GPU, and reward workers whose `reward_gpus` is a part of one
    (1 or more: cards of their own). `separate`: GPUs of their own. `inprocess`: the learner's ranks sample too, so
    there is nothing to publish over the network.
    """

    device: str = "cuda"
    placement: str = "shared"
    rollout_cpus: float = 2.0
    learner_cpus: float = 4.0
    reward_cpus: float = 2.0
    reward_gpus: float = 0.0
    reward_workers: int = 2
    reward_concurrency: int = 4
    encode_cpus: float = 2.0
    encode_gpus: float = 0.0
    threads: int = 4
    placement_timeout_s: float = 600.0
    start_timeout_s: float = 900.0
    call_timeout_s: float = 1800.0
    max_restarts: int = 3
    min_rollout_workers: int = 1


@dataclass
class CheckpointConfig:
    """Every `every` steps and at stage borders; the last `keep_last` are kept, and the border ones."""

    every: int = 10
    keep_last: int = 2


@dataclass
class GalleryConfig:
    """`prompts` fixed held-out prompts per task, drawn (and scored) again every `every` steps with the same seeds;
    pictures of the best and the worst group of such a step are kept too.
    """

    prompts: int = 8
    every: int = 10


@dataclass
class RunConfig:
    """A whole recipe."""

    name: str = MISSING
    output_dir: str = "runs"
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    stages: list[StageConfig] = field(default_factory=list)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    gallery: GalleryConfig = field(default_factory=GalleryConfig)


def load_config(recipe: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe and its overrides. Raises ConfigError with every unknown key, bad type and missing value.

    A recipe may name another one beside it as `base: other.yaml`; its own keys come over that one's. Lists (stages,
    rewards) are replaced whole.
    """
    path = recipes.resolve(recipe)
    if not path.is_file():
        raise ConfigError([f"recipe {recipe} does not exist (looked for {path.absolute()})"])
    try:
        merged = read_over_bases(path)
        if isinstance(merged, DictConfig):
            apply_overrides(merged, overrides or [])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError([f"{recipe}: {' '.join(str(error).split())}"]) from error
    if not isinstance(merged, DictConfig):
        raise ConfigError([f"{recipe}: a recipe is a mapping of keys, found a {type(merged).__name__}"])
    problems: list[str] = []
    if "oc.env" in OmegaConf.to_yaml(merged):
        problems.append(
            "a recipe must not read the environment (${oc.env:...}): its values are written beside the run; a reward "
            "reads its secrets from the environment itself, where it uses them"
        )
    _check_node(merged, RunConfig, "", problems)
    if problems:
        raise ConfigError(problems)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), merged))
    except OmegaConfBaseException as error:
        key = f"key '{error.full_key}': " if getattr(error, "full_key", None) else ""
        raise ConfigError([f"{key}{str(error).splitlines()[0]}"]) from error
    assert isinstance(config, RunConfig)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved recipe as YAML (written beside a run; holds no secrets, since none are read from recipes)."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _check_node(node: Any, schema: type, prefix: str, problems: list[str]) -> None:
    """Unknown keys, missing values and wrong types of a mapping and of everything below it."""
    fields = {f.name: f for f in dataclasses.fields(schema)}
    if not isinstance(node, DictConfig):
        problems.append(f"key '{prefix.rstrip('.')}' must be a mapping with keys {', '.join(fields)}")
        return
    for key in map(str, node):
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean '{prefix}{near[0]}'?" if near else f"known here: {', '.join(fields)}"
            problems.append(f"unknown key '{prefix}{key}': {hint}")
    for key, definition in fields.items():
        inner, child = _NESTED.get((schema, key)), node._get_node(key)
        if inner is None or (child is not None and child._is_none()):
            _check_value(node, key, definition, schema, prefix, problems)
        elif child is None and definition.default is None:
            continue
        elif "list" not in str(definition.type):
            _check_node(OmegaConf.create({}) if child is None else child, inner, f"{prefix}{key}.", problems)
        elif isinstance(child, ListConfig):
            for index in range(len(child)):
                _check_node(child._get_node(index), inner, f"{prefix}{key}[{index}].", problems)
        elif child is not None:
            problems.append(f"key '{prefix}{key}' must be a list of mappings")


def _check_value(
    node: DictConfig, key: str, definition: Any, schema: type, prefix: str, problems: list[str]
) -> None:
    """A key without a schema of its own. Interpolations are resolved, and checked, with the defaults."""
    if key not in node or OmegaConf.is_missing(node, key):
        if definition.default == MISSING:
            problems.append(f"key '{prefix}{key}' has no value; set it in the recipe or as {prefix}{key}=...")
        return
    if OmegaConf.is_interpolation(node, key):
        return
    try:
        OmegaConf.update(OmegaConf.structured(schema), key, node[key])
    except OmegaConfBaseException as error:
        problems.append(f"key '{prefix}{key}': {str(error).splitlines()[0]}")


_NESTED: dict[tuple[type, str], type] = {
    (RunConfig, "model"): ModelConfig,
    (RunConfig, "rollout"): RolloutConfig,
    (RunConfig, "learner"): LearnerConfig,
    (RunConfig, "stages"): StageConfig,
    (RunConfig, "evaluation"): EvaluationConfig,
    (RunConfig, "resources"): ResourcesConfig,
    (RunConfig, "checkpoint"): CheckpointConfig,
    (RunConfig, "gallery"): GalleryConfig,
    (ModelConfig, "lora"): LoraConfig,
    (LearnerConfig, "ema"): EmaConfig,
    (StageConfig, "rewards"): RewardConfig,
    (StageConfig, "parts"): StagePartConfig,
    (StageConfig, "rehearsal"): RehearsalConfig,
    (StagePartConfig, "rewards"): RewardConfig,
    (RewardConfig, "service"): ServiceConfig,
    (EvaluationConfig, "tasks"): EvaluationTaskConfig,
    (EvaluationTaskConfig, "rewards"): RewardConfig,
}
