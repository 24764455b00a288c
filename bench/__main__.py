"""Command line: `python -m bench engine|detectors|service|signal|model [options]`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import detectors, random_model, service, signal
from bench.engine import EngineBench, Settings
from bench.report import document, table
from bench.sizes import DEFAULT_RESOLUTION, SIZES, VAE_FACTOR, transformer_config


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, and write the JSON where asked."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.suite != "engine":
        return arguments.run(arguments)
    problems = _problems(arguments)
    if problems:
        parser.error("; ".join(problems))
    settings = Settings(
        size=arguments.size,
        task=arguments.task,
        resolution=arguments.resolution or DEFAULT_RESOLUTION[arguments.size],
        batch=arguments.batch,
        steps=arguments.steps,
        train_steps=arguments.train_steps or max(1, arguments.steps - 1),
        guidance=arguments.guidance,
        text_tokens=arguments.text_tokens,
        lora_rank=arguments.lora_rank,
        dtype=arguments.dtype,
        device=arguments.device,
        gradient_checkpointing=arguments.gradient_checkpointing,
        compile=arguments.compile,
        warmup=arguments.warmup,
        repeats=arguments.repeats,
    )
    result = document(settings, EngineBench(settings).run())
    print(table(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure parts of the framework.")
    suites = parser.add_subparsers(dest="suite", required=True)
    engine = suites.add_parser("engine", help="rollout and update on one device; no Ray, no DeepSpeed")
    engine.add_argument("--size", choices=SIZES, default="tiny")
    engine.add_argument("--task", choices=("t2i", "edit"), default="t2i")
    engine.add_argument("--resolution", type=int, help="pixels, square (tiny: 128, sd35m: 512)")
    engine.add_argument("--batch", type=int, default=4, help="samples a batch and a micro-batch")
    engine.add_argument("--steps", type=int, default=10, help="T, denoising steps")
    engine.add_argument("--train-steps", type=int, help="replayed steps a sample (T - 1)")
    engine.add_argument("--guidance", type=float, default=4.5, help="1 runs without guidance")
    engine.add_argument("--text-tokens", type=int, default=333, help="77 of CLIP + 256 of T5")
    engine.add_argument("--lora-rank", type=int, default=32)
    engine.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    engine.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    engine.add_argument("--gradient-checkpointing", action="store_true")
    engine.add_argument(
        "--compile", action="store_true", help="the transformer's blocks, as model.compile does"
    )
    engine.add_argument("--warmup", type=int, default=1)
    engine.add_argument("--repeats", type=int, default=3, help="the median is reported")
    engine.add_argument("--json", metavar="PATH", help="also write everything as JSON")
    for name, module, text in (
        ("detectors", detectors, "images a second of each GenEval backend and colour rule"),
        (
            "service",
            service,
            "what a reward service adds to a reward in the same process, and what image codecs cost",
        ),
        ("signal", signal, "which steps of the schedule a recipe's policy gradient learns from"),
        ("model", random_model, "write a model folder of full size with random weights"),
    ):
        suite = suites.add_parser(name, help=text)
        module.add_arguments(suite)
        suite.set_defaults(run=module.run)
    return parser


def _problems(arguments: argparse.Namespace) -> list[str]:
    """What cannot be measured, each with the option to change."""
    positive = ("batch", "steps", "text_tokens", "lora_rank", "repeats")
    problems = [
        f"--{name.replace('_', '-')} must be at least 1" for name in positive if getattr(arguments, name) < 1
    ]
    if arguments.warmup < 0:
        problems.append("--warmup must not be negative")
    if arguments.train_steps is not None and not 1 <= arguments.train_steps <= arguments.steps:
        problems.append(f"--train-steps must lie between 1 and --steps={arguments.steps}")
    config = transformer_config(arguments.size)
    unit, largest = (
        VAE_FACTOR * config["patch_size"],
        VAE_FACTOR * config["patch_size"] * config["pos_embed_max_size"],
    )
    if arguments.resolution is not None and (
        arguments.resolution % unit or not unit <= arguments.resolution <= largest
    ):
        problems.append(
            f"--resolution must be a multiple of {unit} up to {largest} for --size {arguments.size}"
        )
    return problems


if __name__ == "__main__":
    sys.exit(main())
