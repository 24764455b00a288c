"""GenEval (Ghosh et al., 2023): 553 prompts of six tags, four pictures each, correct or not by rewards/geneval.

As published: the score is the unweighted mean over the six tags of the share of correct pictures. Where we
differ from the public summary: with a tag of which nothing was scored there is no overall score (theirs is the
mean of the other tags), a prompt with missing pictures counts as correct only if one of the others is (theirs
never knows that one is missing), and what is missing is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from core.prompts import Prompt, PromptFileError, load_prompts
from rewards.benchmarks.figures import Figure, by_group, figure, image_mean, only_scored
from rewards.benchmarks.items import DataError, Item, ScoredItem
from rewards.geneval.rules import TAGS, check_clauses

GET_DATA = "get prompts/evaluation_metadata.jsonl of github.com/djghosh13/geneval (MIT licence) and give it as --data"


def read(path: Path) -> list[Item]:
    """The records of `evaluation_metadata.jsonl`, or of any file in its format.

    Keys are line numbers from 00000, as GenEval names its folders. Raises DataError.
    """
    try:
        prompts = load_prompts(path, "t2i")
    except PromptFileError as error:
        raise DataError([f"{problem}; {GET_DATA}" for problem in error.problems]) from error
    problems = [problem for prompt in prompts for problem in _problems(prompt)]
    if problems:
        raise DataError(problems)
    return [Item(f"{prompt.index:05d}", prompt.metadata["tag"], prompt) for prompt in prompts]


def figures(scored: Sequence[ScoredItem], *, compat: bool = False) -> list[Figure]:
    """Overall and by tag, then stricter readings of the same pictures.

    compat: as evaluation/summary_scores.py: the mean over the tags that occur, and a prompt correct if any
    picture found of it is.
    """
    tags = by_group([_plain(item) for item in scored], TAGS)
    tags = only_scored(tags, "correct") if compat else tags
    everything = {"": [item for members in tags.values() for item in members]}
    return [
        image_mean("overall", "correct", tags),
        *(image_mean(tag, "correct", {tag: members}) for tag, members in tags.items()),
        image_mean("correct images", "correct", everything),
        figure("correct prompts", everything, lambda item: _any_correct(item, compat=compat)),
        image_mean("overall, exact counts", "strict", tags),
        image_mean("overall, partial credit", "dense", tags),
    ]


def _plain(item: ScoredItem) -> ScoredItem:
    """Without the prefix that names detector and colour rule: `DETECTOR.COLOURS.correct` becomes `correct`."""
    images = [
        None if image is None else {name.rpartition(".")[2]: value for name, value in image.items()}
        for image in item.images
    ]
    return ScoredItem(item.item, tuple(images))


def _any_correct(item: ScoredItem, *, compat: bool) -> list[float]:
    """Whether any picture is correct, once for each; nothing where a missing picture leaves it open."""
    found = item.values("correct")
    best = max(found, default=0.0)
    if best == 0.0 and len(found) < len(item.images) and not compat:
        return []
    return [best] * (len(found) and len(item.images))


def _problems(prompt: Prompt) -> list[str]:
    where = f"{prompt.name} ({prompt.prompt!r})"
    if prompt.metadata.get("tag") not in TAGS:
        return [
            f"{where}: tag {prompt.metadata.get('tag')!r} is not one of {', '.join(TAGS)}; {GET_DATA}, or use "
            "the benchmark custom"
        ]
    try:
        for key in ("include", "exclude"):
            check_clauses(prompt.metadata.get(key) or (), key, placed=key == "include")
    except ValueError as error:
        return [f"{where}: {error}; {GET_DATA}"]
    return []
