"""Stage `vlm`: a small Qwen2.5-VL on captions, questions and edits of the shapes world."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor

from pretrain.config import VlmRecipe
from pretrain.randomness import numpy_generator
from pretrain.stage import StageLoss
from pretrain.vlm_batch import MERGE_SIZE, PATCH_SIZE, VLM_SIZE, Packer, VlmBatch, sample_scenes, shown
from pretrain.vlm_cells import CellReader, cell_labels
from pretrain.vlm_edits import PAIR_KINDS, pair_question, sample_pair
from pretrain.vlm_model import answer_logits, vision_features, vlm_config
from pretrain.vlm_questions import SCENE_KINDS, Question, caption_question, scene_of_split, scene_question
from pretrain.vlm_tokenizer import vlm_tokenizer
from rewards.editreward.settings import RESULT_RUBRIC, RUBRIC

MIN_PIXELS, MAX_PIXELS = VLM_SIZE**2, 30 * 30
"""Limits that make 28 x 28 of a picture of 28 or of 32 (which would round to 35 x 35)."""
_CORPUS_STREAM = 106


class VlmStage:
    """Cross-entropy of the answers' tokens, each with weight 1."""

    def __init__(self, recipe: VlmRecipe) -> None:
        self.recipe = recipe
        self.tokenizer = vlm_tokenizer(corpus(recipe), max_vocabulary=recipe.model.max_vocabulary)
        self.packer = Packer(self.tokenizer, recipe)
        config = vlm_config(recipe.model, self.tokenizer)
        self.model = Qwen2_5_VLForConditionalGeneration(config)
        self.reader = CellReader(config.vision_config.out_hidden_size)
        self.modules: list[nn.Module] = [self.model, self.reader]

    def loss(self, step: int) -> StageLoss:
        if step < self.recipe.vision_steps:
            scenes = sample_scenes(self.recipe, step, self.recipe.vision_batch_size)
            tokens = vision_features(self.model.model.visual, shown(self.recipe, step, scenes))
            loss, share = self.reader.loss(tokens, cell_labels(scenes))
            return StageLoss(loss, {"cells": loss.item(), "cells_right": share})
        batch = self.packer.batch(step)
        tokens = vision_features(self.model.model.visual, batch.pixels)
        cells, share = self.reader.loss(tokens, cell_labels(batch.scenes))
        logits = answer_logits(self.model, batch, tokens.detach())
        answers = F.cross_entropy(logits, batch.targets)
        figures = {"answers": answers.item(), "cells": cells.item(), "cells_right": share}
        return StageLoss(answers + cells, {**figures, **exact_shares(logits, batch)})

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


def corpus(recipe: VlmRecipe) -> list[str]:
    """Texts that hold every word the model should know as one token."""
    rng = numpy_generator(recipe.seed, 0, _CORPUS_STREAM)
    questions: list[Question | None] = []
    for _ in range(recipe.vocabulary_scenes):
        scene, pair = scene_of_split(rng, "train"), sample_pair(rng, "train")
        questions += [scene_question(rng, scene, kind) for kind in SCENE_KINDS]
        questions += [pair_question(pair, kind) for kind in PAIR_KINDS]
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
