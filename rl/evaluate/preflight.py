"""From the command line to a plan: everything that can be found wrong before Ray is asked for anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.files import atomic_write_json
from core.keys import PositionMode
from core.logs import relative_path_problems
from core.recipe import ConfigError, read_overrides
from models.folders import METAQUERY_PARTS, PARTS, model_sha256, vlm_sha256
from models.lora.load import load_adapter
from models.sizes import geometry
from rewards.base import RewardSet
from rewards.benchmarks.items import DataError
from rewards.benchmarks.registry import Benchmark, Part, Request
from rewards.checks import check_rewards
from rewards.loading import load_reward
from rl.evaluate.images import ImageStore
from rl.evaluate.model import model_problems
from rl.evaluate.plan import (
    Plan,
    Sampling,
    Scorer,
    generation_record,
    item_sizes,
    make_batches,
    reward_set_name,
)
from rl.recipe.schema import ResourcesConfig

RECORD = "evaluation.json"
IMAGES, SPOOL = "images", "spool"
WEIGHTS = ("checkpoint", "clip", "config")
"""Parameters of rewards that name weights or configs; what is in them decides scores, so they are hashed."""


@dataclass(frozen=True)
class Arguments:
    """The command line. `count` None: as many pictures per prompt as published."""

    benchmark: Benchmark
    request: Request
    sampling: Sampling
    output: Path
    model: Path | None
    adapter: Path | None
    images: Path | None
    count: int | None
    batch_size: int
    workers: int
    gallery: int
    resources: Sequence[str]
    vlm: Path | None
    position_mode: PositionMode


@dataclass(frozen=True)
class EvaluationJob:
    """A plan that can run. record: what its pictures are made from; scorers: one per part, none to generate only."""

    plan: Plan
    record: dict[str, Any]
    scorers: list[Scorer]
    reward_sets: list[RewardSet]
    adapter: Any
    adapter_settings: Any

    def image_store(self) -> ImageStore:
        plan = self.plan
        spool = None if plan.model is None else plan.output / SPOOL
        return ImageStore(plan.benchmark.layout, plan.images, plan.count, spool)


def prepare(arguments: Arguments) -> EvaluationJob:
    """Read and check everything; nothing is written. Raises ConfigError with all problems found."""
    problems = _value_problems(arguments)
    resources = _resources(arguments.resources, problems)
    try:
        parts = arguments.benchmark.read(arguments.request)
    except DataError as error:
        raise ConfigError(problems + error.problems) from error
    plan = _plan(arguments, parts, resources, problems)
    if plan.model is None:
        problems += _picture_problems(plan)
    if problems:
        raise ConfigError(problems)
    scored = arguments.request.scored
    reward_sets = [_reward_set(plan, number, part) for number, part in enumerate(plan.parts) if scored]
    for reward_set in reward_sets:
        problems += [problem for problem in check_rewards(reward_set) if problem not in problems]
    if problems:
        raise ConfigError(problems)
    settings = adapter = model_hash = vlm_hash = None
    if plan.model is not None:
        settings, adapter = load_adapter(plan.model, plan.adapter, plan.sampling.dtype)
        model_hash = model_sha256(plan.model, PARTS if plan.vlm is None else METAQUERY_PARTS)
    if plan.vlm is not None:
        vlm_hash = vlm_sha256(plan.vlm)
    adapter_hash = adapter.sha256 if adapter is not None and plan.adapter is not None else None
    record = generation_record(plan, model_hash, vlm_hash, adapter_hash)
    problems += _record_problems(plan.output / RECORD, record)
    if problems:
        raise ConfigError(problems)
    scorers = [scorer_of(part) for part in plan.parts if scored]
    return EvaluationJob(plan, record, scorers, reward_sets, adapter, settings)


def write_record(job: EvaluationJob) -> None:
    """Say in the output folder what its pictures are made from, for the next run to compare."""
    path = job.plan.output / RECORD
    if not path.exists():
        atomic_write_json(path, job.record)


def scorer_of(part: Part) -> Scorer:
    """The part's reward without what only decides how fast or how dearly it scores.

    A reward may name such parameters in `operational_params`, and its templates in `templates`.
    """
    loaded = load_reward(part.reward)
    operational = getattr(loaded.owner, "operational_params", ())
    params = {key: value for key, value in part.reward.params.items() if key not in operational}
    files = {} if loaded.source.sha256 is None else {"code": loaded.source.sha256}
    for key in WEIGHTS:
        if isinstance(params.get(key), str) and Path(params[key]).exists():
            from rewards.geneval.checkpoint import weights_sha256

            files[key] = weights_sha256(Path(params[key]))
    templates = getattr(loaded.owner, "templates", None) or {}
    files |= {template.name: template.sha256 for template in templates.values()}
    return Scorer(part.reward.name, params, files)


def _value_problems(arguments: Arguments) -> list[str]:
    a, s = arguments, arguments.sampling
    counts = a.benchmark.counts
    checks = [
        ((a.model is None) != (a.images is None), "give either --model, to generate, or --images, to score"),
        (a.request.scored or a.model is not None, "--generate-only needs --model"),
        (
            a.adapter is None or a.model is not None,
            "--adapter needs --model; pictures that exist have no adapter",
        ),
        (
            a.vlm is None or a.model is not None,
            "--vlm needs --model; pictures that exist were made by theirs",
        ),
        (
            a.count is None or (a.count >= 1 if counts is None else a.count in counts),
            f"--num-images-per-prompt {a.count}: {a.benchmark.name} takes "
            + ("1 or more" if counts is None else " or ".join(map(str, counts or ()))),
        ),
        (s.size >= 1, f"--size {s.size}: must be above 0"),
        (s.num_steps >= 1, f"--num-steps {s.num_steps}: must be 1 or more"),
        (s.max_sequence_length >= 1, f"--max-sequence-length {s.max_sequence_length}: must be 1 or more"),
        (s.guidance_scale >= 0, f"--guidance-scale {s.guidance_scale:g}: must not be negative"),
        (a.batch_size >= 1, f"--batch-size {a.batch_size}: must be 1 or more"),
        (a.workers >= 1, f"--workers {a.workers}: must be 1 or more"),
        (a.gallery >= 0, f"--gallery {a.gallery}: must be 0 or more"),
        (a.request.num_prompts is None or a.request.num_prompts >= 1, "--num-prompts: must be 1 or more"),
        (a.request.timeout_s > 0, f"--reward-timeout-s {a.request.timeout_s:g}: must be above 0"),
    ]
    return [message for fine, message in checks if not fine] + _path_problems(a)


def _path_problems(a: Arguments) -> list[str]:
    paths = {"output": a.output, "model": a.model, "images": a.images, "adapter": a.adapter}
    paths |= {"vlm": a.vlm, "data": a.request.data, "references": a.request.references}
    return relative_path_problems({f"--{name} {path}": path for name, path in paths.items()})


def _resources(given: Sequence[str], problems: list[str]) -> ResourcesConfig:
    """`key=value` arguments over the defaults of a recipe's `resources`."""
    try:
        return read_overrides(given, ResourcesConfig, "--resources ")
    except ConfigError as error:
        problems += error.problems
        return ResourcesConfig()


def _plan(
    arguments: Arguments, parts: Sequence[Part], resources: ResourcesConfig, problems: list[str]
) -> Plan:
    a = arguments
    items = [item for part in parts for item in part.items]
    count = a.count or a.benchmark.images
    multiple = 1
    if a.model is not None and not model_problems(a.model, a.vlm, None, set()):
        multiple = geometry(a.model).multiple
    sizes, found = item_sizes(items, max(1, a.sampling.size), multiple)
    problems += found
    if a.model is not None:
        problems += model_problems(a.model, a.vlm, a.adapter, set(sizes.values()))
    return Plan(
        benchmark=a.benchmark,
        parts=tuple(parts),
        count=count,
        compat=a.request.compat,
        sampling=a.sampling,
        batch_size=a.batch_size,
        batches=make_batches(parts, sizes, count, max(1, a.batch_size)),
        model=a.model,
        adapter=a.adapter,
        images=a.output / IMAGES if a.images is None else a.images,
        output=a.output,
        resources=resources,
        workers=a.workers,
        gallery=a.gallery,
        vlm=a.vlm,
        position_mode=a.position_mode,
    )


def _picture_problems(plan: Plan) -> list[str]:
    """What is wrong with somebody else's folder. Absent pictures are counted later, unless all are absent."""
    if not plan.images.is_dir():
        return [f"--images: {plan.images} is not a folder"]
    layout = plan.benchmark.layout
    problems = [p for item in plan.items for p in layout.problems(plan.images, item, plan.count)]
    if not any(picture for item in plan.items for picture in layout.find(plan.images, item, plan.count)):
        problems.append(
            f"--images: {plan.images} holds none of the {len(plan.items)} prompts' pictures; {plan.benchmark.name} "
            f"looks for {_example(plan)} and so on"
        )
    return problems


def _example(plan: Plan) -> str:
    key = plan.items[0].key
    return {"Numbered": f"{key}/samples/00000.png", "Grid": f"{key}.png"}.get(
        type(plan.benchmark.layout).__name__,
        f"{getattr(plan.benchmark.layout, 'root', '')}/{key}.png".lstrip("/"),
    )


def _reward_set(plan: Plan, number: int, part: Part) -> RewardSet:
    """The part's reward, tried on its first prompt and on pictures of the size that it will see."""
    example = part.items[0].prompt
    width = height = plan.sampling.size
    if plan.model is None:
        layout = plan.benchmark.layout
        for item in part.items:
            pictures = [picture for picture in layout.find(plan.images, item, plan.count) if picture]
            if pictures:
                width, height = pictures[0].load().size
                break
    return RewardSet(
        reward_set_name(number),
        part.task,
        [replace(part.reward, constant_steps=0)],
        example.prompt,
        example.metadata,
        height,
        width,
    )


def _record_problems(path: Path, record: dict[str, Any]) -> list[str]:
    if not path.is_file():
        return []
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read ({error}); choose another --output"]
    return [
        f"{path}: {key} was {before.get(key)!r} in the evaluation that is in this folder and is {record.get(key)!r} "
        "now; set it back, or choose another --output"
        for key in sorted(before.keys() | record.keys())
        if before.get(key) != record.get(key)
    ]
