"""Stage `vlm`: a small Qwen2.5-VL on captions, questions and edits of the shapes world."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from core.seeds import numpy_generator
from rewards.editreward.settings import RESULT_RUBRIC, RUBRIC
from worlds.shapes.scenes.world import COLORS, SHAPES
from worlds.shapes.training.config import VlmModel, VlmRecipe
from worlds.shapes.training.loop import Stage, StageLoss
from worlds.shapes.training.tokenizers import vlm_tokenizer
from worlds.shapes.training.vision import (
    MAX_PIXELS,
    MERGE_SIZE,
    MIN_PIXELS,
    PATCH_SIZE,
    cell_labels,
    vision_features,
)
from worlds.shapes.training.vlm_batch import Packer, VlmBatch
from worlds.shapes.training.vlm_edits import PAIR_KINDS, pair_question, sample_pair
from worlds.shapes.training.vlm_questions import (
    SCENE_KINDS,
    Question,
    caption_question,
    scene_of_split,
    scene_question,
)

_CORPUS_STREAM = 106
HEAD_DIM = 64
"""Of the language model: the smallest that every build of vLLM serves."""
_MROPE_SECTION = [2, 4, 26]
"""Frequencies for time, rows and columns, fastest first. Each of the three then has some under which neighbours
differ; in the released shares columns have the slowest alone, and a picture's four columns would look alike."""
_ROPE_THETA = 1e4
_MAX_POSITIONS = 4096


class VlmStage(Stage):
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
        self.modules = [self.model, self.comparer]

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


class PictureComparer(nn.Module):
    """Tokens [N, P, H] -> logits of shape and colour at the same place in the first picture, and of a difference.

    To judge an edit is to compare two pictures place by place. Answers alone teach it slowly: one word speaks for
    thirty-two tokens. This linear map, thrown away after training, asks every token of a second picture for it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self._sizes = [1 + len(SHAPES), 1 + len(COLORS), 2]
        self.read = nn.Linear(width, sum(self._sizes))

    def loss(self, tokens: Tensor, batch: VlmBatch) -> tuple[Tensor, dict[str, float]]:
        """The sum of the three cross-entropies over the tokens of second pictures, and the share of the objects, gone
        or come, of which a difference is seen."""
        second = [n for n, first in enumerate(batch.first) if first is not None]
        if not second:
            return tokens.sum() * 0.0, {}
        now = cell_labels([batch.scenes[n] for n in second])
        before = cell_labels([batch.scenes[n] for n in batch.first if n is not None])
        differs = (now.shapes != before.shapes) | (now.colors != before.colors)
        wanted = (before.shapes, before.colors, differs.long())
        logits = self.read(tokens[second]).split(self._sizes, dim=-1)
        pairs = zip(logits, wanted, strict=True)
        loss = torch.stack([F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in pairs]).sum()
        seen = logits[-1].argmax(-1)[differs].float()
        return loss, {"differences_seen": seen.mean().item()} if len(seen) else {}


def vlm_config(
    model: VlmModel, vision: Qwen2_5_VLVisionConfig, tokenizer: Qwen2Tokenizer
) -> Qwen2_5_VLConfig:
    """The released layout at the recipe's size."""

    def token(text: str) -> int:
        return cast(int, tokenizer.convert_tokens_to_ids(text))

    tower = vision.to_dict()
    tower.pop("_name_or_path", None)  # the folder it was loaded from: of no use to anybody else

    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": model.heads * HEAD_DIM,
            "intermediate_size": model.mlp_width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.heads,
            "max_position_embeddings": _MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": _MROPE_SECTION,
                "rope_theta": _ROPE_THETA,
            },
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
            "pad_token_id": token("<|endoftext|>"),
        },
        vision_config=tower,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        vision_token_id=token("<|vision_pad|>"),  # type: ignore[call-arg]  # the released configs have it
        tie_word_embeddings=False,
    )


def read_rows(
    model: Qwen2_5_VLForConditionalGeneration, batch: VlmBatch, features: Tensor, middle: int
) -> tuple[Tensor, Tensor]:
    """Logits [A, vocabulary] where `batch.targets` are, and the pictures' tokens [N, P, H] after `middle` layers.

    `features` [N, P, H] are the pictures' tokens as the vision tower gives them.
    """
    body = model.model.language_model
    embeds = body.embed_tokens(batch.input_ids)
    image = (batch.input_ids == model.config.image_token_id)[..., None]
    output = body(
        inputs_embeds=embeds.masked_scatter(image, features),
        attention_mask=batch.mask,
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=True,
    )
    logits = model.lm_head(output.last_hidden_state[batch.rows, batch.columns])
    return logits, output.hidden_states[middle][image[..., 0]].view_as(features)


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
