"""Free-text grades in two questions, after VIEScore (Ku et al., 2023) as GEdit-Bench uses it (DESIGN 5).

Differs from both in the wording, which is ours, in named grades instead of a list of two, and in text-to-image,
where VIEScore has one SC grade: here two, content and details, so that SC is the least of two grades in both
tasks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence

from rewards.judge.messages import JudgeReply
from rewards.judge.parsing import loose_grades
from rewards.judge.protocols import Question, Sample
from rewards.judge.template_files import Template

HIGH = 10
SC_GRADES = {"edit": ("success", "preservation"), "t2i": ("content", "details")}
PQ_GRADES = ("naturalness", "cleanness")


def overall(sc: float, pq: float) -> float:
    """sqrt(SC * PQ) / 10: from two grades in [0, 10] to a score in [0, 1]."""
    return math.sqrt(sc * pq) / HIGH


class VieScore:
    """SC (semantic consistency) sees source, result and instruction; PQ (perceptual quality) the result only."""

    max_tokens = 512

    def roles(self, task: str) -> tuple[str, ...]:
        return (f"viescore_{task}_sc", "viescore_pq")

    def questions(self, sample: Sample, templates: Mapping[str, Template], max_tokens: int) -> list[Question]:
        sc, pq = (templates[role] for role in self.roles(sample.task))
        read_sc = functools.partial(_read, SC_GRADES[sample.task])
        read_pq = functools.partial(_read, PQ_GRADES)
        return [
            Question(sc, sample, max_tokens, read_sc),
            Question(pq, sample, max_tokens, read_pq, shows_instruction=False),
        ]

    def combine(self, values: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]:
        """The least grade of each answer, and their geometric mean; parts are on the judge's 0 to 10."""
        sc, pq = (min(grades.values()) for grades in values)
        return overall(sc, pq), {"sc": sc, "pq": pq} | dict(values[0]) | dict(values[1])


def _read(names: Sequence[str], reply: JudgeReply) -> Mapping[str, float]:
    return loose_grades(reply.text, names, high=HIGH)
