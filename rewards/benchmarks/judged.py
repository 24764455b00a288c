"""The rewards of the benchmarks that a vision-language model scores: GEdit-Bench, ImgEdit and DPG-Bench.

Each is a `JudgeReward` (limits, budget, cache, replay; what cannot be read is asked again and then missing; a refusal
is missing) with its own questions. Templates are our own, and so is the wording of VIEScore in rewards/judge: grades
of other templates, and of other judges, do not compare.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rewards.benchmarks.dpg import answer_name, image_score
from rewards.benchmarks.dpg_questions import questions_of
from rewards.benchmarks.imgedit import GRADES, TYPES
from rewards.benchmarks.items import ANSWERED_BY
from rewards.judge.judge import OPERATIONAL, JudgeReward
from rewards.judge.messages import INFRASTRUCTURE, JudgeReply, Outcome
from rewards.judge.parsing import MalformedAnswer, loose_grades
from rewards.judge.protocols import VieScore
from rewards.judge.questions import Answer, Judgement, Question, Sample, Verdict
from rewards.judge.template_files import Template, TemplateError, load_template

FOLDER = Path(__file__).parent / "templates"
VERSION = "v1"


class _BenchmarkReward(JudgeReward):
    """A batch is repeated only when it gave no score at all: a benchmark counts what is missing."""

    tasks = ("edit",)
    least_share = 0.0
    operational_params = OPERATIONAL

    def may_recover(self, judgement: Judgement) -> bool:
        return not judgement.outcomes.isdisjoint(INFRASTRUCTURE)

    def components(self, judgement: Judgement) -> dict[str, float]:
        """The named values; `answered_by.SNAPSHOT` and, where a question was not answered, `ended.OUTCOME`, each 1
        where it holds."""
        failed = judgement.outcomes - {Outcome.OK}
        marks = [f"{ANSWERED_BY}{model}" for model in judgement.models]
        marks += [f"ended.{outcome.value}" for outcome in failed]
        return dict(judgement.parts) | dict.fromkeys(marks, 1.0)


class GEditGrades(_BenchmarkReward):
    """SC and PQ of VIEScore, 0 to 10. The edit is shown at the size of its source, as the public script does."""

    protocol = VieScore()

    def sample(self, image: Image.Image, prompt: str, references: Sequence[Image.Image]) -> Sample:
        if references and image.size != references[0].size:
            image = image.resize(references[0].size, Image.Resampling.BICUBIC)
        return super().sample(image, prompt, references)


class ImgEditGrades(_BenchmarkReward):
    """Adherence, quality and preservation, each 1 to 5, by criteria for the edit's type; one question."""

    typical_metadata = {"edit_type": TYPES[0]}

    @functools.cached_property
    def templates(self) -> dict[str, Template]:
        frame = load_template("structured_edit", str(FOLDER / f"imgedit_grades.{VERSION}.txt"))
        criteria = _criteria(FOLDER / f"imgedit_criteria.{VERSION}.txt")
        found = {}
        for kind in TYPES:
            user = frame.user.replace("{criteria}", criteria[kind])
            sha256 = hashlib.sha256("\n".join((frame.system, user, frame.again)).encode()).hexdigest()
            found[kind] = dataclasses.replace(frame, name=f"{frame.name}.{kind}", sha256=sha256, user=user)
        return found

    def questions(self, sample: Sample, metadata: Mapping[str, Any]) -> list[Question]:
        kind = metadata.get("edit_type")
        if kind not in TYPES:
            raise ValueError(f"metadata.edit_type: {kind!r} is not one of {', '.join(TYPES)}")
        return [Question(self.templates[kind], sample, self.max_tokens, _read_grades)]

    def verdict(self, answers: Sequence[Answer], metadata: Mapping[str, Any]) -> Verdict:
        (answer,) = answers
        if answer.outcome is not Outcome.OK:
            return None, {}
        return (sum(answer.values.values()) / len(GRADES) - 1) / 4, answer.values


class DPGQuestions(_BenchmarkReward):
    """Yes or no to each of the prompt's questions, each put by itself. Any VLM will do; the published figures are
    mPLUG-large's, and those of another one do not compare with them."""

    default_max_tokens = 64
    tasks = ("t2i",)
    typical_metadata = {
        "questions": [
            {
                "id": k,
                "text": "Is the thing that is named red all over?",
                "parents": [],
                "category": "",
                "row": k,
            }
            for k in range(14)
        ]
    }

    @functools.cached_property
    def templates(self) -> dict[str, Template]:
        return {"question": load_template("structured_t2i", str(FOLDER / f"dpg_question.{VERSION}.txt"))}

    def questions(self, sample: Sample, metadata: Mapping[str, Any]) -> list[Question]:
        return [
            Question(
                self.templates["question"],
                dataclasses.replace(sample, instruction=question.text),
                self.max_tokens,
                _read_yes_or_no,
            )
            for question in questions_of(metadata)
        ]

    def verdict(self, answers: Sequence[Answer], metadata: Mapping[str, Any]) -> Verdict:
        """The graph's score. One that cannot be followed, which only --compat reads, counts the answers alone."""
        questions = questions_of(metadata)
        found = {
            question.id: answer.values["yes"]
            for question, answer in zip(questions, answers, strict=True)
            if answer.outcome is Outcome.OK
        }
        try:
            score = image_score(questions, found)
        except (KeyError, ValueError):
            score = sum(found.values()) / len(questions) if len(found) == len(questions) else None
        return score, {answer_name(q): found[q.id] for q in questions if q.id in found}


def _read_grades(reply: JudgeReply) -> Mapping[str, float]:
    grades = loose_grades(reply.text, GRADES, high=5)
    for name, grade in grades.items():
        if grade < 1 or grade != int(grade):
            raise MalformedAnswer(f"{name} is {grade:g}, not a whole number from 1 to 5")
    return grades


def _read_yes_or_no(reply: JudgeReply) -> Mapping[str, float]:
    """An answer that begins with yes or no and does not say the other one as well."""
    words = re.findall(r"[a-z]+", reply.text.lower())
    said = {"yes", "no"} & set(words)
    if len(said) != 1 or words[0] not in said:
        raise MalformedAnswer(f"is neither yes nor no: {reply.text[:60]!r}")
    return {"yes": float("yes" in said)}


def _criteria(path: Path) -> dict[str, str]:
    """Edit type -> its lines. Raises TemplateError."""
    pieces = re.split(r"^\[(\w+)\]\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {kind: text.strip() for kind, text in zip(pieces[::2], pieces[1::2], strict=True)}
    missing = [kind for kind in TYPES if not found.get(kind)]
    if missing:
        raise TemplateError(f"{path}: has no section for {', '.join(missing)}")
    return found
