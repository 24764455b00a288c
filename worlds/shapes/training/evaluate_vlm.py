"""Ask a shapes VLM held-out questions: `python -m worlds.shapes.training.evaluate_vlm FOLDER [--num-questions 2000]`.

Scenes, and both pictures of a pair, whose content was never trained on. The answers are free-running and greedy,
by transformers' own processor, template and `generate`; an answer counts when it is exactly the right one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from core.seeds import numpy_generator
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import Scene
from worlds.shapes.training.evaluate import mean_interval
from worlds.shapes.training.vlm_edits import PAIR_KINDS, pair_question, sample_pair
from worlds.shapes.training.vlm_questions import (
    SCENE_KINDS,
    Question,
    caption_question,
    scene_of_split,
    scene_question,
)

KINDS = (*SCENE_KINDS, "caption", *PAIR_KINDS)
_STREAM = 204
_BATCH = 64
_MAX_NEW_TOKENS = 48


@dataclass(frozen=True)
class HeldoutQuestion:
    """A held-out question and the scenes whose pictures go before it."""

    scenes: tuple[Scene, ...]
    question: Question


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its 95 % bootstrap interval over questions.

    `guess` is the share that the commonest answer of the kind would get.
    """

    kind: str
    count: int
    mean: float
    low: float
    high: float
    guess: float


def heldout_questions(count: int, seed: int = 0) -> list[HeldoutQuestion]:
    """`count` held-out questions, the kinds in turn, no two alike, as a function of the seed."""
    rng = numpy_generator(seed, 0, _STREAM)
    found: dict[tuple[tuple[str, ...], str], HeldoutQuestion] = {}
    while len(found) < count:
        asked = _ask(rng, KINDS[len(found) % len(KINDS)])
        if asked is not None:
            found[(tuple(scene.content for scene in asked.scenes), asked.question.text)] = asked
    return list(found.values())


def _ask(rng: np.random.Generator, kind: str) -> HeldoutQuestion | None:
    scenes: tuple[Scene, ...] = ()
    if kind == "caption":
        return HeldoutQuestion(scenes, caption_question(rng, "heldout"))
    if kind in PAIR_KINDS:
        pair = sample_pair(rng, "heldout")
        scenes, question = (pair.source, pair.result), pair_question(rng, pair, kind)
    else:
        scenes = (scene_of_split(rng, "heldout"),)
        question = scene_question(rng, scenes[0], kind)
    return None if question is None else HeldoutQuestion(scenes, question)


class Vlm:
    """A Qwen2.5-VL folder, loaded strictly and in float32 on the CPU, that answers in batches."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError for a folder whose weights do not fit its config one for one."""
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, report = loaded
        wrong = {key: sorted(names) for key, names in report.items() if names}
        if wrong:
            raise ValueError(f"{folder}: weights and config.json differ: {wrong}")
        self.model: Any = model.eval()

    @torch.no_grad()
    def answer(self, pictures: list[list[Image.Image]], texts: list[str]) -> list[str]:
        """Greedy answers; `pictures[i]` are shown before `texts[i]`."""
        prompts = [self._prompt(shown, text) for shown, text in zip(pictures, texts, strict=True)]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        ids = inputs["input_ids"]
        image = (ids == self.model.config.image_token_id).int()
        flat = [picture for shown in pictures for picture in shown]
        vision = dict(self.processor(images=flat, return_tensors="pt")) if flat else {}
        made = self.model.generate(
            **inputs, **vision, mm_token_type_ids=image, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False
        )
        return self.tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)

    def _prompt(self, pictures: list[Image.Image], text: str) -> str:
        content: list[dict[str, Any]] = [
            *({"type": "image"} for _ in pictures),
            {"type": "text", "text": text},
        ]
        turns: Any = [{"role": "user", "content": content}]
        prompt = str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        if not pictures:
            return prompt
        grids = self.processor(images=pictures, return_tensors="pt")["image_grid_thw"]
        tokens = iter((grids.prod(1) // self.processor.merge_size**2).tolist())
        first, *rest = prompt.split("<|image_pad|>")
        return first + "".join("<|image_pad|>" * next(tokens) + part for part in rest)


def evaluate(folder: str | Path, count: int, seed: int = 0) -> list[Accuracy]:
    """Accuracy over all questions first, then by kind."""
    vlm, asked = Vlm(folder), heldout_questions(count, seed)
    # Like lengths together: padding is most of the cost of an uneven batch.
    order = sorted(range(count), key=lambda i: (len(asked[i].scenes), len(asked[i].question.text)))
    right = np.zeros(count)
    for start in range(0, count, _BATCH):
        chosen = order[start : start + _BATCH]
        pictures = [[Image.fromarray(p) for p in render_batch(asked[i].scenes)] for i in chosen]
        answers = vlm.answer(pictures, [asked[i].question.text for i in chosen])
        right[chosen] = [a == asked[i].question.answer for a, i in zip(answers, chosen, strict=True)]
    places = defaultdict(list)
    for i, item in enumerate(asked):
        places["all"].append(i)
        places[item.question.kind].append(i)
    return [_accuracy(kind, right[where], [asked[i] for i in where]) for kind, where in places.items()]


def _accuracy(kind: str, right: np.ndarray, asked: list[HeldoutQuestion]) -> Accuracy:
    commonest: dict[str, Counter[str]] = defaultdict(Counter)
    for item in asked:
        commonest[item.question.kind][item.question.answer] += 1
    guess = sum(max(counts.values()) for counts in commonest.values()) / len(asked)
    return Accuracy(kind, len(right), *mean_interval(right), guess)


def as_table(results: list[Accuracy]) -> str:
    """Markdown: one row per kind."""
    lines = ["| kind | questions | right | 95 % interval | commonest answer |", "|---|---|---|---|---|"]
    for item in results:
        interval = f"[{item.low:.3f}, {item.high:.3f}]"
        lines.append(f"| {item.kind} | {item.count} | {item.mean:.3f} | {interval} | {item.guess:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m worlds.shapes.training.evaluate_vlm", description=__doc__.splitlines()[0]
    )
    parser.add_argument("folder", help="Qwen2.5-VL folder in the hub's layout")
    parser.add_argument("--num-questions", type=int, default=2000, help="over all kinds, evenly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    if not (Path(options.folder) / "config.json").is_file():
        print(f"error: {options.folder}/config.json does not exist: give a model's folder", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    results = evaluate(options.folder, options.num_questions, options.seed)
    print(as_table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in results], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
