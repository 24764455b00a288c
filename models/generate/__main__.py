"""Command line: pictures from prompts, and edited pictures, by Kontext or MetaQuery; see `--help`.

    python -m models.generate --model FOLDER --prompt "a red fox" --output fox.png
    python -m models.generate --model FOLDER --prompt "make it blue" --image fox.png --output blue.png
    python -m models.generate --model FOLDER --prompt "put the cat on the chair" --image room.png cat.png --output x.png
    python -m models.generate --model FOLDER --prompts prompts.jsonl --output pictures --workers 8
    python -m models.generate --from-metadata fox.png --output again.png

A picture that is there already, with the same settings in its metadata, is not made again. Exit code 0: all pictures
are there; 1: some could not be made; 2: refused, before anything was loaded; 3: stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import recipes
from models.generate.command_line import (
    add_machine_options,
    machine_of,
    machine_problems,
    pool_of,
    run_command,
)
from models.generate.jobs import Job, Options, Order, job_pictures, orders_of_file, orders_of_line
from models.generate.metadata import WEIGHTS, read_record
from models.generate.model import ModelSpec, checked, made_on, weights_record
from models.generate.page import serve
from models.generate.run import make_pictures, missing_orders
from models.generate.task_lines import Refused
from models.sizes import geometry

log = logging.getLogger("models.generate")

PICTURE_OPTIONS = tuple(field.name for field in fields(Options))
PATHS = ("model", "vlm", "adapter", "output", "prompts", "image", "from_metadata")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's head for the exit code."""
    args = _parser().parse_args(argv)

    work = _generate if args.page is None else _page
    problems = _argument_problems(args)
    return run_command(
        problems, lambda: work(args), refused="Nothing was generated", stays="Pictures that are written"
    )


def _generate(args: argparse.Namespace) -> int:
    if args.from_metadata is not None:
        orders, spec, weights = _again(args)
    else:
        spec = _spec(args)
        orders = _orders(args, spec)
        weights = weights_record(spec)
    missing = missing_orders(orders, weights, overwrite=args.overwrite)
    there = len(orders) - len(missing)
    made, failed = 0, []
    if missing:
        pool = pool_of(args.workers, spec)
        outcome = make_pictures(missing, spec, weights, pool, batch_size=args.batch_size)
        made, failed = len(outcome.made), outcome.failed
    for line in failed:
        sys.stderr.write(f"{line}\n")
    sys.stdout.write(f"{made} pictures made, {there} there already, {len(failed)} not made\n")
    return 1 if failed else 0


def _page(args: argparse.Namespace) -> int:
    serve(_spec(args), _options(args), args.page)
    return 0


def _argument_problems(args: argparse.Namespace) -> list[str]:
    """Arguments that contradict each other, and numbers out of range."""
    sources = [getattr(args, name) is not None for name in ("prompt", "prompts", "from_metadata", "page")]
    paged = args.page is not None
    checks = [
        (sum(sources) == 1, "give one of --prompt, --prompts, --from-metadata and --page"),
        (paged or args.output is not None, "give --output, a PNG file, or with --prompts a folder"),
        (
            args.image is None or args.prompts is None,
            "--image belongs to --prompt; a line of --prompts has its own",
        ),
        (args.model is not None or args.from_metadata is not None, "give --model, a model folder"),
        (not paged or args.workers == 0, "--page works in this process: leave --workers out"),
        (args.num_images >= 1, f"--num-images {args.num_images}: must be 1 or more"),
        (args.batch_size >= 1, f"--batch-size {args.batch_size}: must be 1 or more"),
    ]
    problems = [message for fine, message in checks if not fine]
    if args.from_metadata is not None:
        fixed = (*PICTURE_OPTIONS, "dtype", "max_sequence_length", "position_mode")
        given = [key for key in fixed if getattr(args, key) is not None]
        given += ["num_images"] if args.num_images != 1 else []
        problems += [f"--{key.replace('_', '-')}: --from-metadata takes it from the picture" for key in given]
    return problems + machine_problems(args, PATHS)


def _options(args: argparse.Namespace) -> Options:
    given = {key: getattr(args, key) for key in PICTURE_OPTIONS}
    return Options(**{key: value for key, value in given.items() if value is not None})


def _spec(args: argparse.Namespace) -> ModelSpec:
    spec = ModelSpec(
        model=recipes.resolve(args.model),
        vlm=None if args.vlm is None else recipes.resolve(args.vlm),
        adapter=args.adapter,
        max_sequence_length=args.max_sequence_length,
        position_mode=args.position_mode,
        **machine_of(args),
    )
    return checked(spec)


def _orders(args: argparse.Namespace, spec: ModelSpec) -> list[Order]:
    options, model, count = _options(args), geometry(spec.model), args.num_images
    if args.prompts is not None:
        return orders_of_file(args.prompts, args.output, options, model=model, count=count)
    images = [str(image.absolute()) for image in args.image or ()]
    return orders_of_line(
        args.prompt, images, args.output, options, model=model, count=count, origin="--prompt"
    )


def _again(args: argparse.Namespace) -> tuple[list[Order], ModelSpec, dict[str, Any]]:
    """The order, model and weights of a picture that was made before; arguments may say where its parts are now.

    Raises Refused when a part is not the one that made the picture.
    """
    try:
        record = read_record(args.from_metadata)
        job = Job(**{field.name: record[field.name] for field in fields(Job)})
        if args.image is not None:
            first, *further = (str(image.absolute()) for image in args.image)
            job = replace(job, image=first, further_images=further)
        job_pictures(job)
    except ValueError as error:
        raise Refused([str(error)]) from error
    places = {name: getattr(args, name) or record[name] for name in ("model", "vlm", "adapter")}
    folders: dict[str, Any] = {name: place and Path(place) for name, place in places.items()}
    spec = ModelSpec(
        **folders,
        dtype=record["dtype"],
        device=args.device or record["device"],
        threads=args.threads or record["threads"],
        max_sequence_length=record["max_sequence_length"],
        position_mode=record["position_mode"],
    )
    spec = checked(spec)
    weights = weights_record(spec)
    other = [
        f"{args.from_metadata}: its {key} is {record[key]}, and here it is {weights[key]}"
        for key in WEIGHTS
        if weights[key] != record[key]
    ]
    if other:
        raise Refused(other)
    now = made_on(spec) | {"batch": 1}
    for key in ("device", "threads", "version", "libraries", "batch"):
        if now[key] != record[key]:
            log.warning("%s was %s, and is %s: the last bits may differ", key, record[key], now[key])
    return [Order(job, args.output, str(args.from_metadata))], spec, weights


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.generate",
        description="Pictures from prompts, and edited pictures; see models/README.md.",
    )
    what = parser.add_argument_group("what is made")
    what.add_argument("--prompt", help="what to draw; with --image how to edit it")
    what.add_argument(
        "--image", type=Path, nargs="+", help="picture to edit, and further references of the prompt in order"
    )
    what.add_argument("--prompts", type=Path, metavar="FILE.jsonl", help="many pictures, one a line")
    what.add_argument("--from-metadata", type=Path, metavar="FILE.png", help="make this picture again")
    what.add_argument(
        "--page", type=int, nargs="?", const=7860, metavar="PORT", help="a page in the browser (Gradio)"
    )
    what.add_argument("--output", type=Path, help="PNG file; with --prompts a folder")
    what.add_argument(
        "--num-images", type=int, default=1, help="of each prompt, with the seeds from --seed on"
    )
    what.add_argument("--overwrite", action="store_true", help="replace files that are something else")
    model = parser.add_argument_group("model")
    model.add_argument("--model", type=Path, help="model folder in the released layout")
    model.add_argument("--vlm", type=Path, help="folder of the Qwen2.5-VL of a MetaQuery model")
    model.add_argument("--adapter", type=Path, help="LoRA folder of a run, for example runs/NAME/adapter")
    model.add_argument(
        "--max-sequence-length", type=int, help="T5 tokens (default: 256, less for small models)"
    )
    model.add_argument(
        "--position-mode", choices=("flat", "mrope"), help="MetaQuery (default: flat, as released)"
    )
    _add_picture_options(parser.add_argument_group("pictures (a line of --prompts may say otherwise)"))
    machines = parser.add_argument_group("machines")
    add_machine_options(machines)
    machines.add_argument(
        "--batch-size", type=int, default=1, help="pictures in one forward pass (default: 1)"
    )
    return parser


def _add_picture_options(group: Any) -> None:
    default = {field.name: field.default for field in fields(Options)}
    group.add_argument("--seed", type=int, help=f"default: {default['seed']}")
    group.add_argument("--negative-prompt", help="default: empty")
    group.add_argument("--longer-edge", type=int, help="px (default: 512, less for small models)")
    group.add_argument("--aspect-ratio", metavar="W:H", help="default: that of --image, else 1:1")
    group.add_argument("--height", type=int, help="px, with --width, in place of both")
    group.add_argument("--width", type=int)
    group.add_argument(
        "--reference-pixels",
        type=int,
        help="of several references together (default: each as many as the picture)",
    )
    group.add_argument("--steps", type=int, help=f"Euler steps (default: {default['steps']})")
    group.add_argument(
        "--guidance", type=float, help=f"default: {default['guidance']}; up to 1 there is none"
    )


if __name__ == "__main__":
    sys.exit(main())
