"""The schema of a flow-matching recipe: every key, its type, its one default. Loading needs neither torch nor Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from core.recipe import ConfigError, read_recipe
from pretrain.data.config import DataConfig

STAGES = ("kontext", "align", "unified")


@dataclass
class ConnectorSection:
    """Sizes of a fresh conditioner, by default the released one's; its other widths follow from VLM and transformer."""

    num_queries: int = 256
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 24
    num_attention_heads: int = 24


@dataclass
class ModelSection:
    """Where training starts.

    `path` holds `transformer/ vae/ scheduler/`, for stage kontext also the text encoders. With a VLM, `conditioner`
    is a folder that holds `conditioner/`; null starts fresh queries and a fresh connector of the given sizes.
    """

    path: str = MISSING
    vlm: str | None = None
    conditioner: str | None = None
    connector: ConnectorSection = field(default_factory=ConnectorSection)
    position_mode: str = "flat"
    max_sequence_length: int = 256
    """T5 tokens of a prompt."""
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = True
    compile: bool = False
    """Compile the blocks of transformer and connector."""


@dataclass
class TrainSection:
    """Which parts are trained; null is the stage's own choice: kontext the transformer, align queries and connector,
    unified all three. `connector` includes its projectors."""

    queries: bool | None = None
    connector: bool | None = None
    transformer: bool | None = None


@dataclass
class ReferencesSection:
    """Where the reference of an edit goes (paper Table 2): as latents to the transformer, as a picture to the VLM."""

    transformer: bool = True
    vlm: bool = True


@dataclass
class OptimizationSection:
    """AdamW; linear warm-up, then a cosine down to `final_lr_fraction`; no weight decay on 1-D parameters."""

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.05
    gradient_clip: float = 1.0
    warmup_fraction: float = 0.01
    final_lr_fraction: float = 0.0
    ema_decay: float = 0.9999


@dataclass
class DeepSpeedSection:
    """`offload`: none, optimizer (its states and the average in host memory) or parameters (weights too; ZeRO-3)."""

    zero_stage: int = 2
    offload: str = "none"


@dataclass
class SamplesSection:
    """Grids by the averaged weights every `every` steps (0: none): `count` fixed prompts of the data, each task."""

    every: int = 5000
    count: int = 8
    steps: int = 28
    guidance_scale: float = 3.5


@dataclass
class ResourcesSection:
    """`device`: cuda or cpu. `card` names the peak that MFU is measured on (a100, h100, h200); null: no MFU.

    CPUs are Ray's logical ones, for each rank; `threads` is what a rank really uses.
    """

    ranks: int = 8
    device: str = "cuda"
    card: str | None = None
    rank_cpus: float = 8.0
    threads: int = 4
    placement_timeout_s: float = 600.0
    start_timeout_s: float = 1800.0
    collective_timeout_s: float = 1800.0
    call_timeout_s: float = 7200.0


@dataclass
class FlowRecipe:
    """A whole recipe. Everything is written under `output_dir/name`."""

    name: str = MISSING
    output_dir: str = "runs"
    seed: int = 0
    stage: str = MISSING
    """kontext: the transformer with its own text encoders; align, unified: prompts through VLM and conditioner."""
    model: ModelSection = field(default_factory=ModelSection)
    train: TrainSection = field(default_factory=TrainSection)
    references: ReferencesSection = field(default_factory=ReferencesSection)
    data: DataConfig = field(default_factory=DataConfig)
    steps: int = MISSING
    """Length of the learning-rate schedule."""
    stop_step: int = 0
    """End after this many steps, part-way through the schedule; 0 = after `steps`."""
    batch_size: int = 128
    """Samples of an optimizer step, over all ranks."""
    micro_batch_size: int = 4
    timestep_shift: float = 3.0
    """Shift of the logit-normal(0, 1) noise levels."""
    optimization: OptimizationSection = field(default_factory=OptimizationSection)
    deepspeed: DeepSpeedSection = field(default_factory=DeepSpeedSection)
    log_every: int = 50
    """Steps between records of metrics.jsonl; each holds means since the one before."""
    save_every: int = 1000
    keep_checkpoints: int = 2
    samples: SamplesSection = field(default_factory=SamplesSection)
    export_dtype: str = "bfloat16"
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


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> FlowRecipe:
    """Read a recipe and `key.sub=value` overrides. Raises ConfigError listing every problem of its keys and values."""
    from pretrain.flow.validate import recipe_problems

    recipe = read_recipe(path, overrides or [], FlowRecipe)
    problems = recipe_problems(recipe)
    if problems:
        raise ConfigError(problems)
    return recipe
