"""The recipe schema of `worlds.shapes.training.train`: one dataclass per stage."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import MinLen
from omegaconf import MISSING

from core.keys import AtLeast0, Count, NonNegative, Positive, Seed, Share
from core.recipe import read_recipe
from core.training.schedule import Optimization

Stage = Literal["vae", "text", "kontext", "vision", "vlm"]


@dataclass
class _StageOnly:
    """Which of the schemas a recipe is of."""

    open_ended: ClassVar[bool] = True

    stage: Stage = MISSING


@dataclass
class Recipe:
    """What every stage shares."""

    stage: Stage = MISSING
    """Which part of a base model is trained."""
    output_dir: str = MISSING
    """Folder that everything is written to."""
    seed: Seed = 0
    """What fresh weights, noise and batches are drawn from."""
    steps: Count = MISSING
    """Length of the learning-rate schedule."""
    stop_step: AtLeast0 = 0
    """Export and end after this many steps, part-way through the schedule; 0 = after `steps`."""
    batch_size: Count = 32
    """Samples of an optimizer step; of stage vlm rows, of no, one or two pictures with questions about them."""
    threads: Count = 1
    """CPU threads."""
    optimization: Optimization = field(default_factory=Optimization)
    """How weights move."""
    log_every: Count = 50
    """Steps between lines of metrics.jsonl; each holds means since the line before."""
    sample_every: AtLeast0 = 1000
    """Steps between sample grids; 0 = none."""
    save_every: Count = 1000
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """How many of the last ones are kept."""
    export_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the exported weights."""


@dataclass
class VaeModel:
    """Sizes of the VAE."""

    block_out_channels: Annotated[list[Count], MinLen(1)] = field(default_factory=lambda: [16, 32, 48, 64])
    """Channels of each block; all but the last halve the picture's sides."""
    layers_per_block: Count = 1
    """Residual layers of a block."""
    latent_channels: Count = 16
    """Channels of a latent."""
    norm_num_groups: Count = 8
    """Groups of a group norm, which divide the channels."""


@dataclass
class VaeRecipe(Recipe):
    """The VAE, on drawn scenes."""

    model: VaeModel = field(default_factory=VaeModel)
    l1_weight: NonNegative = 1.0
    """Weight of the absolute error beside the squared error (which weighs 1)."""
    kl_weight: NonNegative = 1e-3
    """Weight of the KL per latent element, against reconstruction error per pixel value."""
    statistics_images: Count = 2048
    """Images from which the latents' shift and scale are measured at the end."""


@dataclass
class TextModel:
    """Sizes of the three text encoders."""

    max_vocabulary: Count = 400
    """Entries of each tokenizer at most, special tokens included."""
    clip_length: Count = 12
    """Tokens of a CLIP prompt, start and end included."""
    clip_widths: tuple[Count, Count] = (64, 64)
    """Widths of the two CLIPs."""
    clip_layers: Count = 3
    """Layers of each CLIP."""
    clip_projection: Count = 64
    """Width of each CLIP's pooled projection; the pooled embedding is twice as wide."""
    t5_width: Count = 128
    """Width of T5 and of the joint prompt embedding."""
    t5_layers: Count = 2
    """Layers of T5."""
    t5_length: Count = 12
    """Tokens of a T5 prompt."""
    head_dim: Count = 32
    """Width of an attention head, in all three."""


@dataclass
class TextRecipe(Recipe):
    """The text encoders, trained against a picture encoder that is thrown away."""

    model: TextModel = field(default_factory=TextModel)
    vocabulary_captions: Count = 20000
    """Captions and instructions, each, from which the tokenizers are made."""
    vision_width: Count = 32
    """Width of the picture encoder's first layer; it is thrown away after training."""
    probe_captions: Count = 2000
    """Captions on which the finished encoders are probed."""


@dataclass
class TransformerModel:
    """Sizes of the transformer."""

    layers: Count = 4
    """Blocks."""
    heads: Count = 4
    """Attention heads."""
    head_dim: Count = 32
    """Width of a head."""
    dual_attention_layers: list[AtLeast0] = field(default_factory=lambda: [0, 1])
    """Blocks with a second attention, counted from 0."""
    patch_size: Count = 1
    """Side of a patch, in latent pixels."""
    pos_embed_max_size: Count = 8
    """Side of the position table, in patches."""


@dataclass
class Targets:
    """Ends a run where its averaged weights reach a score in both tasks. At which step a task is learned is chance, so
    a fixed last step would give another model each time; until the end each task gets batches in proportion to what
    it lacks, so that both arrive together."""

    t2i: Share = 0.0
    """Mean score of ODE samples at guidance 1; 0 for both tasks: the run ends by its steps."""
    edit: Share = 0.0
    """The same of editing; give both or none."""
    insert: Share = 0.0
    """The same of insertion, whose share of the batches stays as it is; 0: its score is not looked at."""
    every: Count = 100
    """Steps between two looks."""
    prompts: Count = 512
    """Held-out prompts a task and look; others than `worlds.shapes.training.evaluate` asks."""


@dataclass
class KontextRecipe(Recipe):
    """The transformer, by flow matching on text-to-image, editing and insertion from a second picture."""

    model: TransformerModel = field(default_factory=TransformerModel)
    vae: str = MISSING
    """Folder that holds `vae/`."""
    text: str = MISSING
    """Folder that holds `text_encoder{,_2,_3}/` and `tokenizer{,_2,_3}/`."""
    start: str = ""
    """Folder that holds the `transformer/` whose weights training starts from; empty: fresh ones."""
    scheduler_shift: Positive = 3.0
    """Static shift of the sigma table, and of the training timesteps."""
    pool_size: Count = 50000
    """Encoded samples of each task, drawn once, kept in `pool_dir` and reused by later runs."""
    pool_dir: str = MISSING
    """Folder of encoded samples."""
    pool_seed: Seed = 0
    """What they are drawn from."""
    prompt_dropout: Share = 0.1
    """Share of prompts that are replaced by the empty one."""
    edit_share: Share = 0.5
    """Share of batches that are editing; batches alternate, they never mix tasks. `targets` change it at each look."""
    insert_share: Share = 0.0
    """Share of batches that insert the object of a second picture; `edit_share` then is of the others."""
    preview_steps: Count = 10
    """Denoising steps of the sample grids."""
    targets: Targets = field(default_factory=Targets)
    """Scores to end at."""


@dataclass
class VisionModel:
    """Sizes of the vision tower of a Qwen2.5-VL."""

    layers: Count = 3
    """Blocks."""
    width: Count = 96
    """Width of the residual stream; a multiple of its heads."""
    heads: Count = 3
    """Attention heads."""
    mlp_width: Count = 192
    """Inner width of an MLP."""
    token_width: Count = 128
    """Of its tokens: the hidden size of the language model that reads them."""


@dataclass
class Disturbance:
    """What is done to training pictures, since those that a model draws are not exact."""

    share: Share = 0.6
    """Of the pictures that get blur and noise, each of random strength."""
    blur: Share = 0.6
    """Largest weight of the 3 x 3 mean."""
    noise: Share = 0.08
    """Largest standard deviation of noise on [0, 1]."""


@dataclass
class VisionRecipe(Recipe):
    """The vision tower of the VLM."""

    model: VisionModel = field(default_factory=VisionModel)
    disturbance: Disturbance = field(default_factory=Disturbance)
    """What is done to pictures."""
    probe_pictures: Count = 2000
    """Held-out pictures on which the finished tower is probed."""


@dataclass
class VlmModel:
    """Sizes of the language model. Its heads are 64 wide (what vLLM serves), its hidden size 64 times their number."""

    max_vocabulary: Count = 1000
    """Entries of the tokenizer at most, special tokens included."""
    layers: Count = 4
    """Blocks."""
    heads: Count = 2
    """Attention heads."""
    mlp_width: Count = 256
    """Inner width of an MLP."""


@dataclass
class VlmRecipe(Recipe):
    """The language model that answers questions about pictures."""

    model: VlmModel = field(default_factory=VlmModel)
    vision: str = MISSING
    """Folder that holds `visual/`, the trained tower; it stays as it is."""
    disturbance: Disturbance = field(default_factory=Disturbance)
    """What is done to pictures."""
    pair_share: Share = 0.5
    """Share of rows that show source and result of an edit."""
    text_share: Share = 0.1
    """Share of rows without a picture."""
    compare_layer: Count = 1
    """After this many layers a second picture's tokens must know what stood at their place in the first."""
    compare_weight: NonNegative = 0.3
    """Weight of the loss that asks for it, beside the answers' (which weighs 1)."""
    row_tokens: Count = 176
    """Tokens of a row at most, its pictures' included: as many conversations as they have room for."""
    questions_of_scene: Count = 12
    """Conversations of a row with one picture at most."""
    questions_of_text: Count = 8
    """Conversations of a row without a picture at most."""
    questions_of_either: AtLeast0 = 3
    """Of a row with two pictures, those about one of them; three more are about both."""
    vocabulary_scenes: Count = 2000
    """Scenes and pairs from whose questions the tokenizer is made."""


RECIPES: dict[str, type[Recipe]] = {
    "vae": VaeRecipe,
    "text": TextRecipe,
    "kontext": KontextRecipe,
    "vision": VisionRecipe,
    "vlm": VlmRecipe,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and `key.sub=value` overrides into the dataclass of its stage.

    Raises ConfigError listing every problem of its keys and values.
    """
    stage = read_recipe(path, overrides, _StageOnly).stage
    return read_recipe(path, overrides, RECIPES[stage], rules=_broken_rules)


def _broken_rules(recipe: Recipe) -> list[str]:
    problems = []
    if recipe.stop_step > recipe.steps:
        problems.append(f"stop_step={recipe.stop_step} must be in [0, steps={recipe.steps}]")
    if isinstance(recipe, KontextRecipe):
        problems += _broken_targets(recipe)
    if isinstance(recipe, VlmRecipe):
        if recipe.compare_layer > recipe.model.layers:
            problems.append(
                f"compare_layer={recipe.compare_layer} must be in [1, model.layers={recipe.model.layers}]"
            )
        if recipe.pair_share + recipe.text_share > 1:
            problems.append(
                f"pair_share={recipe.pair_share} and text_share={recipe.text_share} must not be above 1 together"
            )
    return problems


def _broken_targets(recipe: KontextRecipe) -> list[str]:
    targets = recipe.targets
    if targets.insert and not (recipe.insert_share and targets.edit):
        return [
            f"targets.insert={targets.insert}: insert_share or the other targets are 0; give those too, or 0 here"
        ]
    if not (targets.t2i or targets.edit):
        return []
    if not (targets.t2i and targets.edit):
        return [f"targets.t2i={targets.t2i} and targets.edit={targets.edit}: give both, or 0 for both"]
    # A look decides the batches up to the next one: a run resumed between two could not repeat them.
    return [
        f"{name}={getattr(recipe, name)} must be a multiple of targets.every={targets.every}"
        for name in ("save_every", "stop_step")
        if targets.every > 0 and getattr(recipe, name) % targets.every
    ]
