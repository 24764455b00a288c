"""Command line: `python -m rl.evaluate BENCHMARK --output FOLDER --model FOLDER`, or `--images FOLDER`; see `--help`.

Generates what the benchmark asks for (or takes pictures that exist), scores it, and writes the table. Run the same
command again after a kill: nothing that is on disk is generated or scored twice. Exit code 0: everything was
scored; 1: the table is written, and something is missing; 2: refused, before Ray was started; 3: stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial
from pathlib import Path
from typing import Any

import recipes
from core.failures import ClusterError
from core.logs import start_logging
from core.recipe import ConfigError
from core.run_lock import RunTaken, hold_run
from core.run_status import watch_run
from rewards.base import RewardError
from rewards.benchmarks.registry import BENCHMARKS, Benchmark, Request
from rl.evaluate.plan import Sampling, scoring_sha256
from rl.evaluate.preflight import EvaluationJob, prepare, write_record

log = logging.getLogger("rl.evaluate")

DEFAULTS: dict[str, Any] = {
    "size": 512,
    "num_steps": 28,
    "guidance_scale": 3.5,
    "max_sequence_length": 256,
    "dtype": "bfloat16",
}
"""Where a benchmark has none of its own. Guidance and steps are those of the released model's pipeline."""


def main(argv: list[str] | None = None) -> int:
    """See the module's head for the exit code."""
    options = _parser().parse_args(argv)
    start_logging()
    try:
        benchmark = BENCHMARKS[options.benchmark]
        job = prepare(benchmark, _request(options), _sampling(options, benchmark), options)
    except ConfigError as error:
        sys.stderr.write(f"This evaluation cannot run:\n{error}\n")
        return 2
    if options.dry_run:
        sys.stdout.write("\n".join([*describe(job), "Ready to run."]) + "\n")
        return 0
    try:
        with hold_run(job.plan.output):
            return evaluate(job)
    except RunTaken as error:
        sys.stderr.write(f"This evaluation cannot run:\n{error}\n")
        return 2


def evaluate(job: EvaluationJob) -> int:
    """Run what is left to do, and write the results; the exit code."""
    from rl.evaluate.report import TABLE, write_results
    from rl.evaluate.run import NothingScored, scored_items
    from rl.evaluate.scores import ScoreStore

    plan, images = job.plan, job.image_store()
    images.recover(plan.batches)
    scores = ScoreStore(plan.output, scoring_sha256(plan, job.scorers)) if job.scorers else None
    try:
        _complete(job, images, scores)
    except Exception as error:  # a worker re-raises whatever it met; 1 would say that the table is written
        log.error(
            "stopped: %s", error, exc_info=not isinstance(error, RewardError | ClusterError | NothingScored)
        )
        sys.stderr.write(f"Stopped: {error}\nWhat is done is kept; run the same command again to go on.\n")
        return 3
    if scores is None:
        lacking = sum(None in images.pictures(item) for item in plan.items)
        sys.stdout.write(
            f"{plan.images}: {len(plan.items) - lacking} of {len(plan.items)} prompts have their pictures\n"
        )
        return 1 if lacking else 0
    document = write_results(
        plan, scored_items(plan, images, scores), images, job.record, job.scorers, scores.path
    )
    sys.stdout.write((plan.output / TABLE).read_text(encoding="utf-8"))
    return 0 if document["images"]["scored"] == document["images"]["expected"] else 1


def _complete(job: EvaluationJob, images: Any, scores: Any) -> None:
    """Generate and score until nothing is left; without Ray when nothing is."""
    from rl.evaluate.run import EvaluationRun

    plan = job.plan
    if not EvaluationRun.work_left(plan, images, scores):
        log.info("everything is generated and scored already")
        return
    with watch_run(plan.output, resume=False, stop_timeout_s=plan.resources.stop_timeout_s):
        _work(job, images, scores)


def _work(job: EvaluationJob, images: Any, scores: Any) -> None:
    import ray

    from core.cluster.actors import connect
    from core.progress import Progress
    from rl.evaluate.cluster import start_cluster
    from rl.evaluate.run import EvaluationRun
    from rl.workers.publish import publish

    plan = job.plan
    generate = job.adapter is not None and any(images.lacks(batch) for batch in plan.batches)
    started_here = connect()
    workers = start_cluster(plan, job.reward_sets, job.adapter_settings if generate else None)
    try:
        policy = None
        if generate:
            limit = plan.resources.call_timeout_s
            policy = publish(job.adapter, workers.dispatcher, previous=None, timeout_s=limit)
        # The folder is this evaluation's from the first result on: one that never came so far binds nothing.
        keep_record = partial(write_record, job)
        EvaluationRun(plan, images, scores, workers, policy, Progress(), keep_record).run()
    finally:
        workers.close()
        if started_here:
            ray.shutdown()


def describe(job: EvaluationJob) -> list[str]:
    """The evaluation in a few lines, with what a paid reward says that it costs."""
    from rewards.loading import load_reward

    plan, images = job.plan, job.image_store()
    lacking = sum(images.lacks(batch) for batch in plan.batches)
    verb = "score" if plan.model is None else "generate and score"
    lines = [
        f"{plan.benchmark.name}: {verb} {len(plan.items)} prompts x {plan.count} pictures in {len(plan.batches)} "
        f"batches, of which {lacking} lack pictures; results in {plan.output}"
    ]
    for part in plan.parts if job.scorers else ():
        lines.append(f"reward {part.reward.name}, {part.task}: {len(part.items) * plan.count} pictures")
        owner: Any = load_reward(part.reward).owner
        if hasattr(owner, "estimate"):
            size, count = plan.sampling.size, len(part.items) * plan.count
            lines += [
                f"  {line}" for line in owner.estimate(images=count, task=part.task, height=size, width=size)
            ]
    return lines


def _request(options: argparse.Namespace) -> Request:
    """Raises ConfigError for a reward parameter that is not `key=value`."""
    return Request(
        data=options.data,
        references=options.references,
        languages=tuple(options.languages),
        task=options.task,
        num_prompts=options.num_prompts,
        compat=options.compat,
        reward=options.reward,
        params=_params(options.reward_params),
        timeout_s=options.reward_timeout_s,
        scored=not options.generate_only,
    )


def _sampling(options: argparse.Namespace, benchmark: Benchmark) -> Sampling:
    values = DEFAULTS | benchmark.defaults
    given = {name: getattr(options, name) for name in DEFAULTS if getattr(options, name) is not None}
    return Sampling(**(values | given), negative_prompt=options.negative_prompt, seed=options.seed)


def _params(given: list[str]) -> dict[str, Any]:
    """`key=value` arguments, the values as YAML."""
    from omegaconf import OmegaConf

    bad = [item for item in given if "=" not in item or item.startswith("=")]
    if bad:
        raise ConfigError([f"--reward-params {item!r}: write it as key=value" for item in bad])
    found = OmegaConf.to_container(OmegaConf.from_dotlist(given))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rl.evaluate",
        description="Evaluate a model, or pictures that exist, on a benchmark; see rewards/benchmarks/README.md.",
    )
    parser.add_argument("benchmark", choices=sorted(BENCHMARKS))
    parser.add_argument("--output", type=Path, required=True, help="folder of pictures, scores and results")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")
    what = parser.add_argument_group("what is evaluated")
    what.add_argument("--model", type=recipes.resolve, help="model folder in the released layout")
    what.add_argument("--vlm", type=recipes.resolve, help="folder of the Qwen2.5-VL of a MetaQuery model")
    what.add_argument("--position-mode", choices=("flat", "mrope"), default="flat", help="of the VLM")
    what.add_argument("--adapter", type=Path, help="LoRA folder of a run, for example runs/NAME/adapter")
    what.add_argument("--images", type=Path, help="pictures in the benchmark's own layout, made by anybody")
    what.add_argument(
        "--generate-only", action="store_true", help="pictures without a table, for other scorers"
    )
    data = parser.add_argument_group("data")
    data.add_argument("--data", type=Path, help="the benchmark's file or folder, in its official format")
    data.add_argument("--references", type=Path, help="folder of source pictures (imgedit, gedit from JSON)")
    data.add_argument("--languages", nargs="+", default=[], choices=("en", "cn"), help="gedit (default: en)")
    data.add_argument("--task", choices=("t2i", "edit"), help="custom; shapes (default: both)")
    data.add_argument("--num-prompts", type=int, help="a part of the prompts, taken from the groups in turn")
    data.add_argument("--num-images-per-prompt", type=int, help="default: as published")
    _add_sampling(parser.add_argument_group("sampling (Euler steps on the ODE)"))
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--compat", action="store_true", help="repeat the public scripts, faults and all")
    scoring.add_argument("--reward", help="a reward in place of the benchmark's own")
    scoring.add_argument(
        "--reward-params", nargs="+", default=[], metavar="KEY=VALUE", help="for example model=gpt-4.1"
    )
    scoring.add_argument(
        "--reward-timeout-s",
        type=float,
        help="for one batch (default: 600, or more where the reward states more)",
    )
    scoring.add_argument("--gallery", type=int, default=16, help="prompts in the gallery (default: 16)")
    machines = parser.add_argument_group("machines")
    machines.add_argument("--workers", type=int, default=1, help="rollout workers, one GPU each (default: 1)")
    machines.add_argument(
        "--resources", nargs="+", default=[], metavar="KEY=VALUE",
        help="keys of a recipe's `resources`, for example device=cpu reward_gpus=1",
    )  # fmt: skip
    return parser


def _add_sampling(group: Any) -> None:
    group.add_argument("--size", type=int, help="edge in px (default: 512; shapes 32)")
    group.add_argument("--num-steps", type=int, help="default: 28; shapes 10")
    group.add_argument("--guidance-scale", type=float, help="default: 3.5; shapes 1")
    group.add_argument("--negative-prompt", default="")
    group.add_argument("--max-sequence-length", type=int, help="default: 256; shapes 12")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16; shapes float32")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--batch-size", type=int, default=8, help="pictures per forward pass (default: 8)")


if __name__ == "__main__":
    sys.exit(main())
