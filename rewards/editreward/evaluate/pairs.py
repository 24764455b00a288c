"""Public sets of preferences between two edits, from a JSON list or a JSONL file.

    {"source": picture, "instruction": text, "first": picture, "second": picture,
     "preference": "first" | "second" | "tie"}

Pictures are paths relative to the file. A set with other names for these keys and words is read with the recipe's
`fields` and `preferences`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import recipes
from core.agreement import best_threshold, pair_accuracy
from core.pictures import read_picture
from core.statistics import Estimate, bootstrap_mean
from core.text import parse_json, read_text
from rewards.editreward.config import PairSetSection
from rewards.editreward.data.shards import DataError

KEYS = ("source", "instruction", "first", "second", "preference")
GAPS = {"first": 1.0, "second": -1.0, "tie": 0.0}


@dataclass(frozen=True)
class Preference:
    """One judgement. gap: 1 where the first result is better, -1 the second, 0 a tie."""

    source: Path
    instruction: str
    first: Path
    second: Path
    gap: float


@dataclass(frozen=True)
class PairResult:
    """accuracy over decided pairs; accuracy_ties over all, with the predicted difference up to which it is a tie."""

    name: str
    accuracy: Estimate
    accuracy_ties: Estimate
    tie_threshold: float
    unscored: int


def load_pairs(section: PairSetSection) -> list[Preference]:
    """Raises DataError naming file, record and key for anything that is missing or has another form."""
    path = recipes.resolve(section.path)
    if not path.is_file():
        raise DataError(f"pair set {section.name}: {path} does not exist")
    text = read_text(path)
    try:
        listed = text.lstrip().startswith("[")
        records = (
            parse_json(text) if listed else [parse_json(line) for line in text.split("\n") if line.strip()]
        )
    except ValueError as error:
        raise DataError(f"{path}: neither a JSON list nor JSON lines ({error})") from error
    if not records:
        raise DataError(f"{path}: no pairs in it")
    return [
        _preference(record, f"{path}: record {i}", path.parent, section) for i, record in enumerate(records)
    ]


def _preference(record: Any, where: str, folder: Path, section: PairSetSection) -> Preference:
    values: dict[str, str] = {}
    for key in KEYS:
        name = section.fields.get(key, key)
        if not isinstance(record, dict) or not isinstance(record.get(name), str):
            raise DataError(f"{where}: no text under {name!r}; map the set's own names in pair_sets.fields")
        values[key] = record[name]
    word = section.preferences.get(values["preference"], values["preference"])
    if word not in GAPS:
        raise DataError(
            f"{where}: preference {word!r} is not first, second or tie; map it in pair_sets.preferences"
        )
    pictures = {key: folder / values[key] for key in ("source", "first", "second")}
    absent = [str(picture) for picture in pictures.values() if not picture.is_file()]
    if absent:
        raise DataError(f"{where}: {absent[0]} does not exist")
    return Preference(instruction=values["instruction"], gap=GAPS[word], **pictures)


def evaluate_pairs(
    name: str,
    pairs: Sequence[Preference],
    score: Callable[[Sequence[tuple[Image.Image, Image.Image, str]]], list[float | None]],
    *,
    batch_size: int,
    resamples: int,
    seed: int,
) -> PairResult:
    """Accuracy on one set. Intervals resample sources (by path); a pair with an unscored side is left out, counted."""
    answers: list[float | None] = []
    for start in range(0, len(pairs), batch_size):
        edits = []
        for pair in pairs[start : start + batch_size]:
            source = _picture(pair.source)
            edits += [(source, _picture(side), pair.instruction) for side in (pair.first, pair.second)]
        answers += score(edits)
    sides = list(zip(answers[::2], answers[1::2], strict=True))
    kept = [i for i, side in enumerate(sides) if None not in side]
    differences = np.array([sides[i][0] - sides[i][1] for i in kept], dtype=np.float64)  # type: ignore[operator]
    gaps = np.array([pairs[i].gap for i in kept])
    sources = [str(pairs[i].source) for i in kept]
    threshold = best_threshold(gaps, differences, 0.0) if kept else 0.0
    decided, every = pair_accuracy(gaps, differences, threshold)
    decided_sources = [s for s, gap in zip(sources, gaps, strict=True) if gap != 0]
    return PairResult(
        name,
        _by_source(decided, decided_sources, resamples, seed),
        _by_source(every, sources, resamples, seed),
        threshold,
        len(sides) - len(kept),
    )


def _by_source(values: np.ndarray, sources: Sequence[str], resamples: int, seed: int) -> Estimate:
    """The mean over sources of the mean over their pairs."""
    found: dict[str, list[float]] = {}
    for value, source in zip(values, sources, strict=True):
        found.setdefault(source, []).append(float(value))
    return bootstrap_mean([float(np.mean(v)) for v in found.values()], resamples=resamples, seed=seed)


def _picture(path: Path) -> Image.Image:
    try:
        return read_picture(path)
    except ValueError as error:
        raise DataError(str(error)) from error
