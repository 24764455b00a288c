"""What the judge is asked about an edit: three whole grades in one structured answer, and their overall.

The judge's own structured protocol has two grades for how the picture looks and none for it as a whole; the three
here are those that a regressor of edits is trained on. `overall` is GEdit's formula over them,
sqrt(min(instruction, preservation) x quality), in label units (DESIGN section 5).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rewards.judge.messages import Asker, JudgeReply, JudgeRequest
from rewards.judge.parsing import grades_schema, schema_grades
from rewards.judge.questions import Question, Sample
from rewards.judge.template_files import Template, load_template

GRADES = ("instruction", "preservation", "quality")
DIMENSIONS = (*GRADES, "overall")
HIGH = 10
TEMPLATE = Path(__file__).with_name("label_edit.v1.txt")
ROLE = "structured_edit"
"""The judge's name for a question that shows source, result and instruction."""
SECOND = 1000
"""Added to the number of the ask: another seed, and another place in the cache."""


def read_template(path: str | None) -> Template:
    """The packaged question, or a file of one's own. Raises TemplateError."""
    return load_template(ROLE, str(TEMPLATE) if path is None else path)


class EditLabels:
    """The protocol (see `rewards.judge.questions.JudgeProtocol`): one request per edit, grades from 0 to 10."""

    max_tokens = 512

    def roles(self, task: str) -> tuple[str, ...]:
        return (ROLE,)

    def questions(self, sample: Sample, templates: Mapping[str, Template], max_tokens: int) -> list[Question]:
        schema = grades_schema(GRADES, high=HIGH)
        return [Question(templates[ROLE], sample, max_tokens, _read, schema=schema)]

    def combine(self, values: Sequence[Mapping[str, float]]) -> tuple[float, dict[str, float]]:
        """Overall on [0, 1], and the label of every dimension."""
        (grades,) = values
        overall = math.sqrt(min(grades["instruction"], grades["preservation"]) * grades["quality"])
        return overall / HIGH, dict(grades) | {"overall": overall}


class SecondOpinion:
    """Puts the very same question once more: with another seed, past the cached first answer."""

    def __init__(self, asker: Asker) -> None:
        self._asker = asker

    async def ask(self, request: JudgeRequest) -> JudgeReply:
        return await self._asker.ask(dataclasses.replace(request, ask=request.ask + SECOND))


def _read(reply: JudgeReply) -> Mapping[str, float]:
    return schema_grades(reply.text, GRADES, high=HIGH)
