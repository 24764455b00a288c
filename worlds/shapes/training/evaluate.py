"""Score a shapes base by guidance: `python -m worlds.shapes.training.evaluate BASE [--guidance 1 2 3 4.5]`.

A MetaQuery base (one with `conditioner/`) also needs `--vlm`, the folder of its Qwen2.5-VL, and to be read as it was
trained: `--position-mode`, and `--references` where one of the two was not shown the picture to edit.

Held-out prompts of both tasks, the same prompts and noise at every guidance, Euler steps on the scheduler's
table. Two ceilings stand beside the scores: right pictures as rendered (`truth`), and after the VAE (`codec`).
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from core.seeds import numpy_generator
from core.statistics import bootstrap_mean
from core.training.randomness import torch_generator
from models.components import load_scheduler, load_transformer, load_vae
from models.conditioning import ConditioningBatch
from models.kontext import KontextTransformer
from models.latents import decode_latents, encode_images
from models.metaquery.encoder import MetaQueryEncoder
from models.metaquery.reading import POSITION_MODES, PositionMode
from models.preflight import model_problems
from models.sampling import sample_latents, sigma_table
from models.text import SD3TextEncoder, stack_embeds
from worlds.shapes.scenes.captions import sample_t2i
from worlds.shapes.scenes.edits import INSERT, sample_edit
from worlds.shapes.scenes.inserts import sample_insert
from worlds.shapes.scenes.render import render_batch
from worlds.shapes.scenes.world import Scene
from worlds.shapes.scoring.rewards import EditShapes, GenEvalShapes
from worlds.shapes.training.pool import load_text
from worlds.shapes.training.shapes import to_tensor

TASKS = ("t2i", "edit")
"""Of the embedded base. A base that was trained for it also inserts (`INSERT`)."""
READERS = ("transformer", "vlm")
"""Who may be shown the picture to edit: the transformer its latents, the VLM of a MetaQuery base its pixels."""
_BATCH = 32
_PROMPT_STREAM = {"t2i": 201, "edit": 202, INSERT: 204}
_NOISE_STREAM = 203
_RESAMPLES = 2000


@dataclass(frozen=True)
class Question:
    """One held-out prompt: `source` is the scene to edit (None for text-to-image), `group` its tag or kind; `shown` is
    the scene of the second picture where there is one."""

    prompt: str
    metadata: dict[str, Any]
    source: Scene | None
    target: Scene
    group: str
    shown: Scene | None = None


@dataclass(frozen=True)
class Result:
    """Mean score with its 95 % bootstrap interval over prompts, and the means by tag or kind."""

    task: str
    setting: str
    count: int
    mean: float
    low: float
    high: float
    groups: dict[str, float]


def heldout_questions(task: str, count: int, seed: int = 0) -> list[Question]:
    """`count` held-out questions of a task as a function of the seed."""
    rng = numpy_generator(seed, 0, _PROMPT_STREAM[task])
    questions = []
    for _ in range(count):
        if task == "t2i":
            metadata, scene = sample_t2i(rng, "heldout")
            questions.append(Question(metadata["prompt"], metadata, None, scene, metadata["tag"]))
        elif task == INSERT:
            item = sample_insert(rng, "heldout")
            group = "any place" if item.metadata["edit"].get("anywhere") else "stated place"
            questions.append(
                Question(item.instruction, item.metadata, item.source, item.target, group, item.shown)
            )
        else:
            edit = sample_edit(rng, "heldout")
            questions.append(Question(edit.instruction, edit.metadata, edit.source, edit.target, edit.kind))
    return questions


def mean_interval(scores: np.ndarray) -> tuple[float, float, float]:
    """Mean, and its 95 % bootstrap interval over prompts; of one score, the score."""
    found = bootstrap_mean(scores, resamples=_RESAMPLES)
    mean = float(scores.mean())
    return mean, mean if found.low is None else found.low, mean if found.high is None else found.high


@dataclass
class Base:
    """A base on the CPU in float32, as a sampler of pictures; with a MetaQuery encoder, a MetaQuery base.

    `references` names those of `READERS` that see the picture to edit.
    """

    transformer: KontextTransformer
    vae: AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler
    encoder: SD3TextEncoder | MetaQueryEncoder
    references: Sequence[str] = READERS

    @classmethod
    def load(
        cls,
        folder: str | Path,
        vlm: str | Path | None = None,
        *,
        position_mode: PositionMode = "flat",
        references: Sequence[str] = READERS,
    ) -> "Base":
        """A base's folder; with `vlm`, the folder of its Qwen2.5-VL, whose positions are of the given mode."""
        encoder: SD3TextEncoder | MetaQueryEncoder
        if vlm is None:
            encoder = load_text(folder)
        else:
            encoder = MetaQueryEncoder.from_pretrained(
                folder, vlm, dtype=torch.float32, device="cpu", position_mode=position_mode
            )
        return cls(
            load_transformer(folder, dtype=torch.float32),
            load_vae(folder),
            load_scheduler(folder),
            encoder,
            references,
        )

    def embed(self, prompts: list[str], sources: list[Scene]) -> tuple[Tensor, Tensor]:
        """prompt_embeds N L D and pooled N P; MetaQuery also sees the scenes to edit (none: text-to-image)."""
        if isinstance(self.encoder, MetaQueryEncoder):
            shown = sources and "vlm" in self.references
            pictures = [[Image.fromarray(picture)] for picture in render_batch(sources)] if shown else None
            return stack_embeds(self.encoder.encode(prompts, pictures))
        return stack_embeds(self.encoder.encode(prompts))

    def draw(self, questions: list[Question], guidance: float, steps: int, seed: int = 0) -> np.ndarray:
        """uint8 pictures [N, H, W, 3]; the noise of a question depends on the seed and its place alone."""
        pictures = []
        sigmas = sigma_table(self.scheduler, steps)
        side = self.transformer.config["sample_size"]
        shape = (self.transformer.config["in_channels"], side, side)
        for start in range(0, len(questions), _BATCH):
            batch = questions[start : start + _BATCH]
            generators = [torch_generator(seed, start + i, _NOISE_STREAM) for i in range(len(batch))]
            noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            sources = [question.source for question in batch if question.source is not None]
            further = [question.shown for question in batch if question.shown is not None]
            seen = (sources, further) if "transformer" in self.references else ()
            references = tuple(encode_images(self.vae, to_tensor(scenes)) for scenes in seen if scenes)
            prompts = ConditioningBatch(
                *self.embed([question.prompt for question in batch], sources),
                references,
                *(self.embed([""] * len(batch), sources) if guidance > 1 else ()),
            )
            latents = sample_latents(self.transformer, sigmas, noise, prompts, guidance)
            pictures.append(decode_latents(self.vae, latents).numpy())
        return np.concatenate(pictures)

    def round_trip(self, questions: list[Question]) -> np.ndarray:
        """The right pictures after the VAE: the codec's ceiling."""
        latents = encode_images(self.vae, to_tensor([question.target for question in questions]))
        return decode_latents(self.vae, latents).numpy()


def score(task: str, questions: list[Question], pictures: np.ndarray) -> np.ndarray:
    """The world's reward for each picture."""
    reward = GenEvalShapes() if task == "t2i" else EditShapes()
    output = reward.score(
        images=[Image.fromarray(picture) for picture in pictures],
        prompts=[question.prompt for question in questions],
        references=[[]] * len(questions),
        metadata=[question.metadata for question in questions],
    )
    return np.asarray(output.scores, dtype=np.float64)


def summarise(task: str, setting: str, questions: list[Question], scores: np.ndarray) -> Result:
    groups = defaultdict(list)
    for question, value in zip(questions, scores, strict=True):
        groups[question.group].append(value)
    means = {name: float(np.mean(values)) for name, values in sorted(groups.items())}
    return Result(task, setting, len(scores), *mean_interval(scores), means)


def evaluate(
    folder: str | Path,
    guidances: list[float],
    count: int,
    *,
    vlm: str | Path | None = None,
    position_mode: PositionMode = "flat",
    references: Sequence[str] = READERS,
    steps: int = 10,
    ceilings: bool = True,
) -> list[Result]:
    """Score a base on both tasks: the ceilings first, then every guidance. The base is read as by `Base.load`."""
    base = Base.load(folder, vlm, position_mode=position_mode, references=references)
    results = []
    for task in TASKS:
        questions = heldout_questions(task, count)
        if ceilings:
            truth = render_batch([question.target for question in questions])
            results.append(summarise(task, "truth", questions, score(task, questions, truth)))
            codec = base.round_trip(questions)
            results.append(summarise(task, "codec", questions, score(task, questions, codec)))
        for guidance in guidances:
            scores = score(task, questions, base.draw(questions, guidance, steps))
            results.append(summarise(task, f"CFG {guidance:g}", questions, scores))
    return results


def as_table(results: list[Result]) -> str:
    """Markdown: one row per task and setting."""
    lines = ["| task | setting | score | 95 % interval | by tag or kind |", "|---|---|---|---|---|"]
    for item in results:
        groups = ", ".join(f"{name} {value:.2f}" for name, value in item.groups.items())
        lines.append(
            f"| {item.task} | {item.setting} | {item.mean:.3f} | [{item.low:.3f}, {item.high:.3f}] | {groups} |"
        )
    return "\n".join(lines)


def _problems(base: Path, vlm: Path | None, references: Sequence[str]) -> list[str]:
    problems = model_problems(base, vlm, model_key="BASE", vlm_key="--vlm")
    if vlm is None and "transformer" not in references:
        problems.append("--references: without a VLM the transformer alone can be shown the picture to edit")
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m worlds.shapes.training.evaluate", description=__doc__.splitlines()[0]
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="model folder in the released layout")
    parser.add_argument("--vlm", type=Path, help="folder of the Qwen2.5-VL of a MetaQuery base")
    parser.add_argument("--position-mode", choices=POSITION_MODES, default="flat", help="of the VLM")
    parser.add_argument(
        "--references", nargs="+", choices=READERS, default=READERS, help="who is shown the picture to edit"
    )
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0, 3.0, 4.5])
    parser.add_argument("--num-prompts", type=int, default=512, help="held-out prompts of each task")
    parser.add_argument("--steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args(arguments)
    problems = _problems(options.base, options.vlm, options.references)
    if problems:
        print("error: " + "; ".join(problems), file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    results = evaluate(
        options.base,
        options.guidance,
        options.num_prompts,
        vlm=options.vlm,
        position_mode=options.position_mode,
        references=options.references,
        steps=options.steps,
    )
    print(f"{options.num_prompts} held-out prompts a task, ODE {options.steps} steps")
    print(as_table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(item) for item in results], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
