"""Batches of pictures with questions about them: functions of (seed, step) over a split.

A row holds no, one or two pictures and several conversations about them. The pictures come first in every
conversation, so its tokens are the row's pictures followed by the conversation's own, and the pictures need be
read once: each conversation attends to the pictures and to itself, at the positions it would have alone.

Shapes: `R` rows, `T` tokens of the longest row, `N` pictures, `P` patches of a picture, `A` answer tokens,
`Q` conversations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2Tokenizer

from core.seeds import numpy_generator
from core.training.randomness import torch_generator
from worlds.shapes.scenes.world import Scene, sample_name
from worlds.shapes.training.config import VlmRecipe
from worlds.shapes.training.vision import GRID, shown
from worlds.shapes.training.vlm_edits import JUDGEMENTS, pair_question, sample_pair
from worlds.shapes.training.vlm_questions import (
    SCENE_KINDS,
    Question,
    caption_question,
    scene_of_split,
    scene_question,
)

_ROWS_STREAM, _NOISE_STREAM = 104, 105
_START, _TURN, _END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


@dataclass(frozen=True)
class Row:
    """Pictures, in the order of the turn, and questions about them."""

    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class VlmBatch:
    """Inputs and targets of one step.

    input_ids [R, T]; positions [3, R, T] (temporal, height, width); mask [R, 1, T, T], True where attended;
    pixels [N, P, D] of `scenes`, in the order of the image tokens; first [N]: the row's first picture, for a second.
    rows, columns [A]: the places whose next token is in targets [A]; conversations [A]: the conversation of each.
    kinds [Q]: the kind of each conversation's question.
    """

    input_ids: Tensor
    positions: Tensor
    mask: Tensor
    pixels: Tensor
    scenes: tuple[Scene, ...]
    first: tuple[int | None, ...]
    rows: Tensor
    columns: Tensor
    targets: Tensor
    conversations: Tensor
    kinds: tuple[str, ...]


def sample_rows(recipe: VlmRecipe, step: int) -> list[Row]:
    """The rows of a step: one picture, two pictures and no picture in the recipe's shares."""
    rng = numpy_generator(recipe.seed, step, _ROWS_STREAM)
    pairs = round(recipe.pair_share * recipe.batch_size)
    texts = round(recipe.text_share * recipe.batch_size)
    rows = [_scene_row(rng, recipe.questions_of_scene) for _ in range(recipe.batch_size - pairs - texts)]
    rows += [_pair_row(rng, recipe.questions_of_either) for _ in range(pairs)]
    rows += [_text_row(rng, recipe.questions_of_text) for _ in range(texts)]
    return rows


def _scene_row(rng: np.random.Generator, count: int) -> Row:
    scene = scene_of_split(rng, "train")
    kinds = ["describe", *(SCENE_KINDS[i] for i in rng.integers(1, len(SCENE_KINDS), count - 1))]
    questions = [scene_question(rng, scene, kind) for kind in kinds]
    return Row((scene,), _distinct(questions))


def _pair_row(rng: np.random.Generator, count: int) -> Row:
    pair = sample_pair(rng, "train")
    # What a judgement is made of comes first, and of the long judgements one: a row has no room for all.
    kinds = ["either"] * count + ["change", "which", sample_name(rng, JUDGEMENTS)]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    questions = _distinct([pair_question(rng, pair, kind) for kind in kinds])
    return Row((pair.source, pair.result), questions) if questions else _pair_row(rng, count)


def _text_row(rng: np.random.Generator, count: int) -> Row:
    return Row((), _distinct([caption_question(rng, "train") for _ in range(count)]))


def _distinct(questions: Sequence[Question | None]) -> tuple[Question, ...]:
    return tuple({question.text: question for question in questions if question is not None}.values())


def _firsts(rows: Sequence[Row]) -> tuple[int | None, ...]:
    first: list[int | None] = []
    for row in rows:
        first += [None, len(first)][: len(row.scenes)]
    return tuple(first)


class Packer:
    """Rows to tensors, with one tokenizer and one size of patches."""

    def __init__(self, tokenizer: Qwen2Tokenizer, recipe: VlmRecipe) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.image_token = cast(int, tokenizer.convert_tokens_to_ids("<|image_pad|>"))
        self._start = self._ids(_START)
        image = self._ids("<|vision_start|><|image_pad|><|vision_end|>")
        self._image = [image[0], *[self.image_token] * GRID**2, image[2]]
        self._known: dict[tuple[str, str], tuple[list[int], int]] = {}

    def batch(self, step: int) -> VlmBatch:
        """The training batch of a step."""
        rows = [self.fit(row) for row in sample_rows(self.recipe, step)]
        scenes = [scene for row in rows for scene in row.scenes]
        noise = torch_generator(self.recipe.seed, step, _NOISE_STREAM)
        return self.pack(rows, shown(scenes, self.recipe.disturbance, noise))

    def fit(self, row: Row) -> Row:
        """The row with as many of its questions, from the first on, as `row_tokens` have room for."""
        used = len(self._start) + len(self._image) * len(row.scenes)
        sizes = np.cumsum([len(self._conversation(question)[0]) for question in row.questions])
        count = max(1, int(np.searchsorted(sizes, self.recipe.row_tokens - used, side="right")))
        return Row(row.scenes, row.questions[:count])

    def pack(self, rows: Sequence[Row], pixels: Tensor) -> VlmBatch:
        """`pixels` [N, P, D]: the pictures of all rows in order."""
        tokens, parts, positions = zip(*(self._row(row) for row in rows), strict=True)
        length = max(map(len, tokens))
        owner = torch.full((len(rows), length), -1)
        input_ids = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        position_ids = torch.zeros(3, len(rows), length, dtype=torch.long)
        for r, (ids, part, position) in enumerate(zip(tokens, parts, positions, strict=True)):
            input_ids[r, : len(ids)] = torch.tensor(ids)
            owner[r, : len(ids)] = torch.tensor(part)
            position_ids[:, r, : len(ids)] = position
        same = owner[:, :, None] == owner[:, None, :]
        shared = (owner == 0)[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return VlmBatch(
            input_ids=input_ids,
            positions=position_ids,
            mask=((same | shared) & causal)[:, None],
            pixels=pixels,
            scenes=tuple(scene for row in rows for scene in row.scenes),
            first=_firsts(rows),
            kinds=tuple(question.kind for row in rows for question in row.questions),
            **self._targets(rows, input_ids),
        )

    def _row(self, row: Row) -> tuple[list[int], list[int], Tensor]:
        """Tokens, the conversation of each (0: all of them share it), and positions [3, tokens]."""
        ids = self._start + self._image * len(row.scenes)
        owner, start = [0] * len(ids), len(self._start)
        steps = [torch.arange(start).expand(3, -1)]
        for _ in row.scenes:
            steps.append(self._image_positions(start))
            start += 2 + GRID
        for number, question in enumerate(row.questions, start=1):
            own, _ = self._conversation(question)
            ids, owner = ids + own, owner + [number] * len(own)
            steps.append(start + torch.arange(len(own)).expand(3, -1))
        return ids, owner, torch.cat(steps, dim=1)

    def _image_positions(self, start: int) -> Tensor:
        """Time, row and column of `<|vision_start|>`, the image tokens and `<|vision_end|>`, as the model has them."""
        first = start + 1
        places = first + torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID)).T
        inner = torch.cat([torch.full_like(places[:1], first), places])
        return torch.cat([torch.full((3, 1), start), inner, torch.full((3, 1), first + GRID)], dim=1)

    def _targets(self, rows: Sequence[Row], input_ids: Tensor) -> dict[str, Tensor]:
        where: list[tuple[int, int, int]] = []
        number = 0
        for r, row in enumerate(rows):
            end = len(self._start) + len(self._image) * len(row.scenes)
            for question in row.questions:
                own, answer = self._conversation(question)
                where += [(r, end + k - 1, number) for k in range(answer, len(own))]
                end, number = end + len(own), number + 1
        row_index, columns, conversations = torch.tensor(where).unbind(1)
        return {
            "rows": row_index,
            "columns": columns,
            "targets": input_ids[row_index, columns + 1],
            "conversations": conversations,
        }

    def _conversation(self, question: Question) -> tuple[list[int], int]:
        """Tokens after the pictures, end of the answer included, and the index of the answer's first."""
        key = (question.text, question.answer)
        if key not in self._known:
            asked = self._ids(question.text + _TURN)
            self._known[key] = (asked + self._ids(question.answer + _END), len(asked))
        return self._known[key]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
