"""The recipe schema of `worlds.shapes.training.train`: one dataclass per stage, read strictly."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.training.schedule import Optimization


class RecipeError(ValueError):
    """A recipe that cannot be run; the message lists every problem found."""


@dataclass
class Recipe:
    """What every stage shares."""

    stage: str = MISSING
    output_dir: str = MISSING
    seed: int = 0
    steps: int = MISSING
    """Length of the learning-rate schedule."""
    stop_step: int = 0
    """Export and end after this many steps, part-way through the schedule; 0 = after `steps`."""
    batch_size: int = 32
    threads: int = 1
    optimization: Optimization = field(default_factory=Optimization)
    log_every: int = 50
    """Steps between lines of metrics.jsonl; each holds means since the line before."""
    sample_every: int = 1000
    """Steps between sample grids; 0 = none."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    export_dtype: str = "bfloat16"


@dataclass
class VaeModel:
    block_out_channels: list[int] = field(default_factory=lambda: [16, 32, 48, 64])
    layers_per_block: int = 1
    latent_channels: int = 16
    norm_num_groups: int = 8


@dataclass
class VaeRecipe(Recipe):
    model: VaeModel = field(default_factory=VaeModel)
    l1_weight: float = 1.0
    """Weight of the absolute error beside the squared error (which weighs 1)."""
    kl_weight: float = 1e-3
    """Weight of the KL per latent element, against reconstruction error per pixel value."""
    statistics_images: int = 2048
    """Images from which the latents' shift and scale are measured at the end."""


@dataclass
class TextModel:
    max_vocabulary: int = 400
    """Entries of each tokenizer at most, special tokens included."""
    clip_length: int = 12
    """Tokens of a CLIP prompt, start and end included."""
    clip_widths: tuple[int, int] = (64, 64)
    clip_layers: int = 3
    clip_projection: int = 64
    """Width of each CLIP's pooled projection; the pooled embedding is twice as wide."""
    t5_width: int = 128
    """Width of T5 and of the joint prompt embedding."""
    t5_layers: int = 2
    t5_length: int = 12
    head_dim: int = 32


@dataclass
class TextRecipe(Recipe):
    model: TextModel = field(default_factory=TextModel)
    vocabulary_captions: int = 20000
    """Captions and instructions, each, from which the tokenizers are made."""
    vision_width: int = 32
    """Width of the picture encoder's first layer; it is thrown away after training."""
    probe_captions: int = 2000
    """Captions on which the finished encoders are probed."""


@dataclass
class TransformerModel:
    layers: int = 4
    heads: int = 4
    head_dim: int = 32
    dual_attention_layers: list[int] = field(default_factory=lambda: [0, 1])
    patch_size: int = 1
    pos_embed_max_size: int = 8


@dataclass
class Targets:
    """Ends a run where its averaged weights reach a score in both tasks. At which step a task is learned is chance, so
    a fixed last step would give another model each time; until the end each task gets batches in proportion to what
    it lacks, so that both arrive together."""

    t2i: float = 0.0
    """Mean score of ODE samples at guidance 1; 0 for both tasks: the run ends by its steps."""
    edit: float = 0.0
    every: int = 100
    """Steps between two looks."""
    prompts: int = 512
    """Held-out prompts a task and look; others than `worlds.shapes.training.evaluate` asks."""


@dataclass
class KontextRecipe(Recipe):
    model: TransformerModel = field(default_factory=TransformerModel)
    vae: str = MISSING
    """Folder that holds `vae/`."""
    text: str = MISSING
    """Folder that holds `text_encoder{,_2,_3}/` and `tokenizer{,_2,_3}/`."""
    scheduler_shift: float = 3.0
    """Static shift of the sigma table, and of the training timesteps."""
    pool_size: int = 50000
    """Encoded samples of each task, drawn once, kept in `pool_dir` and reused by later runs."""
    pool_dir: str = MISSING
    pool_seed: int = 0
    prompt_dropout: float = 0.1
    edit_share: float = 0.5
    """Share of batches that are editing; batches alternate, they never mix tasks. `targets` change it at each look."""
    preview_steps: int = 10
    targets: Targets = field(default_factory=Targets)


@dataclass
class VisionModel:
    """Sizes of the vision tower of a Qwen2.5-VL."""

    layers: int = 3
    width: int = 96
    heads: int = 3
    mlp_width: int = 192
    token_width: int = 128
    """Of its tokens: the hidden size of the language model that reads them."""


@dataclass
class Disturbance:
    """What is done to training pictures, since those that a model draws are not exact."""

    share: float = 0.6
    """Of the pictures that get blur and noise, each of random strength."""
    blur: float = 0.6
    """Largest weight of the 3 x 3 mean."""
    noise: float = 0.08
    """Largest standard deviation of noise on [0, 1]."""


@dataclass
class VisionRecipe(Recipe):
    model: VisionModel = field(default_factory=VisionModel)
    disturbance: Disturbance = field(default_factory=Disturbance)
    probe_pictures: int = 2000
    """Held-out pictures on which the finished tower is probed."""


@dataclass
class VlmModel:
    """Sizes of the language model. Its heads are 64 wide (what vLLM serves), its hidden size 64 times their number."""

    max_vocabulary: int = 1000
    layers: int = 4
    heads: int = 2
    mlp_width: int = 256


@dataclass
class VlmRecipe(Recipe):
    """`batch_size` counts rows: no, one or two pictures with several questions about them."""

    model: VlmModel = field(default_factory=VlmModel)
    vision: str = MISSING
    """Folder that holds `visual/`, the trained tower; it stays as it is."""
    disturbance: Disturbance = field(default_factory=Disturbance)
    pair_share: float = 0.5
    """Share of rows that show source and result of an edit."""
    text_share: float = 0.1
    """Share of rows without a picture."""
    compare_layer: int = 1
    """After this many layers a second picture's tokens must know what stood at their place in the first."""
    compare_weight: float = 0.3
    """Weight of the loss that asks for it, beside the answers' (which weighs 1)."""
    row_tokens: int = 176
    """Tokens of a row at most, its pictures' included: as many conversations as they have room for."""
    questions_of_scene: int = 12
    questions_of_text: int = 8
    """Conversations of a row at most."""
    questions_of_either: int = 3
    """Of a row with two pictures, those about one of them; three more are about both."""
    vocabulary_scenes: int = 2000
    """Scenes and pairs from whose questions the tokenizer is made."""


RECIPES: dict[str, type[Recipe]] = {
    "vae": VaeRecipe,
    "text": TextRecipe,
    "kontext": KontextRecipe,
    "vision": VisionRecipe,
    "vlm": VlmRecipe,
}

R = TypeVar("R", bound=Recipe)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and `key.sub=value` overrides into the dataclass of its stage.

    Raises:
        RecipeError: file missing, stage unknown, keys unknown (each with the nearest known one), values of
            the wrong type, or required keys without a value.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe")
    given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    if not isinstance(given, DictConfig):
        raise RecipeError(f"{path}: a recipe is a mapping of keys, this is a list")
    stage = given.get("stage")
    if stage not in RECIPES:
        raise RecipeError(f"{path}: stage={stage!r} is not one of {', '.join(RECIPES)}")
    schema = RECIPES[stage]
    problems = _unknown_keys(OmegaConf.to_container(given), schema)
    if problems:
        raise RecipeError(f"{path}: " + "; ".join(problems))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{path}: {str(error).splitlines()[0]} (key {error.full_key})") from error
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise RecipeError(f"{path}: no value for {', '.join(missing)}")
    recipe = OmegaConf.to_object(merged)
    assert isinstance(recipe, Recipe)
    problems = _bad_values(recipe)
    if problems:
        raise RecipeError(f"{path}: " + "; ".join(problems))
    return recipe


def _unknown_keys(given: Any, schema: type, prefix: str = "") -> list[str]:
    known = {item.name: item.type for item in fields(schema)}
    problems = []
    for key, value in given.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(sorted(known))}"
            problems.append(f"unknown key {prefix}{key}: {hint}")
        elif isinstance(value, dict) and is_dataclass(known[key]):
            problems += _unknown_keys(value, known[key], f"{prefix}{key}.")  # type: ignore[arg-type]
    return problems


def _bad_values(recipe: Recipe) -> list[str]:
    problems = [
        f"{name}={getattr(recipe, name)} must be at least 1"
        for name in ("steps", "batch_size", "threads", "log_every", "save_every", "keep_checkpoints")
        if getattr(recipe, name) < 1
    ]
    if recipe.export_dtype not in ("bfloat16", "float16", "float32"):
        problems.append(f"export_dtype={recipe.export_dtype} is not bfloat16, float16 or float32")
    if not 0 <= recipe.stop_step <= recipe.steps:
        problems.append(f"stop_step={recipe.stop_step} must be in [0, steps={recipe.steps}]")
    if not 0 <= recipe.optimization.ema_decay < 1:
        problems.append(f"optimization.ema_decay={recipe.optimization.ema_decay} must be in [0, 1)")
    if isinstance(recipe, KontextRecipe):
        for name in ("prompt_dropout", "edit_share"):
            if not 0 <= getattr(recipe, name) <= 1:
                problems.append(f"{name}={getattr(recipe, name)} must be in [0, 1]")
        problems += _bad_targets(recipe)
    if isinstance(recipe, VlmRecipe):
        if not 1 <= recipe.compare_layer <= recipe.model.layers:
            problems.append(
                f"compare_layer={recipe.compare_layer} must be in [1, model.layers={recipe.model.layers}]"
            )
        if min(recipe.pair_share, recipe.text_share) < 0 or recipe.pair_share + recipe.text_share > 1:
            problems.append(
                f"pair_share={recipe.pair_share} and text_share={recipe.text_share} must not be negative, nor above 1 "
                "together"
            )
    return problems


def _bad_targets(recipe: KontextRecipe) -> list[str]:
    targets = recipe.targets
    problems = [
        f"targets.{name}={getattr(targets, name)} must be at least 1"
        for name in ("every", "prompts")
        if getattr(targets, name) < 1
    ]
    scores = {"t2i": targets.t2i, "edit": targets.edit}
    problems += [
        f"targets.{task}={value} must be in [0, 1]" for task, value in scores.items() if not 0 <= value <= 1
    ]
    if 0 in scores.values() and any(scores.values()):
        problems.append(
            f"targets.t2i={targets.t2i} and targets.edit={targets.edit}: give both, or 0 for both"
        )
    if problems or not any(scores.values()):
        return problems
    # A look decides the batches up to the next one: a run resumed between two could not repeat them.
    return [
        f"{name}={getattr(recipe, name)} must be a multiple of targets.every={targets.every}"
        for name in ("save_every", "stop_step")
        if getattr(recipe, name) % targets.every
    ]
