"""The schema of an EditReward recipe: every key of `train`, `evaluate` and `export`, its type, its one default.

One YAML file describes all steps; each command reads the sections it knows. Loading needs neither torch nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from core.recipe import ConfigError, read_recipe

OTHER_SECTIONS = ("generate", "label", "serve")
"""Sections of the same file that other commands read."""


@dataclass
class LoraSection:
    """For `model.trainable: lora`. `targets` are ends of module names inside the language model."""

    rank: int = 32
    alpha: float = 64.0
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )


@dataclass
class ModelSection:
    """`path`: a released Qwen2.5-VL folder. `trainable`: full, language (language model and
    head, the vision tower as it is), lora (adapters on the language model, and the head), or head."""

    path: str = MISSING
    dtype: str = "bfloat16"
    trainable: str = "full"
    lora: LoraSection = field(default_factory=LoraSection)
    gradient_checkpointing: bool = True
    score_bias: bool = True


@dataclass
class InputSection:
    """What the model is shown; saved with it. `rubric: null` is the one of `settings.py` for the view.

    `view: result` hides source and instruction: the baseline that a reward for editing has to beat.
    Pixels are those of one picture; a token of a released model sees 28 x 28.
    """

    view: str = "full"
    rubric: str | None = None
    add_generation_prompt: bool = True
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 512 * 512


@dataclass
class DataSection:
    """`shards`: paths or globs of tar files (see `data.py`); empty: what `label` wrote in the run's folder.

    Shares are of source pictures, by hash.
    `combine` joins the K dimensions into the one score that is validated, evaluated and rewarded.
    """

    shards: list[str] = field(default_factory=list)
    dimensions: list[str] = field(default_factory=lambda: ["overall"])
    score_low: float = 0.0
    score_high: float = 10.0
    combine: str = "mean"
    validation_share: float = 0.02
    test_share: float = 0.05
    split_salt: str = "editreward"
    max_corrupt_share: float = 0.01
    index_workers: int = 4


@dataclass
class RankingSection:
    """Pairwise term -log sigmoid(z_better - z_worse) over edits of one (source, instruction); weight 0 = off.

    `group_size` edits of a group travel together through a micro-batch; pairs whose z-scored labels differ by
    `min_gap` or less do not count.
    """

    weight: float = 0.0
    group_size: int = 4
    min_gap: float = 0.1


@dataclass
class OptimizationSection:
    """AdamW; linear warm-up, then a cosine down to `final_lr_fraction`. `head_lr: null` = `lr`."""

    lr: float = 1e-5
    head_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.03
    final_lr_fraction: float = 0.1


@dataclass
class TrainSection:
    """`batch_size` samples an optimizer step, over all ranks. `loss`: mse or huber, on z-scored labels.

    `stop_step` > 0 ends the run part-way through its schedule. Intervals are in steps; the last step of a run is
    validated and saved in any case. `best_by`: spearman (over
    all validation samples) or group_spearman (averaged within (source, instruction) groups).
    """

    steps: int = MISSING
    stop_step: int = 0
    batch_size: int = 128
    micro_batch_size: int = 4
    ranks: int = 8
    zero_stage: int = 2
    loss: str = "mse"
    huber_delta: float = 1.0
    ranking: RankingSection = field(default_factory=RankingSection)
    optimization: OptimizationSection = field(default_factory=OptimizationSection)
    loader_workers: int = 4
    log_every: int = 10
    evaluate_every: int = 200
    validation_samples: int = 2048
    best_by: str = "spearman"
    save_every: int = 200
    keep_checkpoints: int = 2


@dataclass
class PairSetSection:
    """A public set of preferences: JSON or JSONL of {source, instruction, first, second, preference}.

    `fields` and `preferences` rename a set's own keys and words, for example `{first: left_output_image}` and
    `{leftvote: first, rightvote: second, tievote: tie}`. Picture paths are relative to the file.
    """

    name: str = MISSING
    path: str = MISSING
    fields: dict[str, str] = field(default_factory=dict)
    preferences: dict[str, str] = field(default_factory=dict)


@dataclass
class ProbesSection:
    """Each probe must lower the score by `min_drop` standard deviations of the score."""

    samples: int = 256
    min_drop: float = 1.0


@dataclass
class EvaluateSection:
    """`split`: test, validation or train. `tie_margin`: label units within which two labels count as a tie."""

    split: str = "test"
    max_samples: int = 0
    batch_size: int = 8
    resamples: int = 1000
    tie_margin: float = 0.0
    probes: ProbesSection = field(default_factory=ProbesSection)
    pair_sets: list[PairSetSection] = field(default_factory=list)


@dataclass
class ResourcesSection:
    """`device`: cuda or cpu. CPUs are Ray's logical ones, for each rank; `threads` is what a rank really uses."""

    device: str = "cuda"
    rank_cpus: float = 8.0
    threads: int = 4
    placement_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0
    collective_timeout_s: float = 1800.0
    call_timeout_s: float = 7200.0


@dataclass
class Recipe:
    """A whole recipe, as far as training goes. Everything is written under `output_dir/name`."""

    name: str = MISSING
    output_dir: str = "runs"
    seed: int = 0
    model: ModelSection = field(default_factory=ModelSection)
    input: InputSection = field(default_factory=InputSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    resources: ResourcesSection = field(default_factory=ResourcesSection)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser().absolute() / self.name


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and `key.sub=value` overrides. Raises ConfigError listing every problem of its keys and values."""
    from rewards.editreward.validate import recipe_problems

    recipe = read_recipe(path, overrides or [], Recipe, others=OTHER_SECTIONS)
    problems = recipe_problems(recipe)
    if problems:
        raise ConfigError(problems)
    return recipe
