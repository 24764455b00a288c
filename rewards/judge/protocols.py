"""The three protocols: free-text grades after VIEScore, grades by JSON schema, and an expectation over digits.

`viescore` follows VIEScore (Ku et al., 2023) as GEdit-Bench uses it (DESIGN 5). It differs from both in the
wording, which is ours, in named grades instead of a list of two, and in text-to-image, where VIEScore has one SC
grade: here two, content and details, so that SC is the least of two grades in both tasks.

`structured` has the same four grades and the same combination at half the calls. The scores still differ: there
quality is graded with source and instruction in view.

`expected_score` ends its scale at 9 because every tokenizer in use writes one digit as one token, while a 10 is one
token here and two there: after a "1" one could not tell whether a "0" was to follow.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence

from rewards.judge.messages import JudgeReply, TokenChoices
from rewards.judge.parsing import MalformedAnswer, grades_schema, loose_grades, schema_grades
from rewards.judge.questions import JudgeProtocol, Question, Reader, Sample
from rewards.judge.template_files import Template

HIGHEST_GRADE = 10
SC_GRADES = {"edit": ("success", "preservation"), "t2i": ("content", "details")}
PQ_GRADES = ("naturalness", "cleanness")

HIGHEST_DIGIT = 9
TOP_LOGPROBS = 20
"""The most that OpenAI and vLLM give by default: room for ten digits with and without a space before them."""

LEAST_MASS = 0.5
"""Below it the judge was more likely to say something else than a grade, so its digits say little."""

_DIGIT = re.compile(r"\s*[0-9]\s*", re.ASCII)
_MORE_NUMBER = re.compile(r"[.,]?[0-9]", re.ASCII)


class VieScore:
    """SC (semantic consistency) sees source, result and instruction; PQ (perceptual quality) the result only."""

    max_tokens = 512

    def roles(self, task: str) -> tuple[str, ...]:
        return (f"viescore_{task}_sc", "viescore_pq")

    def questions(self, sample: Sample, templates: Mapping[str, Template], max_tokens: int) -> list[Question]:
        sc, pq = (templates[role] for role in self.roles(sample.task))
        read_sc, read_pq = (_reader(loose_grades, names) for names in (SC_GRADES[sample.task], PQ_GRADES))
        return [
            Question(sc, sample, max_tokens, read_sc),
            Question(pq, sample, max_tokens, read_pq, shows_instruction=False),
        ]

    def combine(self, values: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]:
        """sqrt(SC * PQ) / 10 of the least grade of each answer; parts are on the judge's 0 to 10."""
        sc, pq = (min(grades.values()) for grades in values)
        parts = {"sc": sc, "pq": pq} | dict(values[0]) | dict(values[1])
        return math.sqrt(sc * pq) / HIGHEST_GRADE, parts


class Structured:
    """One request per sample for all grades of `viescore`, the reasoning before them."""

    max_tokens = 512

    def roles(self, task: str) -> tuple[str, ...]:
        return (f"structured_{task}",)

    def questions(self, sample: Sample, templates: Mapping[str, Template], max_tokens: int) -> list[Question]:
        names = (*SC_GRADES[sample.task], *PQ_GRADES)
        (role,) = self.roles(sample.task)
        schema = grades_schema(names, high=HIGHEST_GRADE)
        return [Question(templates[role], sample, max_tokens, _reader(schema_grades, names), schema=schema)]

    def combine(self, values: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]:
        """As in `viescore`: SC is the least of the first two grades, PQ of the last two."""
        (grades,) = values
        pq = {name: grades[name] for name in PQ_GRADES}
        sc = {name: grade for name, grade in grades.items() if name not in pq}
        return VieScore().combine([sc, pq])


class ExpectedScore:
    """A continuous grade: the expectation over the judge's probabilities for the digits 0 to 9 (DESIGN 5).

    One request per sample, of a few tokens: they show whether more number follows the digit. With a `max_tokens`
    of 1 nothing after the digit is seen, so a judge that means 10 would be read as 1; use it for models that do
    not end their answer after the digit.
    """

    max_tokens = 8

    def roles(self, task: str) -> tuple[str, ...]:
        return (f"expected_score_{task}",)

    def questions(self, sample: Sample, templates: Mapping[str, Template], max_tokens: int) -> list[Question]:
        (role,) = self.roles(sample.task)
        return [Question(templates[role], sample, max_tokens, read_expectation, top_logprobs=TOP_LOGPROBS)]

    def combine(self, values: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]:
        """The expected digit over 9; parts are the digit said, the spread in digits, and the digits' mass."""
        (found,) = values
        return found["expected"] / HIGHEST_DIGIT, dict(found)


PROTOCOLS: dict[str, type[JudgeProtocol]] = {
    "viescore": VieScore,
    "structured": Structured,
    "expected_score": ExpectedScore,
}


def _reader(parse: Callable[..., dict[str, float]], names: Sequence[str]) -> Reader:
    return lambda reply: parse(reply.text, names, high=HIGHEST_GRADE)


def read_expectation(reply: JudgeReply) -> dict[str, float]:
    """Mean and standard deviation over the digits at the first token that is not white space.

    expected, spread: in digits, over the probabilities of the digits alone, renormalised. digit_mass: their
    share of all probability. digit: the one that was said. Raises MalformedAnswer when that token is no single
    digit, when more number follows it, when there are no log-probs, and below `LEAST_MASS`.
    """
    first = _first_digit(reply)
    mass = [0.0] * (HIGHEST_DIGIT + 1)
    for text, logprob in first.alternatives:
        if not logprob <= 1e-6:  # also NaN
            raise MalformedAnswer(f"has the log-probability {logprob} for the token {text!r}")
        if _DIGIT.fullmatch(text):
            mass[int(text)] += math.exp(logprob)
    total = math.fsum(mass)
    if total > 1.001:
        raise MalformedAnswer(f"has digit probabilities that sum to {total:.4f}")
    if total < LEAST_MASS:
        raise MalformedAnswer(
            f"puts only {total:.3f} of its probability on digits; {LEAST_MASS} is the least"
        )
    mean = math.fsum(digit * share for digit, share in enumerate(mass)) / total
    variance = math.fsum((digit - mean) ** 2 * share for digit, share in enumerate(mass)) / total
    spread, digit = math.sqrt(variance), float(int(first.token))
    return {"expected": mean, "spread": spread, "digit_mass": min(total, 1.0), "digit": digit}


def _first_digit(reply: JudgeReply) -> TokenChoices:
    if not reply.choices:
        raise MalformedAnswer(
            f"{reply.text[:40]!r} came without log-probs; if this endpoint or model gives none, choose the "
            "protocol viescore or structured"
        )
    spoken = itertools.dropwhile(lambda choice: not choice.token.strip(), reply.choices)
    first = next(spoken, None)
    rest = "".join(choice.token for choice in spoken)
    if first is None or not _DIGIT.fullmatch(first.token):
        said = "".join(choice.token for choice in reply.choices)
        raise MalformedAnswer(f"{said[:40]!r} does not begin with one digit")
    if not first.token[-1].isspace() and _MORE_NUMBER.match(rest):
        raise MalformedAnswer(f"{first.token + rest[:10]!r} is not one digit")
    return first
