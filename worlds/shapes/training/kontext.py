"""Stage `kontext`: the whole DiT by flow matching, its tasks by turns, up to target scores."""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from core.pictures import contact_sheet
from core.training.randomness import torch_generator
from models.components import load_transformer, load_vae
from models.conditioning import ConditioningBatch
from models.folders import TEXT_PARTS
from models.kontext import KontextTransformer
from models.latents import decode_latents
from models.sampling import sample_latents, sigma_table
from pretrain.flow.loss import add_noise, draw_sigmas, prompt_dropout_mask, velocity_error
from worlds.shapes.scenes.edits import INSERT
from worlds.shapes.training.config import KontextRecipe
from worlds.shapes.training.evaluate import TASKS, Base, heldout_questions, score
from worlds.shapes.training.loop import Look, Stage, StageLoss, save_rounded
from worlds.shapes.training.pool import Pool, load_pool, load_text

_PREVIEWS = 12
_PREVIEW_STEP = 1 << 30
LEAST_SHARE = 0.1
"""Of the batches, that a task gets which lacks nothing: without any it would be forgotten."""
_PROMPT_SEED = 7


class KontextStage(Stage):
    """UniPic 2.0's Kontext training (section 3.1) on encoded samples of the shapes world."""

    def __init__(self, recipe: KontextRecipe) -> None:
        self.recipe = recipe
        self.edit_share = recipe.edit_share
        self.pool = load_pool(recipe)
        self.transformer = (
            load_transformer(recipe.start, dtype=torch.float32)
            if recipe.start
            else new_transformer(recipe, self.pool)
        )
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=recipe.scheduler_shift)
        self.vae = load_vae(recipe.vae)
        self.modules = [self.transformer]

    def loss(self, step: int) -> StageLoss:
        pool, recipe = self.pool, self.recipe
        task = task_of(step, self.edit_share, recipe.insert_share)
        generator = torch_generator(recipe.seed, step)
        rows = torch.randint(len(pool.t2i_text), (recipe.batch_size,), generator=generator)
        references: list[Tensor]
        if task == INSERT:
            references, clean, text = _insertion(pool, rows)
        elif task == "edit":
            references, clean, text = [pool.edit_sources[rows]], pool.edit_targets[rows], pool.edit_text[rows]
        else:
            references, clean, text = [], pool.t2i_latents[rows], pool.t2i_text[rows]
        dropped = prompt_dropout_mask(len(rows), recipe.prompt_dropout, generator)
        prompt = self._prompt(text.masked_fill(dropped, 0))
        sigma = draw_sigmas(len(rows), recipe.scheduler_shift, generator)
        noise = torch.randn(clean.shape, generator=generator)
        prediction = self.transformer(
            add_noise(clean, noise, sigma),
            *prompt,
            1000 * sigma,
            reference_hidden_states=references,
            return_dict=False,
        )[0]
        loss = velocity_error(prediction, clean, noise).mean()
        return StageLoss(loss, {f"loss_{task}": loss.item()})

    def sample_grid(self) -> Image.Image:
        """Row 1: text-to-image. Rows 2 to 4: source, edited, one right target. At guidance 1."""
        pool, rows = self.pool, torch.arange(_PREVIEWS)
        drawn = self._sample(pool.t2i_text[rows], None)
        edited = self._sample(pool.edit_text[rows], pool.edit_sources[rows])
        pictures = [
            drawn,
            self._decode(pool.edit_sources[rows]),
            edited,
            self._decode(pool.edit_targets[rows]),
        ]
        return contact_sheet(pictures)

    def export(self, folder: Path) -> dict[str, float]:
        """Write `transformer/` and `scheduler/`, and copy the other parts beside them: a whole base."""
        parameters = save_rounded(self.transformer, folder / "transformer", self.recipe.export_dtype)
        self.scheduler.save_pretrained(folder / "scheduler")
        shutil.copytree(Path(self.recipe.vae) / "vae", folder / "vae", dirs_exist_ok=True)
        for part in TEXT_PARTS:
            shutil.copytree(Path(self.recipe.text) / part, folder / part, dirs_exist_ok=True)
        return {"parameters": parameters}

    def _prompt(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.pool.prompt_embeds[rows], self.pool.pooled_embeds[rows]

    def _sample(self, text: Tensor, references: Tensor | None) -> np.ndarray:
        shape = (len(text), *self.pool.t2i_latents.shape[1:])
        noise = torch.randn(shape, generator=torch_generator(self.recipe.seed, _PREVIEW_STEP))
        prompts = ConditioningBatch(*self._prompt(text), () if references is None else (references,))
        sigmas = sigma_table(self.scheduler, self.recipe.preview_steps)
        return self._decode(sample_latents(self.transformer, sigmas, noise, prompts, 1.0))

    def _decode(self, latents: Tensor) -> np.ndarray:
        return decode_latents(self.vae, latents).numpy()


class ScoreTargets:
    """Scores a stage as `evaluate` does at guidance 1, on held-out prompts that it does not ask, and deals the
    batches until the next look to the tasks in proportion to what they lack."""

    def __init__(self, recipe: KontextRecipe, stage: KontextStage) -> None:
        """Loads the text encoders of the recipe's `text`. Raises FileNotFoundError as their loader does."""
        self.stage, self.steps, self.every = stage, recipe.preview_steps, recipe.targets.every
        named = {"t2i": recipe.targets.t2i, "edit": recipe.targets.edit, INSERT: recipe.targets.insert}
        self.targets = {task: target for task, target in named.items() if target}
        self.questions = {
            task: heldout_questions(task, recipe.targets.prompts, _PROMPT_SEED) for task in self.targets
        }
        self.base = Base(stage.transformer, stage.vae, stage.scheduler, load_text(recipe.text))

    def look(self) -> Look:
        """Mean scores of the stage's weights as they are now; sets `stage.edit_share`."""
        scores = {task: self._score(task) for task in self.targets}
        self.stage.edit_share = edit_share(scores, self.targets)
        figures = {f"score_{task}": value for task, value in scores.items()}
        return Look(
            {**figures, "edit_share": self.stage.edit_share},
            reached=all(scores[task] >= target for task, target in self.targets.items()),
        )

    def _score(self, task: str) -> float:
        questions = self.questions[task]
        drawn = self.base.draw(questions, 1.0, self.steps, _PROMPT_SEED)
        return float(score(task, questions, drawn).mean())


def edit_share(scores: Mapping[str, float], targets: Mapping[str, float]) -> float:
    """Editing's part of what text-to-image and editing lack, within [LEAST_SHARE, 1 - LEAST_SHARE]; .5 of nothing."""
    lacks = {task: max(targets[task] - scores[task], 0.0) for task in TASKS}
    total = sum(lacks.values())
    share = lacks["edit"] / total if total else 0.5
    return min(max(share, LEAST_SHARE), 1 - LEAST_SHARE)


def task_of(step: int, edit_share: float, insert_share: float = 0.0) -> str:
    """`insert`, else `edit` or `t2i`: which task the batch of a step is, evenly spread (share .5 alternates)."""
    before = int(step * insert_share)
    if int((step + 1) * insert_share) > before:
        return INSERT
    left = step - before
    return "edit" if int((left + 1) * edit_share) > int(left * edit_share) else "t2i"


def _insertion(pool: Pool, rows: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Both references, target and text of some samples of insertion."""
    found = (pool.insert_sources, pool.insert_shown, pool.insert_targets, pool.insert_text)
    sources, shown, targets, text = (tensor[rows] for tensor in found if tensor is not None)
    return [sources, shown], targets, text


def new_transformer(recipe: KontextRecipe, pool: Pool) -> KontextTransformer:
    """SD3's architecture at the recipe's size, widths taken from the latents and texts.

    Modulation and output layers start at zero, so that each block starts as the identity (DiT's adaLN-zero).
    """
    model = recipe.model
    channels, side = pool.t2i_latents.shape[1], pool.t2i_latents.shape[-1]
    transformer = KontextTransformer(
        sample_size=side,
        patch_size=model.patch_size,
        in_channels=channels,
        out_channels=channels,
        num_layers=model.layers,
        attention_head_dim=model.head_dim,
        num_attention_heads=model.heads,
        caption_projection_dim=model.heads * model.head_dim,
        joint_attention_dim=pool.prompt_embeds.shape[-1],
        pooled_projection_dim=pool.pooled_embeds.shape[-1],
        pos_embed_max_size=model.pos_embed_max_size,
        dual_attention_layers=tuple(model.dual_attention_layers),
        qk_norm="rms_norm",
    )
    modulations = [
        m for name, m in transformer.named_modules() if name.endswith((".linear", "norm_out.linear"))
    ]
    for layer in [*modulations, transformer.proj_out]:
        assert isinstance(layer, nn.Linear)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer
