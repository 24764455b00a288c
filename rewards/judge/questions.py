"""A sample, the questions about it, and the judgement that comes of their answers.

Nothing here knows the wire: an `Asker` answers requests, in a run the client, in a test a script.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from PIL import Image

from rewards.base import RESERVED
from rewards.judge.messages import Asker, JudgeReply, JudgeRequest, Outcome
from rewards.judge.parsing import MalformedAnswer, is_refusal, without_thoughts
from rewards.judge.template_files import Template

TASKS = ("edit", "t2i")


@dataclass(frozen=True)
class Sample:
    """A picture to be judged: `instruction` is the edit instruction or the prompt.

    Raises ValueError for an edit without a source picture, text-to-image with one, and an empty instruction.
    """

    task: str
    instruction: str
    result: Image.Image
    source: Image.Image | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; choose one of {', '.join(TASKS)}")
        if self.task == "edit" and self.source is None:
            raise ValueError("an edit is judged against its source picture, and this sample has none")
        if self.task == "t2i" and self.source is not None:
            raise ValueError("a text-to-image sample came with a source picture; judge it as an edit")
        if not self.instruction.strip():
            raise ValueError("the instruction is empty, so there is nothing to judge the picture by")


Reader = Callable[[JudgeReply], Mapping[str, float]]
"""From a complete answer to named values. Raises MalformedAnswer."""


@dataclass(frozen=True)
class Question:
    """One thing to ask about a sample. `template` is kept to word the request anew for a second ask."""

    template: Template
    sample: Sample
    max_tokens: int
    read: Reader
    schema: Mapping[str, object] | None = None
    top_logprobs: int = 0
    shows_instruction: bool = True

    def request(self, ask: int) -> JudgeRequest:
        """The request; from the second ask on with the template's `[again]` at its end."""
        # A question that does not show the instruction has the same answer under every instruction.
        instruction = self.sample.instruction if self.shows_instruction else ""
        return JudgeRequest(
            template=self.template.name,
            template_sha256=self.template.sha256,
            system=self.template.system,
            parts=self.template.parts(
                instruction=instruction, source=self.sample.source, result=self.sample.result, again=ask > 0
            ),
            instruction=instruction,
            max_tokens=self.max_tokens,
            response_schema=self.schema,
            top_logprobs=self.top_logprobs,
            ask=ask,
        )


class JudgeProtocol(Protocol):
    """A way to judge. `roles`: the templates a task needs, in the order of its questions.

    `questions` has one entry per role; `combine` gets the values read from each answer in the same order and
    returns the score in [0, 1] and named parts for the log. `max_tokens`: default limit of one answer.
    """

    max_tokens: int

    def roles(self, task: str) -> tuple[str, ...]: ...

    def questions(
        self, sample: Sample, templates: Mapping[str, Template], max_tokens: int
    ) -> list[Question]: ...

    def combine(self, values: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]: ...


@dataclass(frozen=True)
class Answer:
    """How one question ended, all asks taken together. `values` are there with Outcome.OK alone."""

    outcome: Outcome
    values: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    replies: tuple[JudgeReply, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What the judge made of a sample. `score` in [0, 1], or None.

    outcome: of its gravest question. outcomes: of all its questions. parts: named values of the log. detail: why
    a question was not answered. asks: requests made of the client. cached: every one of them was answered from
    the cache. models: snapshots that answered.
    """

    outcome: Outcome
    score: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""
    asks: int = 0
    cached: bool = False
    models: frozenset[str] = frozenset()
    outcomes: frozenset[Outcome] = frozenset()


Verdict = tuple[float | None, Mapping[str, float]]
"""A score in [0, 1] or None, and named parts for the log."""


async def judge_sample(
    asker: Asker,
    protocol: JudgeProtocol,
    sample: Sample,
    templates: Mapping[str, Template],
    *,
    max_asks: int,
    max_tokens: int,
) -> Judgement:
    """Put all questions of the protocol; there is a score if each of them was answered."""
    questions = protocol.questions(sample, templates, max_tokens)
    return await judge_questions(asker, questions, lambda answers: combine(protocol, answers), max_asks)


def combine(protocol: JudgeProtocol, answers: Sequence[Answer]) -> Verdict:
    """The protocol's score and parts, or nothing if a question was not answered."""
    if any(answer.outcome is not Outcome.OK for answer in answers):
        return None, {}
    return protocol.combine([answer.values for answer in answers])


async def judge_questions(
    asker: Asker,
    questions: Sequence[Question],
    verdict: Callable[[Sequence[Answer]], Verdict],
    max_asks: int,
) -> Judgement:
    """Put all questions at once, each up to `max_asks` times while its answer is malformed.

    A sample whose instruction could be taken for control tokens is not asked about: it is rejected.
    """
    if any(RESERVED in question.sample.instruction for question in questions):
        detail = f"the instruction holds {RESERVED!r}, with which control tokens of chat models begin"
        return Judgement(Outcome.REJECTED, detail=detail, outcomes=frozenset({Outcome.REJECTED}))
    answers = await asyncio.gather(*(_ask(asker, question, max_asks) for question in questions))
    replies = [reply for answer in answers for reply in answer.replies]
    gravest = min(answers, key=lambda answer: list(Outcome).index(answer.outcome))
    score, parts = verdict(answers)
    return Judgement(
        gravest.outcome,
        score,
        parts,
        gravest.detail,
        asks=len(replies),
        cached=all(reply.cached for reply in replies),
        models=frozenset(reply.model for reply in replies if reply.model),
        outcomes=frozenset(answer.outcome for answer in answers),
    )


async def _ask(asker: Asker, question: Question, max_asks: int) -> Answer:
    """One question, asked again while its answer is malformed; every other failure ends it at once."""
    replies: list[JudgeReply] = []
    answer = Answer(Outcome.MALFORMED)
    for ask in range(max_asks):
        replies.append(await asker.ask(question.request(ask)))
        answer = _read(question, replies[-1])
        if answer.outcome is not Outcome.MALFORMED:
            break
    return replace(answer, replies=tuple(replies))


def _read(question: Question, reply: JudgeReply) -> Answer:
    """A truncated answer with token log-probs is read like a whole one: only its first token counts."""
    reply = without_thoughts(reply)
    if not reply.readable:
        return Answer(reply.outcome, detail=f"{question.template.name}: {reply.detail}")
    try:
        return Answer(Outcome.OK, question.read(reply))
    except MalformedAnswer as error:
        said = reply.text or "".join(choice.token for choice in reply.choices)
        outcome = Outcome.REFUSED if is_refusal(said) else Outcome.MALFORMED
        return Answer(outcome, detail=f"{question.template.name}: the answer {error}")
