"""`python -m rewards.editreward evaluate RECIPE [key=value ...] [--model FOLDER] [--against PREDICTIONS]`.

Measures an exported model on held-out sources, on public pair sets, and by probes. Everything is written to
`evaluation-SPLIT/` beside the model. Exit code 1 where a probe failed: such a checkpoint must not become a reward.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from core.logs import start_logging
from core.progress import Progress
from core.recipe import ConfigError
from core.statistics import Difference, Estimate
from rewards.editreward.config import EvaluateSection, Recipe
from rewards.editreward.data.shards import DataError
from rewards.editreward.settings import EditRewardSettings, SettingsError
from rewards.editreward.validate import load_recipe

if TYPE_CHECKING:
    from rewards.editreward.client_local import LocalModel
    from rewards.editreward.data.index import Entry
    from rewards.editreward.evaluate.metrics import Scored
    from rewards.editreward.evaluate.probes import Edit, ProbeResult
    from rewards.editreward.evaluate.report import Report

log = logging.getLogger("rewards.editreward.evaluate.command")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe that trained, the model, and what to compare it with."""
    from rewards.editreward.train.command import add_recipe_arguments

    add_recipe_arguments(parser)
    parser.add_argument("--model", type=Path, help="exported folder; default: model/ in the run's folder")
    parser.add_argument(
        "--out", type=Path, help="folder to write; default: evaluation-SPLIT/ beside the model"
    )
    parser.add_argument("--against", type=Path, help="predictions.jsonl of another model on the same samples")


def run(arguments: argparse.Namespace) -> int:
    """0: measured, every probe passed. 1: a probe failed. 2: recipe, data or model cannot be used."""
    from rewards.editreward.client_card import ModelFolderError
    from rewards.editreward.evaluate.report import table
    from rewards.editreward.train.export import FOLDER

    start_logging()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
        model = arguments.model or recipe.run_dir / FOLDER
        out = arguments.out or model.parent / f"evaluation-{recipe.evaluate.split}"
        report = evaluate(recipe, model, out, against=arguments.against)
    except (ConfigError, DataError, SettingsError, ModelFolderError, ValueError) as error:
        sys.stderr.write(f"Cannot evaluate:\n{error}\n")
        return 2
    sys.stdout.write("\n".join(table(report)) + "\n")
    return 1 if report.failed_probes else 0


def evaluate(recipe: Recipe, model: Path, out: Path, *, against: Path | None = None) -> Report:
    """Score the recipe's split with an exported model and write the evaluation.

    The recipe's own dimensions, scale and rule give the labels; the model's constants must be the same.
    Raises SettingsError where they are not, DataError for unusable data or pair sets.
    """
    from rewards.editreward.client_card import read_card
    from rewards.editreward.client_local import LocalModel
    from rewards.editreward.data.index import load_corpus, whole_groups
    from rewards.editreward.evaluate.metrics import group_estimates, overall, tie_threshold, within_groups
    from rewards.editreward.evaluate.pairs import evaluate_pairs, load_pairs
    from rewards.editreward.evaluate.report import (
        Report,
        plot_calibration,
        read_predictions,
        write_predictions,
        write_report,
    )
    from rewards.editreward.train.rank import INDEX

    section = recipe.evaluate
    card = read_card(model)
    _check_constants(recipe, card.settings)
    pair_sets = [(pairs.name, load_pairs(pairs)) for pairs in section.pair_sets]
    other = read_predictions(against) if against else {}
    corpus = load_corpus(recipe, recipe.run_dir / INDEX)
    entries = whole_groups(corpus.splits[section.split], section.max_samples)
    scorer = Scorer(LocalModel(card, recipe.resources.device, section.batch_size), card.settings)
    scores = score_entries(entries, scorer, section.batch_size)
    labels = [card.settings.combined(entry.scores) for entry in entries]
    draws = {"resamples": section.resamples, "seed": recipe.seed}
    write_predictions(entries, labels, scores, out)
    scored = scored_entries(entries, labels, scores)
    threshold = tie_threshold(scored, tie_margin=section.tie_margin)
    inside = within_groups(scored, tie_margin=section.tie_margin, threshold=threshold)
    report = Report(
        model=str(model),
        split=section.split,
        samples=len(scored.target),
        groups=len(set(scored.groups)),
        sources=len(set(scored.sources)),
        unscored=len(entries) - len(scored.target),
        tie_threshold=threshold,
        overall=overall(scored, **draws),
        within_groups=group_estimates(inside, **draws),
        by_edit_type=_by_edit_type(scored, section, threshold, recipe.seed),
        probes=_probe(entries, labels, scores, scorer, recipe),
        pair_sets=[
            evaluate_pairs(name, pairs, scorer.score, batch_size=section.batch_size, **draws)
            for name, pairs in pair_sets
        ],
        against=_against(entries, labels, inside, other, recipe) if other else {},
    )
    plot_calibration(scored, out)
    write_report(report, out)
    return report


class Scorer:
    """An exported model as one number in label units for each edit."""

    def __init__(self, model: LocalModel, settings: EditRewardSettings):
        self.model, self.settings = model, settings

    def score(self, edits: Sequence[Edit]) -> list[float | None]:
        """None for an edit that the model cannot be shown or that it answers with NaN."""
        return [None if raw is None else self.settings.score(raw) for raw in self.model.outputs(edits)]


def score_entries(entries: Sequence[Entry], scorer: Scorer, batch_size: int) -> list[float | None]:
    """Scores of indexed samples, a batch at a time."""
    from rewards.editreward.data.index import read_entry

    scores: list[float | None] = []
    with Progress().phase("evaluate", total=len(entries), unit="sample") as bar:
        for start in range(0, len(entries), batch_size):
            samples = [read_entry(entry) for entry in entries[start : start + batch_size]]
            scores += scorer.score([(s.source, s.result, s.instruction) for s in samples])
            bar.advance(len(samples))
    return scores


def scored_entries(
    entries: Sequence[Entry], labels: Sequence[float], scores: Sequence[float | None]
) -> Scored:
    """What was scored, as arrays. Raises DataError for fewer than two."""
    from rewards.editreward.evaluate.metrics import Scored

    kept = [i for i, score in enumerate(scores) if score is not None]
    if len(kept) < 2:
        raise DataError(f"the model scored {len(kept)} of {len(entries)} samples: nothing to measure")
    return Scored(
        np.array([labels[i] for i in kept]),
        np.array([scores[i] for i in kept], dtype=np.float64),
        [entries[i].group for i in kept],
        [entries[i].source for i in kept],
        [entries[i].edit_type for i in kept],
    )


def _check_constants(recipe: Recipe, settings: EditRewardSettings) -> None:
    """Raise SettingsError when the recipe's labels are not what the model was trained to predict."""
    data = recipe.data
    pairs = {
        "data.dimensions": (tuple(data.dimensions), settings.dimensions),
        "data.score_low": (data.score_low, settings.score_low),
        "data.score_high": (data.score_high, settings.score_high),
        "data.combine": (data.combine, settings.combine),
    }
    problems = [
        f"{key} is {mine}, the model was made with {its}" for key, (mine, its) in pairs.items() if mine != its
    ]
    if problems:
        raise SettingsError("; ".join(problems))


def _by_edit_type(
    scored: Scored, section: EvaluateSection, threshold: float, seed: int
) -> dict[str, dict[str, Estimate]]:
    """Within-group figures of each edit type, and its error in label units."""
    from rewards.editreward.evaluate.metrics import agreement, group_estimates, within_groups

    found = {}
    for kind in sorted(set(scored.edit_types)):
        part = scored.where([i for i, name in enumerate(scored.edit_types) if name == kind])
        values = within_groups(part, tie_margin=section.tie_margin, threshold=threshold)
        figures = group_estimates(values, resamples=section.resamples, seed=seed)
        errors = agreement(part.target, part.predicted)
        n = len(part.target)
        found[kind] = figures | {name: Estimate(errors[name], None, None, n) for name in ("mae", "rmse")}
    return found


def _probe(
    entries: Sequence[Entry],
    labels: Sequence[float],
    scores: Sequence[float | None],
    scorer: Scorer,
    recipe: Recipe,
) -> list[ProbeResult]:
    from rewards.editreward.data.index import read_entry
    from rewards.editreward.evaluate.probes import choose_probe_entries, run_probes

    section = recipe.evaluate
    known = [i for i, score in enumerate(scores) if score is not None]
    chosen = choose_probe_entries(
        [entries[i] for i in known], [labels[i] for i in known], section.probes.samples
    )
    rows = [known[i] for i in chosen]
    present = [float(s) for s in scores if s is not None]
    return run_probes(
        [read_entry(entries[i]) for i in rows],
        [float(scores[i]) for i in rows],  # type: ignore[arg-type]
        scorer.score,
        instructions=[entry.instruction for entry in entries],
        std=float(np.std(present)),
        needed=section.probes.min_drop,
        resamples=section.resamples,
        seed=recipe.seed,
    )


def _against(
    entries: Sequence[Entry],
    labels: Sequence[float],
    inside: dict[str, dict[str, float]],
    other: dict[tuple[str, str], float],
    recipe: Recipe,
) -> dict[str, Difference]:
    """This model minus the other, within groups, paired by source; each with its own tie threshold."""
    from rewards.editreward.evaluate.metrics import group_differences, tie_threshold, within_groups

    section = recipe.evaluate
    theirs = scored_entries(entries, labels, [other.get((Path(e.shard).name, e.key)) for e in entries])
    threshold = tie_threshold(theirs, tie_margin=section.tie_margin)
    before = within_groups(theirs, tie_margin=section.tie_margin, threshold=threshold)
    return group_differences(before, inside, resamples=section.resamples, seed=recipe.seed)
