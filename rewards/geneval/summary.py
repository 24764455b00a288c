"""GenEval's summary of many verdicts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rewards.geneval.rules import TAGS, GenEvalResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TagSummary:
    """Means over the images of one tag."""

    images: int
    correct: float
    strict: float
    dense: float


@dataclass(frozen=True)
class GenEvalSummary:
    """Scores of a set of images.

    `overall`, `overall_strict`, `overall_dense`: unweighted means over the tags that occur. `image_accuracy`:
    share of correct images. `prompt_accuracy`: share of prompts with at least one correct image.
    """

    overall: float
    overall_strict: float
    overall_dense: float
    image_accuracy: float
    prompt_accuracy: float
    images: int
    prompts: int
    tags: dict[str, TagSummary]


def summarize(results: Sequence[GenEvalResult]) -> GenEvalSummary:
    """The overall score is the unweighted mean over tags, not over images.

    Raises ValueError when there are no results. Logs which of the six tags are absent.
    """
    if not results:
        raise ValueError("summarize: no results; evaluate at least one image first")
    present = {result.tag for result in results}
    absent = [tag for tag in TAGS if tag not in present]
    if absent:
        logger.warning("no images of %s: the overall score is the mean of the other tags", ", ".join(absent))
    tags: dict[str, TagSummary] = {}
    for tag in (*(t for t in TAGS if t in present), *sorted(present - set(TAGS))):
        rows = [result for result in results if result.tag == tag]
        tags[tag] = TagSummary(
            images=len(rows),
            correct=fmean(r.correct for r in rows),
            strict=fmean(r.strict for r in rows),
            dense=fmean(r.dense for r in rows),
        )
    prompts: dict[tuple[str, str], bool] = {}
    for result in results:
        key = (result.tag, result.prompt)
        prompts[key] = prompts.get(key, False) or result.correct
    return GenEvalSummary(
        overall=fmean(tag.correct for tag in tags.values()),
        overall_strict=fmean(tag.strict for tag in tags.values()),
        overall_dense=fmean(tag.dense for tag in tags.values()),
        image_accuracy=fmean(r.correct for r in results),
        prompt_accuracy=fmean(prompts.values()),
        images=len(results),
        prompts=len(prompts),
        tags=tags,
    )
