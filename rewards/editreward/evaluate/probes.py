"""Three changes that must lower the score of a good edit; a checkpoint that does not mind one of them is refused.

    instruction   another edit's instruction: a regressor that ignores the text does not notice
    black         a black result: one that ignores the result does not notice
    unchanged     the source returned as the result: a judge of beauty alone does not notice

Tried on the best-labelled edit of each (source, instruction) group whose label lies above the mean. The drop is
counted in standard deviations of the score over the whole evaluated set, so that it does not depend on the scale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from core.seeds import numpy_generator
from core.statistics import Estimate, bootstrap_mean
from rewards.editreward.data.index import Entry
from rewards.editreward.data.shards import EditSample

Edit = tuple[Image.Image, Image.Image, str]
Score = Callable[[Sequence[Edit]], list[float | None]]
PROBES = ("instruction", "black", "unchanged")
_STREAM = 7


@dataclass(frozen=True)
class ProbeResult:
    """drop: mean fall of the score in standard deviations, with its interval over samples. `needed` passes."""

    name: str
    drop: Estimate
    needed: float
    passed: bool


def choose_probe_entries(entries: Sequence[Entry], labels: Sequence[float], most: int) -> list[int]:
    """Positions of the best-labelled edit of each group, above the mean label; at most `most`, by group hash."""
    best: dict[str, int] = {}
    for i, entry in enumerate(entries):
        if entry.group not in best or labels[i] > labels[best[entry.group]]:
            best[entry.group] = i
    mean = float(np.mean(labels))
    return [best[group] for group in sorted(best) if labels[best[group]] > mean][:most]


def run_probes(
    samples: Sequence[EditSample],
    scores: Sequence[float],
    score: Score,
    *,
    instructions: Sequence[str],
    std: float,
    needed: float,
    resamples: int,
    seed: int,
) -> list[ProbeResult]:
    """Probe a model on good edits. `scores`: what it gave them unchanged.

    std: of its scores over the whole evaluated set; instructions: of that set.
    A sample whose changed form was not scored counts for nothing; a model whose scores never vary fails every probe.
    Raises ValueError for fewer than two samples.
    """
    if len(samples) < 2:
        raise ValueError(
            f"{len(samples)} edits have labels above the mean and can be probed; evaluate a larger split"
        )
    results = []
    for name in PROBES:
        changed = score(changed_edits(name, samples, instructions, seed))
        drops = [
            None if new is None or not std > 0 else (old - new) / std
            for old, new in zip(scores, changed, strict=True)
        ]
        drop = bootstrap_mean(drops, resamples=resamples, seed=seed)
        results.append(ProbeResult(name, drop, needed, drop.mean is not None and drop.mean >= needed))
    return results


def changed_edits(
    probe: str, samples: Sequence[EditSample], instructions: Sequence[str], seed: int
) -> list[Edit]:
    """The samples as one probe shows them. `instructions`: those of the evaluated set, to take others from.

    Raises ValueError where the set holds a single instruction.
    """
    if probe == "black":
        return [(s.source, Image.new("RGB", s.result.size), s.instruction) for s in samples]
    if probe == "unchanged":
        return [(s.source, s.source, s.instruction) for s in samples]
    known = sorted(set(instructions))
    rng = numpy_generator(seed, 0, _STREAM)
    edits = []
    for sample in samples:
        others = [text for text in known if text != sample.instruction]
        if not others:
            raise ValueError(
                f"every edit has the instruction {sample.instruction!r}: there is no other to show"
            )
        edits.append((sample.source, sample.result, others[int(rng.integers(len(others)))]))
    return edits
