"""Stage `vlm`: a small Qwen2.5-VL on captions, questions and edits of the shapes world."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from core.seeds import numpy_generator
from rewards.editreward.settings import RESULT_RUBRIC, RUBRIC
from worlds.shapes.training.config import VlmRecipe
from worlds.shapes.training.stage import StageLoss
from worlds.shapes.training.vlm_batch import Packer, VlmBatch
from worlds.shapes.training.vlm_compare import PictureComparer
from worlds.shapes.training.vlm_edits import PAIR_KINDS, pair_question, sample_pair
from worlds.shapes.training.vlm_model import read_rows, vision_features, vlm_config
from worlds.shapes.training.vlm_pictures import MAX_PIXELS, MERGE_SIZE, MIN_PIXELS, PATCH_SIZE
from worlds.shapes.training.vlm_questions import (
    SCENE_KINDS,
    Question,
    caption_question,
    scene_of_split,
    scene_question,
)
from worlds.shapes.training.vlm_tokenizer import vlm_tokenizer

_CORPUS_STREAM = 106


class VlmStage:
    """Cross-entropy of the answers' tokens, plus what `PictureComparer` asks of the pictures' tokens.

    The vision tower stays as stage `vision` made it.
    """

    def __init__(self, recipe: VlmRecipe) -> None:
        self.recipe = recipe
        visual = _load_tower(Path(recipe.vision) / "visual")
        self.tokenizer = vlm_tokenizer(corpus(recipe), max_vocabulary=recipe.model.max_vocabulary)
        self.packer = Packer(self.tokenizer, recipe)
        self.model = Qwen2_5_VLForConditionalGeneration(
            vlm_config(recipe.model, visual.config, self.tokenizer)
        )
        self.model.model.visual.load_state_dict(visual.state_dict())
        self.model.model.visual.requires_grad_(False)
        self.comparer = PictureComparer(visual.config.out_hidden_size)
        self.modules: list[nn.Module] = [self.model, self.comparer]

    def loss(self, step: int) -> StageLoss:
        batch = self.packer.batch(step)
        with torch.no_grad():
            tokens = vision_features(self.model.model.visual, batch.pixels)
        logits, middle = read_rows(self.model, batch, tokens, self.recipe.compare_layer)
        answers = F.cross_entropy(logits, batch.targets)
        compared, figures = self.comparer.loss(middle, batch)
        figures |= {"answers": answers.item(), "questions": float(len(batch.kinds))}
        return StageLoss(
            answers + self.recipe.compare_weight * compared, figures | exact_shares(logits, batch)
        )

    def sample_grid(self) -> None:
        """There is nothing to look at."""

    def export(self, folder: Path) -> dict[str, float]:
        """Write the released layout: model, tokenizer, image processor, chat template."""
        rounded = Qwen2_5_VLForConditionalGeneration(self.model.config)
        rounded.load_state_dict(self.model.state_dict())
        rounded.to(getattr(torch, self.recipe.export_dtype)).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        Qwen2VLImageProcessor(
            patch_size=PATCH_SIZE, merge_size=MERGE_SIZE, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
        ).save_pretrained(folder)
        return {"parameters": float(sum(p.numel() for p in rounded.parameters()))}


def _load_tower(folder: Path) -> Qwen2_5_VisionTransformerPretrainedModel:
    """Raises FileNotFoundError where there is none, ValueError where its weights do not fit its config one for one."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: no vision tower there; make it with recipes/shapes/vision.yaml")
    loaded: Any = Qwen2_5_VisionTransformerPretrainedModel.from_pretrained(folder, output_loading_info=True)
    tower, report = loaded
    wrong = {key: sorted(names) for key, names in report.items() if names}
    if wrong:
        raise ValueError(f"{folder}: weights and config.json differ: {wrong}")
    return tower.float()


def corpus(recipe: VlmRecipe) -> list[str]:
    """Texts that hold every word the model should know as one token."""
    rng = numpy_generator(recipe.seed, 0, _CORPUS_STREAM)
    questions: list[Question | None] = []
    for _ in range(recipe.vocabulary_scenes):
        scene, pair = scene_of_split(rng, "train"), sample_pair(rng, "train")
        questions += [scene_question(rng, scene, kind) for kind in SCENE_KINDS]
        questions += [pair_question(rng, pair, kind) for kind in PAIR_KINDS]
        questions.append(caption_question(rng, "train"))
    texts = ["user\nassistant\nsystem", "0123456789", RUBRIC, RESULT_RUBRIC]
    return texts + [text for q in questions if q is not None for text in (q.text, q.answer)]


def exact_shares(logits: Tensor, batch: VlmBatch) -> dict[str, float]:
    """Share of answers of each kind whose every token is predicted right: what greedy decoding would get right."""
    right = logits.detach().argmax(-1) == batch.targets
    exact = np.ones(len(batch.kinds), bool)
    exact[batch.conversations[~right].numpy()] = False
    found: dict[str, list[bool]] = defaultdict(list)
    for kind, value in zip(batch.kinds, exact.tolist(), strict=True):
        found[kind].append(value)
    return {f"exact_{kind}": float(np.mean(values)) for kind, values in found.items()}
