"""The schema of a flow-matching recipe: every key with its type, bounds, one default and meaning.

Rules that join several keys, and the reader, live in `pretrain/flow/validate.py`. Needs neither torch nor Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omegaconf import MISSING

from core.cluster.ranks import RankResources
from core.keys import (
    AtLeast0,
    Count,
    Decay,
    FolderName,
    Guidance,
    ModelDtype,
    PositionMode,
    Positive,
    Seed,
    ZeroStage,
)
from core.training.schedule import AdamW
from pretrain.data.config import DataConfig


@dataclass
class ConnectorSection:
    """Sizes of a fresh conditioner, by default the released one's; its other widths follow from VLM and transformer."""

    num_queries: Count = 256
    """Learned queries, whose states condition the transformer."""
    hidden_size: Count = 1536
    """Width of the connector; a multiple of its heads."""
    intermediate_size: Count = 8960
    """Width of its MLPs."""
    num_hidden_layers: Count = 24
    """Its blocks."""
    num_attention_heads: Count = 24
    """Its attention heads."""


@dataclass
class ModelSection:
    """Where training starts."""

    path: str = MISSING
    """Folder that holds `transformer/ vae/ scheduler/`, for stage kontext also the text encoders."""
    vlm: str | None = None
    """Folder of the Qwen2.5-VL; null for stage kontext."""
    conditioner: str | None = None
    """Folder that holds `conditioner/`; null starts fresh queries and a fresh connector."""
    connector: ConnectorSection = field(default_factory=ConnectorSection)
    position_mode: PositionMode = "flat"
    """How the VLM sees positions."""
    max_sequence_length: Count = 256
    """T5 tokens of a prompt."""
    dtype: ModelDtype = "bfloat16"
    """Type that the models compute in."""
    gradient_checkpointing: bool = True
    """Compute activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Compile the blocks of transformer and connector."""


@dataclass
class TrainSection:
    """Which parts are trained; null is the stage's own choice: kontext the transformer, align queries and connector,
    unified all three."""

    queries: bool | None = None
    """Train the learned queries."""
    connector: bool | None = None
    """Train the connector with its projectors."""
    transformer: bool | None = None
    """Train the transformer."""


@dataclass
class ReferencesSection:
    """Where the reference of an edit goes (paper Table 2)."""

    transformer: bool = True
    """As latents to the transformer."""
    vlm: bool = True
    """As a picture to the VLM."""


@dataclass
class OptimizationSection(AdamW):
    """How weights move, and their average."""

    ema_decay: Decay = 0.9999
    """What remains of the averaged weights at each step."""


@dataclass
class DeepSpeedSection:
    """What is spread over the ranks, and what lies in host memory."""

    zero_stage: ZeroStage = 2
    """ZeRO stage."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """optimizer: its states and the average in host memory; parameters: weights too (ZeRO-3)."""


@dataclass
class SamplesSection:
    """Grids of pictures by the averaged weights."""

    every: AtLeast0 = 5000
    """Steps between grids; 0: none."""
    count: Count = 8
    """Fixed prompts of the data, each task."""
    steps: Count = 28
    """Denoising steps."""
    guidance_scale: Guidance = 3.5
    """Classifier-free guidance; up to 1 there is none."""


@dataclass
class ResourcesSection(RankResources):
    """Ranks and what each of them takes."""

    ranks: Count = 8
    """Data-parallel ranks."""
    card: Literal["a100", "h100", "h200"] | None = None
    """GPU whose peak MFU is measured on; null: no MFU."""


@dataclass
class FlowRecipe:
    """A whole recipe. Everything is written under `output_dir/name`."""

    name: FolderName = MISSING
    """What the run, and its folder in `output_dir`, is called."""
    output_dir: str = "runs"
    """Folder of runs."""
    seed: Seed = 0
    """What fresh weights, noise and batches are drawn from."""
    stage: Literal["kontext", "align", "unified"] = MISSING
    """kontext: the transformer with its own text encoders; align, unified: prompts through VLM and conditioner."""
    model: ModelSection = field(default_factory=ModelSection)
    train: TrainSection = field(default_factory=TrainSection)
    references: ReferencesSection = field(default_factory=ReferencesSection)
    data: DataConfig = field(default_factory=DataConfig)
    steps: Count = MISSING
    """Length of the learning-rate schedule."""
    stop_step: AtLeast0 = 0
    """End after this many steps, part-way through the schedule; 0 = after `steps`."""
    batch_size: Count = 128
    """Samples of an optimizer step, over all ranks."""
    micro_batch_size: Count = 4
    """Samples of a forward pass."""
    timestep_shift: Positive = 3.0
    """Shift of the logit-normal(0, 1) noise levels."""
    optimization: OptimizationSection = field(default_factory=OptimizationSection)
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    log_every: Count = 50
    """Steps between records of metrics.jsonl; each holds means since the one before."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the last ones are kept."""
    samples: SamplesSection = field(default_factory=SamplesSection)
    export_dtype: ModelDtype = "bfloat16"
    """Type of the exported weights."""
    resources: ResourcesSection = field(default_factory=ResourcesSection)

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir).expanduser().absolute() / self.name

    @property
    def end(self) -> int:
        """The step at which this run stops."""
        return self.stop_step or self.steps

    @property
    def uses_vlm(self) -> bool:
        """Whether prompts go through the VLM and the conditioner."""
        return self.stage != "kontext"

    @property
    def loads_vlm(self) -> bool:
        """Whether the VLM itself reads the prompts, or its states at the queries were cached."""
        return self.uses_vlm and not self.data.cache.queries

    def trains(self, part: str) -> bool:
        """Whether `queries`, `connector` or `transformer` is trained."""
        chosen: bool | None = getattr(self.train, part)
        own = {"kontext": ("transformer",), "align": ("queries", "connector")}
        return (
            part in own.get(self.stage, ("queries", "connector", "transformer")) if chosen is None else chosen
        )
