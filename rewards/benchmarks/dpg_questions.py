"""DPG-Bench's question file: one CSV row per question, the questions of a prompt joined by `dependency`."""

from __future__ import annotations

import csv
import graphlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from core.text import parse_json
from rewards.benchmarks.items import DataError, read_text

COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
GET_DATA = "get dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA (Apache-2.0) and give it as --data"
GET_PROMPTS = "get the folder dpg_bench/prompts of github.com/TencentQQGYLab/ELLA (Apache-2.0)"
LEFT_AS_IT_IS = (
    "mend the row in a copy of the file, or score with --compat, which takes it as the public script does"
)


@dataclass(frozen=True)
class Question:
    """One yes/no question. `parents`: ids of questions without whose yes this one means nothing.

    category: `entity - whole`, the tuple up to its bracket. row: place in the file, counted from 0 without the
    header.
    """

    id: int
    text: str
    parents: tuple[int, ...]
    category: str
    row: int

    @property
    def broad(self) -> str:
        """`entity` of `entity - whole`."""
        return self.category.split("-")[0].strip()


@dataclass(frozen=True)
class QuestionSet:
    """A prompt and its questions, in the order of the file."""

    item_id: str
    text: str
    questions: tuple[Question, ...]

    def parents_first(self) -> list[Question]:
        """The questions, every one after all its parents. Raises graphlib.CycleError, KeyError for no such parent."""
        found = {question.id: question for question in self.questions}
        order = graphlib.TopologicalSorter({question.id: question.parents for question in self.questions})
        return [found[id] for id in order.static_order()]


def read_questions(path: Path, *, compat: bool = False) -> list[QuestionSet]:
    """The prompts of a question file in the order in which they first appear.

    The rows of a prompt need not be neighbours. Unless `compat`, refused: a prompt whose questions depend on
    each other in a circle or on one that is not there, two questions of one id, two texts of one prompt. Raises
    DataError with every bad row as `file:row`.
    """
    rows: dict[str, list[Question]] = {}
    texts: dict[str, str] = {}
    problems: list[str] = []
    for number, line, record in _records(path):
        try:
            question = _question(record, number)
            item_id, text = record["item_id"].strip(), record["text"].strip()
            if not item_id or not text:
                raise ValueError("item_id and text must not be empty")
            if texts.setdefault(item_id, text) != text and not compat:
                raise ValueError(f"item {item_id} has another text here than before; {LEFT_AS_IT_IS}")
        except ValueError as error:
            problems.append(f"{path}:{line}: {error}")
            continue
        rows.setdefault(item_id, []).append(question)
    sets = [QuestionSet(item_id, texts[item_id], tuple(questions)) for item_id, questions in rows.items()]
    if not compat:
        problems += [f"{path}: item {item.item_id}: {problem}" for item in sets for problem in _circle(item)]
    if not sets and not problems:
        problems.append(f"{path}: holds no questions; {GET_DATA}")
    if problems:
        raise DataError(problems)
    return sets


def read_prompts(path: Path) -> dict[str, str]:
    """Prompts alone, by `item_id`: the folder `dpg_bench/prompts` of ID.txt files, or a JSON file `{"ID.txt": prompt}`.

    Enough to generate with, not to score. Raises DataError.
    """
    if path.is_dir():
        found: object = {
            file.name: read_text(file, "a prompt", GET_PROMPTS) for file in sorted(path.glob("*.txt"))
        }
    else:
        try:
            found = parse_json(read_text(path, "DPG-Bench's prompts", GET_PROMPTS))
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError([f"{path}: is not JSON ({error}); {GET_PROMPTS}"]) from error
    if not isinstance(found, Mapping) or not found:
        raise DataError([f"{path}: holds no prompts; {GET_PROMPTS}"])
    bad = [key for key, text in found.items() if not isinstance(text, str) or not text.strip()]
    if bad:
        raise DataError([f"{path}: {key} has no prompt" for key in bad])
    return {key.removesuffix(".txt"): text.strip() for key, text in found.items()}


def questions_json(questions: Sequence[Question]) -> list[dict[str, object]]:
    """The questions as the `questions` of a prompt's metadata, for the reward that asks them."""
    return [{"id": q.id, "text": q.text, "parents": list(q.parents), "category": q.category, "row": q.row}
            for q in questions]  # fmt: skip


def questions_of(metadata: Mapping[str, object]) -> tuple[Question, ...]:
    """The inverse of `questions_json`. Raises ValueError for metadata without questions."""
    found = metadata.get("questions")
    if not isinstance(found, Sequence) or not found:
        raise ValueError("metadata.questions: a DPG-Bench prompt needs its questions")
    return tuple(Question(q["id"], q["text"], tuple(q["parents"]), q["category"], q["row"]) for q in found)


def _records(path: Path) -> Iterator[tuple[int, int, dict[str, str]]]:
    """(row from 0, line in the file, cells) of every row that is not blank."""
    reader = csv.DictReader(io.StringIO(read_text(path, "DPG-Bench's question file", GET_DATA), newline=""))
    missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
    if missing:
        raise DataError([f"{path}: has no column {', '.join(missing)}; {GET_DATA}"])
    for number, record in enumerate(reader):
        yield number, reader.line_num, {name: record[name] or "" for name in COLUMNS}


def _question(record: Mapping[str, str], row: int) -> Question:
    text = record["question_natural_language"].strip()
    if not text:
        raise ValueError("question_natural_language is empty")
    try:
        id = int(record["proposition_id"])
        ids = [int(part) for part in record["dependency"].split(",")]
    except ValueError as error:
        raise ValueError(
            f"proposition_id {record['proposition_id']!r} and dependency {record['dependency']!r} must be whole "
            "numbers, the latter 0 (for none) or several with commas"
        ) from error
    parents = tuple(parent for parent in ids if parent != 0)
    return Question(id, text, parents, record["tuple"].split("(")[0].strip(), row)


def _circle(item: QuestionSet) -> list[str]:
    """What keeps the questions from being put in an order."""
    ids = [question.id for question in item.questions]
    twice = sorted({id for id in ids if ids.count(id) > 1})
    if twice:
        return [f"proposition_id {', '.join(map(str, twice))} is used more than once; {LEFT_AS_IT_IS}"]
    absent = [
        f"question {question.id} depends on {parent}, which is not there; {LEFT_AS_IT_IS}"
        for question in item.questions
        for parent in question.parents
        if parent not in ids
    ]
    if absent:
        return absent
    try:
        item.parents_first()
    except graphlib.CycleError as error:
        circle = " -> ".join(map(str, error.args[1]))
        return [f"questions {circle} depend on each other in a circle; {LEFT_AS_IT_IS}"]
    return []
