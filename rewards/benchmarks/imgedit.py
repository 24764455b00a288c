"""ImgEdit-Bench, basic suite (Ye et al., 2025): edits of nine types, three grades from 1 to 5 for each.

As published: an item's score is the mean of its three grades (instruction adherence, editing quality, detail
preservation), a type's the mean over its items; the overall score of the papers is the unweighted mean over the
nine types. The mean over items is given beside it, since some public code reports that.

Where we differ from the public scripts: nothing is rounded on the way (step 1 rounds every item, step 2 every
type, to two decimals), an item counts with exactly three grades or not at all (theirs averages whatever digits it
finds in the answer, one or two if need be), what is missing is counted, and with a type of which nothing was
scored there is no overall score. `compat` rounds as they do and averages over the types that occur. How their
script reads answers is not repeated: what is kept of an answer here are its grades.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.prompts import Prompt
from rewards.benchmarks.figures import Figure, by_group, figure, image_mean, only_scored
from rewards.benchmarks.items import DataError, Item, ScoredItem, read_edits

TYPES = ("add", "alter", "extract", "replace", "remove", "background", "style", "compose", "action")
ALIASES = {"adjust": "alter", "hybrid": "compose"}
"""Names of the paper's table -> names in the data."""
GRADES = ("adherence", "quality", "preservation")
COMPAT_DECIMALS = 2
GET_DATA = (
    "get basic_edit.json and the original pictures of ImgEdit-Bench (Benchmark.tar of sysuyy/ImgEdit on the Hugging "
    "Face hub; its repository states no licence, so see that you may use them); give the one as --data, the folder "
    "of the others as --references"
)


def read(path: Path, *, references: Path | None) -> list[Item]:
    """The edits of `basic_edit.json`: `{key: {"id", "prompt", "edit_type"}}`, sources at `references / id`.

    Raises DataError.
    """
    if references is None:
        raise DataError([f"--references is missing, the folder of the original pictures; {GET_DATA}"])
    rows = read_edits(path, "ImgEdit's list of edits", GET_DATA)
    problems = [problem for row in rows for problem in _problems(path, row, references)]
    if problems or not rows:
        raise DataError(problems or [f"{path}: holds no edits; {GET_DATA}"])
    return [_item(index, row, references) for index, row in enumerate(rows)]


def figures(scored: Sequence[ScoredItem], *, compat: bool = False) -> list[Figure]:
    """Overall, by type, over items, and the three grades by themselves."""
    types = by_group(scored, TYPES)
    types = only_scored(types, GRADES[0]) if compat else types
    everything = {"": [item for members in types.values() for item in members]}
    decimals = COMPAT_DECIMALS if compat else None

    def mean_grade(item: ScoredItem) -> list[float]:
        means = [sum(v[name] for name in GRADES) / len(GRADES) for v in item.images if v and _graded(v)]
        return [round(mean, COMPAT_DECIMALS) for mean in means] if compat else means

    return [
        figure("overall", types, mean_grade, decimals=decimals),
        *(
            figure(kind, {kind: members}, mean_grade, decimals=decimals)
            for kind, members in types.items()
            if members
        ),
        figure("mean over items", everything, mean_grade, decimals=decimals),
        *(image_mean(f"overall, {name} alone", name, types) for name in GRADES),
    ]


def _graded(values: Mapping[str, float]) -> bool:
    return all(name in values for name in GRADES)


def _problems(path: Path, row: tuple[Any, ...], references: Path) -> list[str]:
    key, id, prompt, kind = row
    checks = [
        (ALIASES.get(kind, kind) in TYPES, f"edit_type {kind!r} is not one of {', '.join(TYPES)}"),
        (isinstance(prompt, str) and prompt.strip() != "", "prompt is empty"),
        ((references / id).is_file(), f"source picture {references / id} does not exist; {GET_DATA}"),
    ]
    return [f"{path}: {key}: {message}" for fine, message in checks if not fine]


def _item(index: int, row: tuple[Any, ...], references: Path) -> Item:
    key, id, prompt, kind = row
    kind = ALIASES.get(kind, kind)
    source = str((references / id).absolute())
    return Item(key, kind, Prompt(index, "edit", prompt, (source,), {"edit_type": kind}))
