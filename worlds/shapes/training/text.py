"""Stage `text`: tiny CLIP x2 and T5 on the captions and instructions of the shapes world."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from core.seeds import numpy_generator
from worlds.shapes.scenes.world import SIZE
from worlds.shapes.training.config import TextRecipe
from worlds.shapes.training.loop import Stage, StageLoss
from worlds.shapes.training.shapes import edit_batch, t2i_batch, to_tensor
from worlds.shapes.training.tokenizers import clip_tokenizer, t5_tokenizer

_SPAN_STREAM = 103
_CORPUS_STEP = 1 << 30
_PROBE_STEP = _CORPUS_STEP + 1
_INITIAL_TEMPERATURE = 0.07


class TextStage(Stage):
    """CLIP by contrast with pictures, T5 by restoring a masked span; the sum of the losses is trained.

    A caption is matched with its picture, an instruction with the pair (source, target). The picture encoder
    and T5's decoder are thrown away. T5 restores the whole text rather than the span alone, which differs from
    T5's own objective: with forty words the encoder would otherwise drop what is never masked.
    """

    def __init__(self, recipe: TextRecipe) -> None:
        self.recipe, model = recipe, recipe.model
        texts = t2i_batch(recipe.seed, _CORPUS_STEP, recipe.vocabulary_captions).prompts
        texts += edit_batch(recipe.seed, _CORPUS_STEP, recipe.vocabulary_captions).prompts
        self.clip_tokenizer = clip_tokenizer(
            texts, max_vocabulary=model.max_vocabulary, length=model.clip_length
        )
        self.t5_tokenizer = t5_tokenizer(texts, max_vocabulary=model.max_vocabulary, length=model.t5_length)
        self.clips = nn.ModuleList(self._new_clip(width) for width in model.clip_widths)
        self.t5 = self._new_t5()
        self.vision = _PictureEncoder(recipe.vision_width, model.clip_projection, len(self.clips))
        self.modules = [self.clips, self.t5, self.vision]

    def loss(self, step: int) -> StageLoss:
        prompts, before, after = self._batch(step)
        pictures = self.vision(before, after)
        ids = self._clip_ids(prompts)
        contrastive = torch.stack(
            [
                _contrastive_loss(clip(input_ids=ids).text_embeds, picture, self.vision.temperature)
                for clip, picture in zip(self.clips, pictures, strict=True)
            ]
        ).mean()
        rng = numpy_generator(self.recipe.seed, step, _SPAN_STREAM)
        masked = self._t5_ids([_mask_span(prompt, rng) for prompt in prompts])
        labels = self._t5_ids(prompts)
        labels = labels.masked_fill(labels == self.t5_tokenizer.pad_token_id, -100)
        restored = self.t5(input_ids=masked, labels=labels)
        accuracy = _token_accuracy(restored.logits, labels)
        figures = {"contrastive": contrastive.item(), "t5": restored.loss.item(), "t5_accuracy": accuracy}
        return StageLoss(contrastive + restored.loss, figures)

    def export(self, folder: Path) -> dict[str, float]:
        """Write `text_encoder{,_2,_3}/` and `tokenizer{,_2,_3}/`; probe what a batch of captions tells."""
        prompts, before, after = self._batch(_PROBE_STEP, self.recipe.probe_captions)
        pictures, ids = self.vision(before, after), self._clip_ids(prompts)
        figures = {}
        dtype = getattr(torch, self.recipe.export_dtype)
        for suffix, clip, picture in zip(("", "_2"), self.clips, pictures, strict=True):
            embeds = clip(input_ids=ids).text_embeds
            figures[f"retrieval_of_64{suffix}"] = _retrieval_accuracy(embeds, picture, 64)
            exported = CLIPTextModelWithProjection(cast(CLIPTextConfig, clip.config))
            exported.load_state_dict(clip.state_dict())
            exported.to(dtype).save_pretrained(folder / f"text_encoder{suffix}")
            self.clip_tokenizer.save_pretrained(folder / f"tokenizer{suffix}")
        labels = self._t5_ids(prompts)
        labels = labels.masked_fill(labels == self.t5_tokenizer.pad_token_id, -100)
        copied = self.t5(input_ids=self._t5_ids(prompts), labels=labels)
        figures["t5_copy_accuracy"] = _token_accuracy(copied.logits, labels)
        encoder = T5EncoderModel(self.t5.config)
        encoder.load_state_dict({k: v for k, v in self.t5.state_dict().items() if k in encoder.state_dict()})
        encoder.to(dtype).save_pretrained(folder / "text_encoder_3")
        self.t5_tokenizer.save_pretrained(folder / "tokenizer_3")
        return figures

    def _batch(self, step: int, count: int | None = None) -> tuple[list[str], Tensor, Tensor]:
        """(texts, pictures before, pictures after): half captions, whose picture before is grey, half edits."""
        count = count or self.recipe.batch_size
        t2i = t2i_batch(self.recipe.seed, step, count - count // 2)
        edit = edit_batch(self.recipe.seed, step, count // 2)
        blank = torch.zeros(len(t2i.prompts), 3, SIZE, SIZE)
        before = torch.cat([blank, to_tensor(edit.sources)])
        return t2i.prompts + edit.prompts, before, to_tensor(t2i.scenes + edit.targets)

    def _clip_ids(self, prompts: list[str]) -> Tensor:
        return self.clip_tokenizer(
            prompts, padding="max_length", max_length=self.recipe.model.clip_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip

    def _t5_ids(self, prompts: list[str]) -> Tensor:
        return self.t5_tokenizer(
            prompts, padding="max_length", max_length=self.recipe.model.t5_length, truncation=True,
            return_tensors="pt",
        ).input_ids  # fmt: skip

    def _new_clip(self, width: int) -> CLIPTextModelWithProjection:
        model, tokenizer = self.recipe.model, self.clip_tokenizer
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=model.clip_layers,
                num_attention_heads=width // model.head_dim,
                max_position_embeddings=model.clip_length,
                projection_dim=model.clip_projection,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                attention_dropout=0.0,
            )
        )

    def _new_t5(self) -> T5ForConditionalGeneration:
        model, tokenizer = self.recipe.model, self.t5_tokenizer
        return T5ForConditionalGeneration(
            T5Config(  # type: ignore[call-arg]
                vocab_size=len(tokenizer),
                d_model=model.t5_width,
                d_kv=model.head_dim,
                d_ff=2 * model.t5_width,
                num_layers=model.t5_layers,
                num_decoder_layers=1,
                num_heads=model.t5_width // model.head_dim,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                decoder_start_token_id=tokenizer.pad_token_id,
            )
        )


class _PictureEncoder(nn.Module):
    """Two pictures of 32 x 32 -> one embedding for each CLIP."""

    def __init__(self, width: int, projection: int, heads: int) -> None:
        super().__init__()
        widths = (6, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(4, after), nn.SiLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        features = widths[-1] * (SIZE // 8) ** 2
        self.heads = nn.ModuleList(nn.Linear(features, projection) for _ in range(heads))
        self.temperature = nn.Parameter(torch.tensor(float(np.log(_INITIAL_TEMPERATURE))))

    def forward(self, before: Tensor, after: Tensor) -> list[Tensor]:
        features = self.trunk(torch.cat([before, after], dim=1))
        return [head(features) for head in self.heads]


def _contrastive_loss(text: Tensor, picture: Tensor, log_temperature: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over a batch; text and picture B P."""
    logits = (
        F.normalize(text, dim=-1) @ F.normalize(picture, dim=-1).T / log_temperature.clamp(min=-4.6).exp()
    )
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _retrieval_accuracy(text: Tensor, picture: Tensor, candidates: int) -> float:
    """Share of pictures whose own text is the nearest of `candidates`."""
    text, picture = F.normalize(text, dim=-1), F.normalize(picture, dim=-1)
    # Captions come first and edits last: shuffle, so that candidates are of both.
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(0))
    right = total = 0
    for index in order.split(candidates):
        nearest = (picture[index] @ text[index].T).argmax(dim=1)
        right += int((nearest == torch.arange(len(index))).sum())
        total += len(index)
    return right / total


def _mask_span(prompt: str, rng: np.random.Generator) -> str:
    """Replace one span of 1 to 3 words by a sentinel."""
    words = prompt.split()
    length = min(int(rng.integers(1, 4)), len(words) - 1)
    start = int(rng.integers(0, len(words) - length + 1))
    return " ".join([*words[:start], "<extra_id_0>", *words[start + length :]])


def _token_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of labelled tokens predicted right."""
    known = labels != -100
    return (logits.argmax(dim=-1) == labels)[known].float().mean().item()
