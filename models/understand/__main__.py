"""Command line: questions about pictures, answered by MetaQuery's frozen Qwen2.5-VL; see `--help`.

    python -m models.understand --vlm FOLDER --image a.png b.png --question "What differs?"
    python -m models.understand --vlm FOLDER --questions questions.jsonl --output answers.jsonl --workers 8

The answer to a single question goes to standard output as the model writes it, JSON with boxes included. Exit code 0:
everything is answered; 1: something could not be; 2: refused, before anything was loaded; 3: stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from models.generate.command_line import (
    add_machine_options,
    device_of,
    dtype_of,
    machine_problems,
    pool_of,
    run_command,
    threads_of,
)
from models.generate.task_lines import Refused

log = logging.getLogger("models.understand")

MAX_NEW_TOKENS = 512
PATHS = ("vlm", "image", "questions", "output")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's head for the exit code."""
    words = _parser().parse_args(argv)

    def work() -> int:
        problems = _word_problems(words)
        if problems:
            raise Refused(problems)
        return _ask(words) if words.questions is None else _ask_all(words)

    return run_command(work, refused="Nothing was asked", stays="Answers that are written")


def _ask(words: argparse.Namespace) -> int:
    from core.cluster.pool import run_calls
    from core.failures import DataFailure
    from models.understand.run import Answerer, arguments, make_question

    question = make_question(words.question, [str(image.absolute()) for image in words.image])
    spec = _spec(words)
    calls = [(0, partial(arguments, question))]
    ((_, result),) = run_calls(Answerer, spec, "answer", calls, pool_of(words, spec.device, spec.threads))
    if isinstance(result, DataFailure):
        sys.stderr.write(f"Not answered: {result}\n")
        return 1
    answer, shown = result
    for image, size in zip(question.images, shown, strict=True):
        log.info("%s was shown at %d x %d px (width x height); boxes are in those pixels", image, *size)
    sys.stdout.write(f"{answer}\n")
    return 0


def _ask_all(words: argparse.Namespace) -> int:
    from models.understand.run import answer_file, read_questions

    questions = read_questions(words.questions)
    spec = _spec(words)
    failed = answer_file(questions, words.output, spec, pool_of(words, spec.device, spec.threads))
    for line in failed:
        sys.stderr.write(f"{line}\n")
    sys.stdout.write(
        f"{len(questions) - len(failed)} of {len(questions)} questions answered in {words.output}\n"
    )
    return 1 if failed else 0


def _spec(words: argparse.Namespace) -> Any:
    """Raises Refused for a folder that holds no Qwen2.5-VL."""
    import recipes
    from models.folders import check_vlm_folder, vlm_sha256
    from models.understand.run import AnswerSpec

    folder = recipes.resolve(words.vlm)
    problems = check_vlm_folder(folder)
    if problems:
        raise Refused(problems)
    device = device_of(words)
    return AnswerSpec(
        str(folder.absolute()),
        vlm_sha256(folder),
        dtype_of(words, device),
        device,
        threads_of(words, device),
        words.max_new_tokens,
    )


def _word_problems(words: argparse.Namespace) -> list[str]:
    checks = [
        ((words.question is None) != (words.questions is None), "give either --question or --questions"),
        ((words.questions is None) == (words.output is None), "--output FILE.jsonl goes with --questions"),
        (
            not words.image or words.questions is None,
            "--image belongs to --question; a line of --questions has its own",
        ),
        (words.max_new_tokens >= 1, f"--max-new-tokens {words.max_new_tokens}: must be 1 or more"),
    ]
    return [message for fine, message in checks if not fine] + machine_problems(words, PATHS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.understand", description="Questions about pictures; see models/README.md."
    )
    parser.add_argument("--vlm", type=Path, required=True, help="folder of a Qwen2.5-VL")
    parser.add_argument("--question")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=[], help="pictures that --question is about, in order"
    )
    parser.add_argument("--questions", type=Path, metavar="FILE.jsonl", help="many questions, one a line")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="answers to --questions")
    parser.add_argument(
        "--max-new-tokens", type=int, default=MAX_NEW_TOKENS, help=f"of an answer (default: {MAX_NEW_TOKENS})"
    )
    add_machine_options(parser.add_argument_group("machines"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
