"""Whole grades in one question whose answer must follow a JSON schema, the reasoning before the grades.

The same four grades and the same combination as `viescore`, at half the calls. The scores still differ: here
quality is graded with source and instruction in view.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from rewards.judge.messages import JudgeReply
from rewards.judge.parsing import grades_schema, schema_grades
from rewards.judge.protocols import Question, Sample
from rewards.judge.template_files import Template
from rewards.judge.viescore import HIGH, PQ_GRADES, SC_GRADES, overall


class Structured:
    """One request per sample."""

    max_tokens = 512

    def roles(self, task: str) -> tuple[str, ...]:
        return (f"structured_{task}",)

    def questions(self, sample: Sample, templates: Mapping[str, Template], max_tokens: int) -> list[Question]:
        names = (*SC_GRADES[sample.task], *PQ_GRADES)
        read = functools.partial(_read, names)
        (role,) = self.roles(sample.task)
        return [Question(templates[role], sample, max_tokens, read, schema=grades_schema(names, high=HIGH))]

    def combine(self, values: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]:
        """SC is the least of the first two grades, PQ of the last two, the score as in `viescore`."""
        (grades,) = values
        pq = min(grades[name] for name in PQ_GRADES)
        sc = min(value for name, value in grades.items() if name not in PQ_GRADES)
        return overall(sc, pq), {"sc": sc, "pq": pq} | dict(grades)


def _read(names: Sequence[str], reply: JudgeReply) -> Mapping[str, float]:
    return schema_grades(reply.text, names, high=HIGH)
