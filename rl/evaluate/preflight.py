"""From the command line to a plan: everything that can be found wrong before Ray is asked for anything."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.files import atomic_write_json
from core.logs import relative_path_problems
from core.output import output_problems
from core.recipe import ConfigError, read_overrides
from models.folders import METAQUERY_PARTS, PARTS, model_sha256, vlm_sha256
from models.lora.load import load_adapter
from models.preflight import model_problems as folder_problems
from models.sizes import check_size, geometry
from rewards.base import RewardSet
from rewards.benchmarks.items import DataError
from rewards.benchmarks.registry import Benchmark, Part, Request
from rewards.checks import check_rewards
from rewards.loading import load_reward
from rl.evaluate.images import ImageStore
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
LEARNER_RESOURCES = ("placement", "learner_cpus", "min_rollout_workers")
WEIGHTS = ("checkpoint", "clip", "config")
"""Parameters of rewards that name weights or configs; what is in them decides scores, so they are hashed."""


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


def prepare(
    benchmark: Benchmark, request: Request, sampling: Sampling, options: argparse.Namespace
) -> EvaluationJob:
    """Read and check everything; nothing is written. `options`: the rest of the command line.

    Raises ConfigError with all problems found.
    """
    problems = _value_problems(benchmark, request, sampling, options)
    resources = _resources(options.resources, problems)
    try:
        parts = benchmark.read(request)
    except DataError as error:
        raise ConfigError(problems + error.problems) from error
    plan = _plan(benchmark, request, sampling, options, parts, resources, problems)
    if plan.model is None:
        problems += _picture_problems(plan)
    if problems:
        raise ConfigError(problems)
    scored = request.scored
    reward_sets = [_reward_set(plan, number, part) for number, part in enumerate(plan.parts) if scored]
    for reward_set, part in zip(reward_sets, plan.parts, strict=False):
        prompts = [item.prompt for item in part.items]
        problems += [p for p in check_rewards(reward_set, prompts=prompts) if p not in problems]
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


def _value_problems(
    benchmark: Benchmark, request: Request, sampling: Sampling, options: argparse.Namespace
) -> list[str]:
    o, s, counts, count = options, sampling, benchmark.counts, options.num_images_per_prompt
    checks = [
        ((o.model is None) != (o.images is None), "give either --model, to generate, or --images, to score"),
        (request.scored or o.model is not None, "--generate-only needs --model"),
        (
            o.adapter is None or o.model is not None,
            "--adapter needs --model; pictures that exist have no adapter",
        ),
        (
            o.vlm is None or o.model is not None,
            "--vlm needs --model; pictures that exist were made by theirs",
        ),
        (
            count is None or (count >= 1 if counts is None else count in counts),
            f"--num-images-per-prompt {count}: {benchmark.name} takes "
            + ("1 or more" if counts is None else " or ".join(map(str, counts or ()))),
        ),
        (s.size >= 1, f"--size {s.size}: must be above 0"),
        (s.num_steps >= 1, f"--num-steps {s.num_steps}: must be 1 or more"),
        (s.max_sequence_length >= 1, f"--max-sequence-length {s.max_sequence_length}: must be 1 or more"),
        (s.guidance_scale >= 0, f"--guidance-scale {s.guidance_scale:g}: must not be negative"),
        (o.batch_size >= 1, f"--batch-size {o.batch_size}: must be 1 or more"),
        (o.workers >= 1, f"--workers {o.workers}: must be 1 or more"),
        (o.gallery >= 0, f"--gallery {o.gallery}: must be 0 or more"),
        (request.num_prompts is None or request.num_prompts >= 1, "--num-prompts: must be 1 or more"),
        (
            request.timeout_s is None or request.timeout_s > 0,
            f"--reward-timeout-s {request.timeout_s}: must be above 0",
        ),
    ]
    places = _path_problems(options, request) + output_problems(f"--output {options.output}", options.output)
    return [message for fine, message in checks if not fine] + places


def _path_problems(o: argparse.Namespace, request: Request) -> list[str]:
    paths = {"output": o.output, "model": o.model, "images": o.images, "adapter": o.adapter}
    paths |= {"vlm": o.vlm, "data": request.data, "references": request.references}
    return relative_path_problems({f"--{name} {path}": path for name, path in paths.items()})


def _resources(given: Sequence[str], problems: list[str]) -> ResourcesConfig:
    """`key=value` arguments over the defaults of a recipe's `resources`."""
    keys = [item.partition("=")[0] for item in given]
    problems += [
        f"--resources {key}: an evaluation has no learner, so it has no effect; leave it out"
        for key in keys
        if key in LEARNER_RESOURCES
    ]
    try:
        return read_overrides(given, ResourcesConfig, "--resources ")
    except ConfigError as error:
        problems += error.problems
        return ResourcesConfig()


def _plan(
    benchmark: Benchmark,
    request: Request,
    sampling: Sampling,
    o: argparse.Namespace,
    parts: Sequence[Part],
    resources: ResourcesConfig,
    problems: list[str],
) -> Plan:
    items = [item for part in parts for item in part.items]
    count = o.num_images_per_prompt or benchmark.images
    multiple = 1
    if o.model is not None and not _model_problems(o.model, o.vlm, None, set()):
        multiple = geometry(o.model).multiple
    sizes, found = item_sizes(items, max(1, sampling.size), multiple)
    problems += found
    if o.model is not None:
        problems += _model_problems(o.model, o.vlm, o.adapter, set(sizes.values()))
    return Plan(
        benchmark=benchmark,
        parts=tuple(parts),
        count=count,
        compat=request.compat,
        sampling=sampling,
        batch_size=o.batch_size,
        batches=make_batches(parts, sizes, count, max(1, o.batch_size)),
        model=o.model,
        adapter=o.adapter,
        images=o.output / IMAGES if o.images is None else o.images,
        output=o.output,
        resources=resources,
        workers=o.workers,
        gallery=o.gallery,
        vlm=o.vlm,
        position_mode=o.position_mode,
    )


def _model_problems(
    folder: Path, vlm: Path | None, adapter: Path | None, sizes: set[tuple[int, int]]
) -> list[str]:
    """What keeps the model (with VLM and adapter) from generating pictures of `sizes` (height, width in px)."""
    problems = folder_problems(folder, vlm, model_key="--model", vlm_key="--vlm")
    if problems:
        return problems
    try:
        load_adapter(folder, adapter, "float32")
    except (ValueError, OSError) as error:
        problems.append(f"--adapter {adapter}: {error}")
    found = geometry(folder)
    for size in sorted(sizes):
        try:
            check_size(found, *size)
        except ValueError as error:
            problems.append(f"--size: {error}")
    return problems


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
        references_as_given=True,
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
