"""Evaluation on held-out prompts: the same prompts, seeds, ODE steps and guidance each time, so pairs compare.

Results are kept per prompt in `evaluations/<moment>/<task>.json`, with the gallery's images in `<task>.npz`; a
resumed run reuses them only if they were made with the very adapter that would be evaluated again, and sets those
aside that were made with other prompts, weights or rewards: they compare with nothing that comes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import ray
from ray.exceptions import RayError

import recipes
from core.checkpoints import set_aside
from core.files import atomic_write_json
from core.prompts import Prompt, load_prompts
from core.seeds import derive_seed
from rewards.scoring import GroupScore
from rl.recipe.reward_sets import evaluation_set_name
from rl.recipe.schema import EvaluationConfig
from rl.record.gallery import GallerySample
from rl.record.groups import reference_sheet
from rl.workers.collect import Collector
from rl.workers.requests import RolloutRequest, RolloutResult, alone, batch_requests
from rollout.sampler import SamplingSpec
from rollout.shapes import Shape, ShapeRule
from rollout.worker import Policy

log = logging.getLogger(__name__)
EVALUATIONS = "evaluations"


@dataclass(frozen=True)
class TaskScores:
    """Per-prompt rewards (None: not scored) of one task at one moment; `moment` is `before`, `after_<stage>` ..."""

    moment: str
    task: str
    adapter_sha256: str
    guidance_scale: float
    step: int
    rewards: list[float | None]
    components: dict[str, list[float | None]]
    inputs_sha256: str = ""


class Evaluator:
    """Evaluates policies on every task of `evaluation.tasks`, and keeps gallery samples of the first prompts."""

    def __init__(
        self,
        config: EvaluationConfig,
        collector: Collector,
        run_dir: Path,
        shapes: ShapeRule,
        gallery_prompts: int,
        *,
        inputs_sha256: str = "",
    ):
        """`inputs_sha256`: identity of what is read from files (`rl/recipe/inputs.py`)."""
        self.config, self.collector, self.run_dir, self.shapes = config, collector, run_dir, shapes
        self.folder, self.inputs_sha256 = run_dir / EVALUATIONS, inputs_sha256
        self.prompts: dict[str, list[Prompt]] = {
            task.task: load_prompts(recipes.resolve(task.prompts), task.task)[: task.num_prompts]
            for task in config.tasks
        }
        self.gallery_prompts = gallery_prompts
        self.gallery: dict[str, dict[str, list[GallerySample]]] = {}

    def evaluate(
        self,
        moment: str,
        policy: Policy,
        step: int,
        *,
        tasks: Sequence[str] | None = None,
        guidance_scale: float | None = None,
    ) -> dict[str, TaskScores]:
        """Scores of every task (or of `tasks`) under `policy`, computed or, if already on disk, read."""
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        results = {}
        for task in tasks or list(self.prompts):
            path = self.folder / moment / f"{task}.json"
            stored = self._read(path)
            if stored is not None and stored.adapter_sha256 == policy.sha256:
                results[task] = stored
            else:
                results[task] = self._run(path, moment, task, policy, step, guidance)
        return results

    def set_others_aside(self) -> None:
        """Move evaluations away that were made with other prompts, weights or rewards."""
        others = {
            path.parent
            for path in self.folder.glob("*/*.json")
            if json.loads(path.read_text()).get("inputs_sha256", "") != self.inputs_sha256
        }
        why = "of other held-out prompts, weights or rewards than there are now, and compares with nothing that comes"
        set_aside(self.run_dir, sorted(others), why=why)

    def read(self, moment: str) -> dict[str, TaskScores]:
        """Stored scores of a moment; without the tasks that were not evaluated with what there is now."""
        found = {task: self._read(self.folder / moment / f"{task}.json") for task in self.prompts}
        for task in (task for task, scores in found.items() if scores is None):
            log.warning("there is no evaluation %s of %s: nothing is compared with it", moment, task)
        return {task: scores for task, scores in found.items() if scores is not None}

    def sample_gallery(self, task: str, policy: Policy, step: int) -> list[GallerySample]:
        """The first held-out prompts alone, with the evaluation's seeds: the same pictures across steps."""
        prompts = self.prompts[task][: self.gallery_prompts]
        return self._sample(task, prompts, policy, step, self.config.guidance_scale)[2]

    def _run(
        self, path: Path, moment: str, task: str, policy: Policy, step: int, guidance: float
    ) -> TaskScores:
        rewards, components, samples = self._sample(task, self.prompts[task], policy, step, guidance)
        scores = TaskScores(
            moment, task, policy.sha256, guidance, step, rewards, components, self.inputs_sha256
        )
        self.gallery.setdefault(task, {})[moment] = samples
        path.parent.mkdir(parents=True, exist_ok=True)
        if samples:
            np.savez_compressed(path.with_suffix(".npz"), *[sample.image[None] for sample in samples])
        atomic_write_json(path, asdict(scores))
        scored = [r for r in rewards if r is not None]
        mean = f"{np.mean(scored):.4f}" if scored else "nothing scored"
        log.info("evaluation %s, %s: %s (%d of %d scored)", moment, task, mean, len(scored), len(rewards))
        return scores

    def _sample(
        self, task: str, prompts: list[Prompt], policy: Policy, step: int, guidance: float
    ) -> tuple[list[float | None], dict[str, list[float | None]], list[GallerySample]]:
        spec = SamplingSpec(self.config.num_steps, 0.0, guidance, variant="ode")
        seeds = [self._seed(prompt) for prompt in prompts]
        label = f"evaluate {task}"
        sample = partial(self.collector.sample, spec=spec, policy=policy, step=step, label=label)
        scored: list[tuple[tuple[int, ...], GroupScore]] = []
        shown: list[RolloutResult] = []

        def gather(requests: Sequence[RolloutRequest]) -> list[RolloutRequest]:
            """Draw and score; of batches that fail, their prompts one by one, for only the cause to be lost."""
            again = []
            for result in self.collector.score(
                requests, sample, evaluation_set_name(task), step=step, label=f"score {task}"
            ):
                request = result.request
                if result.score is None and len(request.prompts) > 1:
                    again += alone(request)
                    continue
                if result.score is not None:
                    scored.append((request.places, result.score))
                else:
                    log.error("%s: %s is not scored: %s", label, request.prompts[0].name, result.failure)
                if result.chunks and request.places[0] < self.gallery_prompts:
                    shown.append(result)
            return again

        shapes = list(map(self._shape, prompts))
        failed = gather(batch_requests(prompts, seeds, self.config.batch_size, shapes))
        if failed:
            gather(failed)
        rewards, components = _in_order(scored, len(prompts))
        images = {
            place: image
            for result in shown
            for place, image in zip(result.request.places, _pictures(result, sample), strict=True)
            if place < self.gallery_prompts
        }
        samples = [
            self._gallery_sample(prompts[place], images[place], rewards[place]) for place in sorted(images)
        ]
        return rewards, components, samples

    def _read(self, path: Path) -> TaskScores | None:
        scores = read_scores(path)
        if scores is None:
            return None
        pictures = path.with_suffix(".npz")
        if pictures.is_file():
            with np.load(pictures, allow_pickle=False) as stored:
                images = [image for name in stored.files for image in stored[name]]
            prompts = self.prompts[scores.task][: len(images)]
            self.gallery.setdefault(scores.task, {})[scores.moment] = [
                self._gallery_sample(prompt, image, reward)
                for prompt, image, reward in zip(prompts, images, scores.rewards, strict=False)
            ]
        return scores

    def _seed(self, prompt: Prompt) -> int:
        return derive_seed(self.config.seed, "evaluation", prompt.task, prompt.index)

    def _shape(self, prompt: Prompt) -> Shape:
        return self.shapes.of(prompt, self._seed(prompt))

    def _gallery_sample(self, prompt: Prompt, image: np.ndarray, reward: float | None) -> GallerySample:
        reference = reference_sheet(prompt, self._shape(prompt))
        return GallerySample(prompt.prompt, self._seed(prompt), image, reward, reference)


def read_scores(path: Path) -> TaskScores | None:
    """Stored scores, without their pictures; None where there are none."""
    return TaskScores(**json.loads(path.read_text())) if path.is_file() else None


def _pictures(result: RolloutResult, sample: Callable[..., Iterator[RolloutResult]]) -> np.ndarray:
    """A batch's pictures; drawn again where a node took them."""
    try:
        return ray.get(result.chunks[0].images, timeout=120)
    except RayError as error:
        log.warning("prompts %s are drawn again for the gallery: %s", result.request.span, error)
        (again,) = sample([result.request])
        return ray.get(again.chunks[0].images, timeout=120)


def _in_order(
    scored: Sequence[tuple[tuple[int, ...], GroupScore]], count: int
) -> tuple[list[float | None], dict[str, list[float | None]]]:
    """Rewards and components of all `count` prompts by their places; None stands for what was not scored."""
    rewards: list[float | None] = [None] * count
    names = sorted({name for _, score in scored for name in score.components})
    components: dict[str, list[float | None]] = {name: [None] * count for name in names}
    for places, score in scored:
        for k, place in enumerate(places):
            rewards[place] = score.rewards[k]
            for name, values in score.components.items():
                components[name][place] = values[k]
    return rewards, components
