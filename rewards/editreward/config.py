"""The schema of an EditReward recipe: every key of `train`, `evaluate` and `export` with its bounds and meaning.

One YAML file describes all steps; each command reads the sections it knows. Rules that join several keys, and the
reader, live in `rewards/editreward/validate.py`. Needs neither torch nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import MinLen
from omegaconf import MISSING

from core.cluster.ranks import RankResources
from core.keys import (
    AtLeast0,
    AtLeast2,
    Count,
    Decay,
    Finite,
    FolderName,
    ModelDtype,
    NonNegative,
    OpenShare,
    Positive,
    Seed,
    Share,
    ZeroStage,
)
from core.training.schedule import AdamW

OTHER_SECTIONS = ("generate", "label", "serve")
"""Sections of the same file that other commands read."""


@dataclass
class LoraSection:
    """For `model.trainable: lora`."""

    rank: Count = 32
    """Rank of each adapter."""
    alpha: Positive = 64.0
    """Adapters are scaled by alpha / rank."""
    targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Ends of module names inside the language model."""


@dataclass
class ModelSection:
    """What training starts from, and which part of it learns."""

    path: str = MISSING
    """A released Qwen2.5-VL folder."""
    dtype: ModelDtype = "bfloat16"
    """Type that the model computes in."""
    trainable: Literal["full", "language", "lora", "head"] = "full"
    """language: language model and head, the vision tower as it is; lora: adapters on the language model, and head."""
    lora: LoraSection = field(default_factory=LoraSection)
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    score_bias: bool = True
    """Give the head a bias."""


@dataclass
class InputSection:
    """What the model is shown; saved with it. Pixels are of one picture; a token of a released model sees 28 x 28."""

    view: Literal["full", "result"] = "full"
    """result hides source and instruction: the baseline that a reward for editing has to beat."""
    rubric: str | None = None
    """The user text, with `{instruction}` once for the full view; null: that of `settings.py` for the view."""
    add_generation_prompt: bool = True
    """End the text where the assistant would begin."""
    min_pixels: Count = 4 * 28 * 28
    """Smaller pictures are enlarged to this."""
    max_pixels: Count = 512 * 512
    """Larger pictures are reduced to this."""


@dataclass
class DataSection:
    """Labelled edits. Shares are of source pictures, by hash."""

    shards: list[str] = field(default_factory=list)
    """Paths or globs of tar files; empty: what `label` wrote in the run's folder."""
    dimensions: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: ["overall"])
    """Names of the K label dimensions, an output of the model each."""
    score_low: Finite = 0.0
    """Lower end of the labels' scale."""
    score_high: Finite = 10.0
    """Upper end of the labels' scale."""
    combine: Literal["mean", "min", "geometric_mean"] = "mean"
    """Joins the K dimensions into the one score that is validated, evaluated and rewarded."""
    validation_share: OpenShare = 0.02
    """Sources to validate on."""
    test_share: OpenShare = 0.05
    """Sources to evaluate on."""
    split_salt: str = "editreward"
    """Another text gives other splits."""
    max_corrupt_share: NonNegative = 0.01
    """A larger share of broken samples is an error."""
    index_workers: Count = 4
    """Processes that index shards."""


@dataclass
class RankingSection:
    """Pairwise term -log sigmoid(z_better - z_worse) over edits of one (source, instruction)."""

    weight: NonNegative = 0.0
    """Beside the regression, which weighs 1; 0 = off."""
    group_size: Count = 4
    """Edits of a group that travel together through a micro-batch."""
    min_gap: NonNegative = 0.1
    """Pairs whose z-scored labels differ by this or less do not count."""


@dataclass
class OptimizationSection(AdamW):
    """How the weights move; the head at a rate of its own."""

    lr: Positive = 1e-5
    head_lr: Positive | None = None
    """That of the head; null: `lr`."""
    warmup_fraction: Decay = 0.03
    final_lr_fraction: Share = 0.1


@dataclass
class TrainSection:
    """Intervals are in steps; the last step of a run is validated and saved in any case."""

    steps: Count = MISSING
    """Length of the learning-rate schedule."""
    stop_step: AtLeast0 = 0
    """End after this many steps, part-way through the schedule; 0 = after `steps`."""
    batch_size: Count = 128
    """Samples of an optimizer step, over all ranks."""
    micro_batch_size: Count = 4
    """Samples of a forward pass."""
    ranks: Count = 8
    """Data-parallel ranks."""
    zero_stage: ZeroStage = 2
    """DeepSpeed's ZeRO stage."""
    loss: Literal["mse", "huber"] = "mse"
    """On z-scored labels."""
    huber_delta: Positive = 1.0
    """Where the Huber loss turns linear, in z-scores."""
    ranking: RankingSection = field(default_factory=RankingSection)
    optimization: OptimizationSection = field(default_factory=OptimizationSection)
    loader_workers: AtLeast0 = 4
    """Processes of a rank that read and decode samples; 0: the rank itself."""
    log_every: Count = 10
    """Steps between records of metrics.jsonl."""
    evaluate_every: Count = 200
    """Steps between validations."""
    validation_samples: AtLeast2 = 2048
    """Samples of a validation, in whole groups."""
    best_by: Literal["spearman", "group_spearman"] = "spearman"
    """What makes weights the best: over all samples, or averaged within (source, instruction) groups."""
    save_every: Count = 200
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the last ones are kept."""


@dataclass
class PairSetSection:
    """A public set of preferences: JSON or JSONL of {source, instruction, first, second, preference}."""

    name: str = MISSING
    """What the set is called in reports."""
    path: str = MISSING
    """Its file; picture paths are relative to it."""
    fields: dict[str, str] = field(default_factory=dict)
    """The set's own names of those keys, for example {first: left_output_image}."""
    preferences: dict[str, str] = field(default_factory=dict)
    """What its preferences mean, for example {leftvote: first, rightvote: second, tievote: tie}."""


@dataclass
class ProbesSection:
    """Edits made worse on purpose, each kind of which must lower the score."""

    samples: AtLeast2 = 256
    """Edits of a probe."""
    min_drop: NonNegative = 1.0
    """Least drop, in standard deviations of the score."""


@dataclass
class EvaluateSection:
    """How an exported model is measured."""

    split: Literal["test", "validation", "train"] = "test"
    """On which sources."""
    max_samples: AtLeast0 = 0
    """Samples at most, in whole groups; 0: all."""
    batch_size: Count = 8
    """Samples of a forward pass."""
    resamples: Count = 1000
    """Of the bootstrap behind every interval."""
    tie_margin: NonNegative = 0.0
    """Label units within which two labels count as a tie."""
    probes: ProbesSection = field(default_factory=ProbesSection)
    pair_sets: list[PairSetSection] = field(default_factory=list)


@dataclass
class Header:
    """The keys that all commands share. Everything is written under `output_dir/name`."""

    name: FolderName = MISSING
    """What the run, and its folder in `output_dir`, is called."""
    output_dir: str = "runs"
    """Folder of runs."""
    seed: Seed = 0
    """What fresh weights, orders and draws come from."""

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser().absolute() / self.name


@dataclass
class Recipe(Header):
    """A whole recipe, as far as training goes."""

    model: ModelSection = field(default_factory=ModelSection)
    input: InputSection = field(default_factory=InputSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    resources: RankResources = field(default_factory=RankResources)
