"""Questions about pictures, answered by a frozen Qwen2.5-VL; answers are appended as they come, and none twice.

A line of questions is `{"question": ..., "image": "a.png"}`, or `"image": ["a.png", "b.png"]`, or none; paths are
relative to the file. A line of answers has the question's `line`, `question`, `images` and `answer` as the model wrote
it, `shown`: the width and height at which it saw each picture (boxes in the answer are in those pixels), and what the
answer depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from core.cluster.pool import PoolSpec, run_calls
from core.failures import DataFailure, InfrastructureFailure
from core.files import atomic_write_text
from core.pictures import decode_picture, is_data_uri, picture_bytes, picture_name, unchanged_bytes
from core.progress import Progress
from core.records import Record, append_records, parse_lines, read_records
from core.text import broken_texts
from models.generate.task_lines import Refused, check_record

MAX_ASPECT = 200
"""Longer over shorter edge above which Qwen2.5-VL takes no picture."""


@dataclass(frozen=True)
class AnswerSpec:
    """What the answers depend on beside the questions, and where they are computed."""

    vlm: str
    vlm_sha256: str
    dtype: str
    device: str
    threads: int
    max_new_tokens: int

    @property
    def deciding(self) -> Record:
        """The part that decides an answer."""
        return {"vlm_sha256": self.vlm_sha256, "dtype": self.dtype, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class Question:
    """images: paths or data URIs; images_sha256: of the encoded files; line: in its file, 0 where there is none."""

    question: str
    images: tuple[str, ...]
    images_sha256: tuple[str, ...]
    line: int = 0

    @property
    def identity(self) -> tuple[str, ...]:
        """Equal for questions with the same answer."""
        return self.question, *self.images_sha256


class Answerer:
    """A loaded VLM that answers. A plain class, so that it works here and as a Ray actor."""

    def __init__(self, spec: AnswerSpec) -> None:
        """Load the VLM alone. Raises RuntimeError for a folder that cannot be loaded."""
        import torch
        from safetensors import SafetensorError

        from models.metaquery.encoder import MetaQueryEncoder

        torch.set_num_threads(spec.threads)
        self.spec = spec
        try:
            self.encoder = MetaQueryEncoder.from_pretrained(
                None, spec.vlm, dtype=getattr(torch, spec.dtype), device=spec.device
            )
        except (ValueError, OSError, KeyError, SafetensorError) as error:
            raise RuntimeError(f"{spec.vlm} cannot be loaded: {error}") from error

    def ready(self) -> str:
        """Answers once the model is loaded."""
        return f"{os.uname().nodename}:{os.getpid()}"

    def answer(self, question: Question, pictures: Sequence[bytes]) -> tuple[str, list[tuple[int, int]]]:
        """The answer as the model writes it, and the (width, height) at which it saw each picture.

        Raises:
            DataFailure: a picture or the question cannot be read.
            InfrastructureFailure: the device has too little memory at present.
        """
        import torch

        from models.metaquery.vlm import shown_size

        try:
            images = [
                decode_picture(data, picture_name(name))
                for name, data in zip(question.images, pictures, strict=True)
            ]
            shown = [shown_size(*image.size, self.encoder.reader.image_processor) for image in images]
            text = self.encoder.answer(images, question.question, max_new_tokens=self.spec.max_new_tokens)
        except ValueError as error:
            raise DataFailure(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise InfrastructureFailure(
                f"out of memory on {self.spec.device}: give smaller pictures"
            ) from error
        return text, shown


def make_question(text: str, images: Sequence[str], line: int = 0) -> Question:
    """Read and check the pictures. Raises Refused with everything that is wrong."""
    problems = [] if text.strip() else ["the question is empty"]
    problems += [f"the question {problem}" for _, problem in broken_texts(text)]
    hashes = []
    for image in images:
        name = picture_name(image)
        try:
            data = picture_bytes(image)
            width, height = decode_picture(data, name).size
            hashes.append(hashlib.sha256(data).hexdigest())
        except ValueError as error:
            problems.append(str(error))
            continue
        if max(width, height) > MAX_ASPECT * min(width, height):
            problems.append(
                f"{name}: {width} x {height} px is beyond {MAX_ASPECT}:1, which the VLM cannot see: crop it"
            )
    if problems:
        raise Refused(problems)
    return Question(text, tuple(images), tuple(hashes), line)


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file. Raises Refused with every bad line, as `file:line: what`."""
    problems: list[str] = []

    def parse(number: int, record: Record) -> Question:
        image = record.get("image")
        images = image if isinstance(image, list) else [] if image is None else [image]
        kinds = {"question": str, "image": list, "metadata": dict}
        wrong = check_record(record | {"image": images}, kinds, ("question",))
        if wrong:
            raise Refused(wrong)
        places = [one if is_data_uri(one) else str((path.parent / one).absolute()) for one in images]
        return make_question(record["question"], places, number)

    questions = parse_lines(path, parse, problems)
    if problems:
        raise Refused(problems)
    return questions


def answer_file(questions: Sequence[Question], output: Path, spec: AnswerSpec, pool: PoolSpec) -> list[str]:
    """Answer what `output` has no answer to, append as they come, and put them in order at the end.

    Returns one line for each question that could not be answered.

    Raises:
        Refused: `output` holds something else.
    """
    records = _known(output, spec)
    done = {(record["question"], *record["images_sha256"]): record for record in records}
    left = [question for question in questions if question.identity not in done]
    output.parent.mkdir(parents=True, exist_ok=True)
    _write(output, records)  # without a torn last line, on which nothing may be appended
    failed = []
    with Progress().phase("answer", total=len(left), unit="question") as bar:
        calls = ((key, partial(arguments, question)) for key, question in enumerate(left))
        for key, result in run_calls(Answerer, spec, "answer", calls, pool) if left else ():
            question = left[key]
            bar.advance()
            if isinstance(result, DataFailure):
                failed.append(f"line {question.line}: {question.question!r:.80} is not answered: {result}")
                continue
            answer, shown = result
            head = {"line": question.line, "question": question.question, "images": list(question.images)}
            made = {"answer": answer, "shown": shown, "images_sha256": list(question.images_sha256)}
            done[question.identity] = head | made | spec.deciding
            append_records(output, [done[question.identity]])
    found = ((question, done.get(question.identity)) for question in questions)
    _write(output, [record | {"line": question.line} for question, record in found if record is not None])
    return failed


def arguments(question: Question) -> tuple[Question, list[bytes]]:
    """Of `Answerer.answer`. Raises DataFailure for a picture that has changed or gone since it was checked."""
    try:
        pairs = zip(question.images, question.images_sha256, strict=True)
        return question, [unchanged_bytes(image, sha256) for image, sha256 in pairs]
    except ValueError as error:
        raise DataFailure(str(error)) from error


def _known(output: Path, spec: AnswerSpec) -> list[Record]:
    """The answers that are there. Raises Refused where they are not of this VLM with these settings."""
    if not output.exists():
        return []
    try:
        records = read_records(output)
    except (ValueError, OSError) as error:
        raise Refused([str(error)]) from error
    wanted = {"answer", "question", "images_sha256", *spec.deciding}
    for number, record in enumerate(records, 1):
        if wanted - record.keys():
            raise Refused([f"{output}:{number}: is not an answer of this command; choose another --output"])
        other = [
            f"{key} {record[key]!r}, now {now!r}" for key, now in spec.deciding.items() if record[key] != now
        ]
        if other:
            said = ", ".join(other)
            raise Refused([f"{output}:{number}: was answered with {said}; choose another --output"])
    return records


def _write(output: Path, records: Sequence[Record]) -> None:
    atomic_write_text(output, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
