"""The benchmarks of any reward: `shapes`, the embedded world's held-out prompts, and `custom`, the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.prompts import Prompt, PromptFileError, Task, load_prompts
from rewards.benchmarks import geneval
from rewards.benchmarks.figures import Figure, by_group, image_mean
from rewards.benchmarks.items import DataError, Item, ScoredItem


def read(path: Path, task: Task, *, prefix: str = "") -> list[Item]:
    """The prompts of a JSONL file in the recipes' format; keys are `prefix` and the line's number.

    Groups are the metadata's `tag`, or the `kind` of its `edit`, or none. Raises DataError.
    """
    try:
        prompts = load_prompts(path, task)
    except PromptFileError as error:
        raise DataError(error.problems) from error
    return [Item(f"{prefix}{prompt.index:05d}", _group(prompt), prompt) for prompt in prompts]


def figures(scored: Sequence[ScoredItem], *, compat: bool = False) -> list[Figure]:
    """The reward's mean over prompts, by group where there are groups, and of its components."""
    groups = by_group(scored)
    everything = {"": list(scored)}
    parts = sorted(
        {name for item in scored for image in item.images for name in image or () if name != "score"}
    )
    return [
        image_mean("score", "score", everything),
        *(image_mean(f"score, {group}", "score", {group: items}) for group, items in groups.items() if group),
        *(image_mean(part, part, everything) for part in parts),
    ]


def shapes_figures(scored: Sequence[ScoredItem], *, compat: bool = False) -> list[Figure]:
    """GenEval's table for text-to-image, the verifier's score for edits: over the six kinds, and by kind."""
    drawn = [item for item in scored if item.item.prompt.task == "t2i"]
    edited = [item for item in scored if item.item.prompt.task == "edit"]
    rows = [_renamed(row, "t2i") for row in geneval.figures(drawn, compat=compat)] if drawn else []
    if edited:
        kinds = by_group(edited)
        rows.append(image_mean("edit overall", "score", kinds))
        rows += [image_mean(f"edit {kind}", "score", {kind: items}) for kind, items in kinds.items()]
        rows += [image_mean(f"edit overall, {part}", part, kinds) for part in ("instruction", "preservation")]
    return rows


def _renamed(row: Figure, task: str) -> Figure:
    return Figure(f"{task} {row.name}", row.strata, row.expected, row.missing, row.decimals)


def _group(prompt: Prompt) -> str:
    edit = prompt.metadata.get("edit")
    found = edit.get("kind") if isinstance(edit, dict) else prompt.metadata.get("tag")
    return found if isinstance(found, str) else ""
