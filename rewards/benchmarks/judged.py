"""The rewards of the benchmarks that a vision-language model scores: GEdit-Bench, ImgEdit and DPG-Bench.

Over the judge's client (limits, budget, cache, replay) and its rules for answers: what cannot be read is asked
again and then missing; a refusal is missing. Templates are our own, and so is the wording of VIEScore in
rewards/judge: grades of other templates, and of other judges, do not compare.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rewards.base import FatalRewardError, RetryableRewardError, RewardOutput
from rewards.benchmarks.dpg import answer_name, image_score
from rewards.benchmarks.dpg_questions import questions_of
from rewards.benchmarks.imgedit import GRADES, TYPES
from rewards.benchmarks.items import ANSWERED_BY
from rewards.judge.client import JudgeClient
from rewards.judge.cost import cost_lines
from rewards.judge.judge import INFRASTRUCTURE
from rewards.judge.messages import JudgeReply, Outcome
from rewards.judge.parsing import MalformedAnswer, loose_grades
from rewards.judge.protocols import GRAVITY, Answer, Asker, Question, Sample, ask_question
from rewards.judge.settings import JudgeSettings
from rewards.judge.silence import Silence
from rewards.judge.template_files import Template, TemplateError, load_template
from rewards.judge.viescore import VieScore

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "templates"
VERSION = "v1"
DECIDING = ("model", "temperature", "seed", "image_format", "image_detail", "max_asks", "max_tokens")
"""Parameters that can move an answer. All others say how it is reached and paid for."""


class Judged:
    """What the three have in common. Parameters are the fields of `JudgeSettings` and those of `__init__`.

    max_asks: how often a question is put while its answer cannot be read. max_tokens: limit of one answer.
    give_up_after_s: seconds without any answer from the endpoint after which a failing call stops the run.
    """

    default_max_tokens = 512
    _typical: Mapping[str, Any] = {}
    """Metadata of a usual prompt, for trial questions and estimates."""
    operational_params = (
        *(field.name for field in dataclasses.fields(JudgeSettings) if field.name not in DECIDING),
        "give_up_after_s",
    )

    def __init__(
        self,
        *,
        max_asks: int = 2,
        max_tokens: int | None = None,
        give_up_after_s: float = 600.0,
        **settings: Any,
    ) -> None:
        """Raises ValueError for a parameter that is unknown, and without a model."""
        known = [field.name for field in dataclasses.fields(JudgeSettings)]
        unknown = sorted(set(settings) - set(known))
        if unknown:
            raise ValueError(f"parameters {unknown} are not known; known are {', '.join(known)}")
        if "model" not in settings:
            raise ValueError(
                "model is not set; give the name of the judge at its endpoint, for example model=gpt-4.1"
            )
        if max_asks < 1:
            raise ValueError(f"max_asks is {max_asks}; give 1 (no second ask) or more")
        self.settings = JudgeSettings(**settings)
        self.max_asks = max_asks
        self.max_tokens = max_tokens or self.default_max_tokens
        self.give_up_after_s = give_up_after_s
        self._client = JudgeClient(self.settings)
        self._silence = Silence(self._client, INFRASTRUCTURE)

    @functools.cached_property
    def templates(self) -> dict[str, Template]:
        """Templates by the name that `questions` uses. Raises TemplateError."""
        raise NotImplementedError

    def questions(self, sample: Sample, metadata: Mapping[str, Any]) -> list[Question]:
        """What is asked about one picture. Raises ValueError for metadata that say too little."""
        raise NotImplementedError

    def verdict(
        self, answers: Sequence[Answer], metadata: Mapping[str, Any]
    ) -> tuple[float | None, Mapping[str, float]]:
        """Score in [0, 1] or None, and named values, from the answers in the order of the questions."""
        raise NotImplementedError

    def sample(self, image: Image.Image, prompt: str, reference: Image.Image | None) -> Sample:
        """The picture as the judge sees it."""
        return Sample("t2i" if reference is None else "edit", prompt, image, reference)

    @property
    def where(self) -> str:
        """Model and endpoint, as errors name them."""
        return f"{self.settings.model} at {', '.join(self.settings.base_urls)}"

    def check(self) -> list[str]:
        """Problems of templates, key, cache and budget; asks the endpoint nothing."""
        problems = list(self._client.problems())
        try:
            self.templates  # noqa: B018  (loads them)
        except TemplateError as error:
            problems.append(str(error))
        return problems

    async def readiness(self) -> list[str]:
        """Put the questions about one small picture once. Costs that; nothing in replay mode."""
        if self.settings.mode == "replay":
            return []
        client = JudgeClient(self.settings)  # closing the own one would drop what others are asking
        grey = Image.new("RGB", (64, 64), "grey")
        sample = Sample("edit", "make the picture red", Image.new("RGB", (64, 64), "red"), grey)
        try:
            answers = await self._ask(client, self.questions(sample, self._typical)[:1])
        finally:
            await client.close()
        return [
            f"judge {self.where}: a trial question ended {answer.outcome}: {answer.detail}"
            for answer in answers
            if answer.outcome is not Outcome.OK
        ]

    def estimate(self, *, images: int, task: str, height: int, width: int) -> list[str]:
        """Calls, tokens and money for `images` pictures, as lines to print."""
        blank = Image.new("RGB", (width, height))
        sample = Sample(task, "x" * 200, blank, blank if task == "edit" else None)
        questions = self.questions(sample, self._typical)
        return cost_lines(self.settings, questions, images=images, max_asks=self.max_asks)

    async def score(
        self,
        *,
        images: Sequence[Image.Image],
        prompts: Sequence[str],
        references: Sequence[Image.Image | None],
        metadata: Sequence[Mapping[str, Any]],
    ) -> RewardOutput:
        """Ask about all pictures at once.

        Components: the named values; `answered_by.SNAPSHOT` and, where a question was not answered,
        `ended.OUTCOME`, each 1 where it holds. Raises FatalRewardError when no later call can succeed or the
        endpoint has been silent for too long, RetryableRewardError when it left every picture open.
        """
        asked = [
            self.questions(self.sample(image, prompt, reference), record)
            for image, prompt, reference, record in zip(images, prompts, references, metadata, strict=True)
        ]
        try:
            answers = await asyncio.gather(*(self._ask(self._silence, questions) for questions in asked))
        except asyncio.CancelledError:  # the reward's `timeout_s`
            self._stop_if_silent()
            raise
        found = [self.verdict(mine, record) for mine, record in zip(answers, metadata, strict=True)]
        self._raise_failures(answers, [score for score, _ in found])
        return _output(found, answers)

    async def _ask(self, asker: Asker, questions: Sequence[Question]) -> list[Answer]:
        return list(await asyncio.gather(*(ask_question(asker, one, self.max_asks) for one in questions)))

    def _raise_failures(self, answers: Sequence[Sequence[Answer]], scores: Sequence[float | None]) -> None:
        failed = [answer for mine in answers for answer in mine if answer.outcome is not Outcome.OK]
        if not failed:
            return
        worst = min(failed, key=lambda answer: GRAVITY.index(answer.outcome))
        logger.warning("judge %s: %d questions not answered; %s", self.where, len(failed), worst.detail)
        if worst.outcome is Outcome.FATAL:
            raise FatalRewardError(f"judge {self.where}: {worst.detail}")
        if any(answer.outcome in INFRASTRUCTURE for answer in failed):
            self._stop_if_silent()
            if all(score is None for score in scores):
                raise RetryableRewardError(f"judge {self.where}: no picture was scored: {worst.detail}")

    def _stop_if_silent(self) -> None:
        if self._silence.seconds() >= self.give_up_after_s:
            raise FatalRewardError(
                f"judge {self.where}: no answer for {self._silence.seconds():.0f} s, which is give_up_after_s "
                f"{self.give_up_after_s:g} or more; the last failure: {self._silence.detail}"
            )


class GEditGrades(Judged):
    """SC and PQ of VIEScore, 0 to 10. The edit is shown at the size of its source, as the public script does."""

    @functools.cached_property
    def templates(self) -> dict[str, Template]:
        return {role: load_template(role) for role in VieScore().roles("edit")}

    def sample(self, image: Image.Image, prompt: str, reference: Image.Image | None) -> Sample:
        if reference is not None and image.size != reference.size:
            image = image.resize(reference.size, Image.Resampling.BICUBIC)
        return super().sample(image, prompt, reference)

    def questions(self, sample: Sample, metadata: Mapping[str, Any]) -> list[Question]:
        return VieScore().questions(sample, self.templates, self.max_tokens)

    def verdict(
        self, answers: Sequence[Answer], metadata: Mapping[str, Any]
    ) -> tuple[float | None, Mapping[str, float]]:
        if any(answer.outcome is not Outcome.OK for answer in answers):
            return None, {}
        return VieScore().combine([answer.values for answer in answers])


class ImgEditGrades(Judged):
    """Adherence, quality and preservation, each 1 to 5, by criteria for the edit's type; one question."""

    _typical = {"edit_type": TYPES[0]}

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

    def verdict(
        self, answers: Sequence[Answer], metadata: Mapping[str, Any]
    ) -> tuple[float | None, Mapping[str, float]]:
        (answer,) = answers
        if answer.outcome is not Outcome.OK:
            return None, {}
        return (sum(answer.values.values()) / len(GRADES) - 1) / 4, answer.values


class DPGQuestions(Judged):
    """Yes or no to each of the prompt's questions, each put by itself. Any VLM will do; the published figures are
    mPLUG-large's, and those of another one do not compare with them."""

    default_max_tokens = 64
    _typical = {
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

    def verdict(
        self, answers: Sequence[Answer], metadata: Mapping[str, Any]
    ) -> tuple[float | None, Mapping[str, float]]:
        questions = questions_of(metadata)
        found = {
            question.id: answer.values["yes"]
            for question, answer in zip(questions, answers, strict=True)
            if answer.outcome is Outcome.OK
        }
        try:
            score = image_score(questions, found)
        except (
            KeyError,
            ValueError,
        ):  # a broken graph, which only --compat reads: that needs the answers alone
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


def _output(
    found: Sequence[tuple[float | None, Mapping[str, float]]], answers: Sequence[Sequence[Answer]]
) -> RewardOutput:
    rows = []
    for (_, parts), mine in zip(found, answers, strict=True):
        snapshots = {reply.model for answer in mine for reply in answer.replies if reply.model}
        ended = {answer.outcome for answer in mine if answer.outcome is not Outcome.OK}
        rows.append(
            dict(parts)
            | {f"{ANSWERED_BY}{model}": 1.0 for model in snapshots}
            | {f"ended.{outcome.value}": 1.0 for outcome in ended}
        )
    names = sorted({name for row in rows for name in row})
    return RewardOutput(
        [score for score, _ in found], {name: [row.get(name) for row in rows] for name in names}
    )
