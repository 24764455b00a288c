"""GEdit-Bench (Liu et al., 2025, with Step1X-Edit): 606 edits of eleven groups in English, and as many in Chinese.

As published: SC and PQ from 0 to 10 by a vision-language model, overall sqrt(SC * PQ) of each sample; the mean
by group, then the unweighted mean over the groups; by language; on the full set and on the samples marked
`Intersection_exist`, on which every model compared in the paper gave a picture.

Where we differ from the public scripts: what is missing is counted, and with a group of which nothing was scored
there is no mean over groups. Their arithmetic is sound, so `compat` changes nothing here. Their fault lies before
it: an answer that cannot be read becomes a random score, which no mode of ours repeats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.prompts import Prompt
from core.text import parse_json
from rewards.benchmarks.figures import Figure, by_group, figure
from rewards.benchmarks.items import DataError, Item, ScoredItem, read_edits, read_text

GROUPS = (
    "background_change",
    "color_alter",
    "material_alter",
    "motion_change",
    "ps_human",
    "style_change",
    "subject-add",
    "subject-remove",
    "subject-replace",
    "text_change",
    "tone_transfer",
)
LANGUAGES = ("en", "cn")
METADATA = "metadata.jsonl"
GET_DATA = (
    "get the data set stepfun-ai/GEdit-Bench from the Hugging Face hub (see its card for the licence of the pictures) "
    "and unpack it with `python -m rewards.benchmarks.gedit_export`"
)

MEASURES = {
    "SC": lambda values: values["sc"],
    "PQ": lambda values: values["pq"],
    "overall": lambda values: math.sqrt(values["sc"] * values["pq"]),
}


@dataclass(frozen=True)
class _Edit:
    """One edit; `where` it stands, for messages. `intersection` is None where the data does not say."""

    where: str
    key: str
    group: str
    language: str
    instruction: Any
    source: Path
    intersection: bool | None = None


def read(path: Path, *, languages: Sequence[str] = ("en",), references: Path | None = None) -> list[Item]:
    """The edits in `languages`.

    path: a folder that `gedit_export` wrote, or a JSON file `{key: {"prompt", "id", "edit_type"}}` with the
    source pictures at `references / id`. The latter says nothing of the intersection. Raises DataError.
    """
    if path.is_dir():
        edits = _unpacked(path)
    elif references is None:
        raise DataError(
            [f"{path}: is not a folder; with a JSON file give --references, the folder of its pictures"]
        )
    else:
        edits = _json(path, references)
    problems = [problem for edit in edits for problem in _problems(edit)]
    if problems:
        raise DataError(problems)
    chosen = [edit for edit in edits if edit.language in languages]
    if not chosen:
        raise DataError([f"{path}: holds no instructions in {', '.join(languages)}"])
    return [_item(index, edit) for index, edit in enumerate(chosen)]


def figures(scored: Sequence[ScoredItem], *, compat: bool = False) -> list[Figure]:
    """For each language and subset: overall, SC and PQ over the groups, then overall by group."""
    rows = []
    for language in LANGUAGES:
        spoken = [item for item in scored if item.metadata["language"] == language]
        marked = [item for item in spoken if item.metadata["intersection"]]
        known = any(item.metadata["intersection"] is not None for item in spoken)
        subsets = [("full", spoken)] * bool(spoken) + [("intersection", marked)] * known
        for subset, items in subsets:
            groups = by_group(items, GROUPS)
            name = f"{language} {subset}"
            rows += [_mean(f"{name} {measure}", groups, measure) for measure in ("overall", "SC", "PQ")]
            rows += [
                _mean(f"{name} overall, {group}", {group: members}, "overall")
                for group, members in groups.items()
                if members
            ]
    return rows


def _mean(name: str, groups: Mapping[str, Sequence[ScoredItem]], measure: str) -> Figure:
    def found(item: ScoredItem) -> list[float]:
        return [MEASURES[measure](v) for v in item.images if v is not None and "sc" in v and "pq" in v]

    return figure(name, groups, found)


def _unpacked(folder: Path) -> list[_Edit]:
    text = read_text(folder / METADATA, "the list of GEdit-Bench's edits", GET_DATA)
    edits, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{folder / METADATA}:{number}"
        try:
            if line.strip():
                row = parse_json(line)
                key, group, language = row["key"], row["task_type"], row["instruction_language"]
                source = source_path(folder, group, language, key)
                marked = bool(row["Intersection_exist"])
                edits.append(_Edit(where, key, group, language, row["instruction"], source, marked))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{where}: {type(error).__name__}: {error}; {GET_DATA}")
    if problems:
        raise DataError(problems)
    return edits


def source_path(folder: Path, group: str, language: str, key: str) -> Path:
    """Where the public generation script puts a source picture, beside the edit's own place."""
    return folder / "fullset" / group / language / f"{key}_SRCIMG.png"


def _json(path: Path, references: Path) -> list[_Edit]:
    return [
        _Edit(f"{path}: {key}", key, group, Path(id).parent.name, instruction, references / id)
        for key, id, instruction, group in read_edits(path, "GEdit-Bench's instructions", GET_DATA)
    ]


def _problems(edit: _Edit) -> list[str]:
    checks = [
        (edit.group in GROUPS, f"group {edit.group!r} is not one of {', '.join(GROUPS)}"),
        (edit.language in LANGUAGES, f"language {edit.language!r} is not one of {', '.join(LANGUAGES)}"),
        (str(edit.instruction).strip() != "", "the instruction is empty"),
        (edit.source.is_file(), f"source picture {edit.source} does not exist; {GET_DATA}"),
    ]
    return [f"{edit.where}: {message}" for fine, message in checks if not fine]


def _item(index: int, edit: _Edit) -> Item:
    metadata = {"group": edit.group, "language": edit.language, "intersection": edit.intersection}
    prompt = Prompt(index, "edit", edit.instruction, (str(edit.source.absolute()),), metadata)
    return Item(f"{edit.group}/{edit.language}/{edit.key}", edit.group, prompt)
