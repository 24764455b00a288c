"""`python -m rewards.editreward evaluate RECIPE [key=value ...] [--model FOLDER] [--against PREDICTIONS]`.

Measures an exported model on held-out sources, on public pair sets, and by probes. Everything is written to
`evaluation-SPLIT/` beside the model. Exit code 1 where a probe failed: such a checkpoint must not become a reward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from core.agreement import agreement
from core.command_line import add_recipe_arguments
from core.progress import Progress
from core.statistics import Estimate
from rewards.editreward.config import Recipe
from rewards.editreward.data.index import Entry, load_corpus, read_entry, whole_groups
from rewards.editreward.evaluate.metrics import (
    Scored,
    group_differences,
    group_estimates,
    overall,
    scored_entries,
    tie_threshold,
    within_groups,
)
from rewards.editreward.evaluate.pairs import evaluate_pairs, load_pairs
from rewards.editreward.evaluate.probes import Edit, ProbeResult, choose_probe_entries, run_probes
from rewards.editreward.evaluate.report import (
    Report,
    plot_calibration,
    read_predictions,
    table,
    write_predictions,
    write_report,
)
from rewards.editreward.model_folder import MODEL, read_card
from rewards.editreward.settings import EditRewardSettings, SettingsError
from rewards.editreward.validate import load_recipe

if TYPE_CHECKING:
    from rewards.editreward.client_local import LocalModel

REFUSALS = (ValueError,)
"""ConfigError, DataError, SettingsError and ModelFolderError are its kinds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe that trained, the model, and what to compare it with."""
    add_recipe_arguments(parser, "recipes/editreward.yaml", Recipe)
    parser.add_argument("--model", type=Path, help="exported folder; default: model/ in the run's folder")
    out = "folder to write; default: evaluation-SPLIT/ beside the model"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--against", type=Path, help="predictions.jsonl of another model on the same samples")


def run(arguments: argparse.Namespace) -> int:
    """0: measured, every probe passed. 1: a probe failed."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    model = arguments.model or recipe.run_dir / MODEL
    out = arguments.out or model.parent / f"evaluation-{recipe.evaluate.split}"
    report = evaluate(recipe, model, out, against=arguments.against)
    sys.stdout.write("\n".join(table(report)) + "\n")
    return 1 if report.failed_probes else 0


def evaluate(recipe: Recipe, model: Path, out: Path, *, against: Path | None = None) -> Report:
    """Score the recipe's split with an exported model and write the evaluation.

    The recipe's own dimensions, scale and rule give the labels; the model's constants must be the same.
    Raises SettingsError where they are not, DataError for unusable data or pair sets.
    """
    from rewards.editreward.client_local import LocalModel

    section, draws = recipe.evaluate, {"resamples": recipe.evaluate.resamples, "seed": recipe.seed}
    card = read_card(model)
    _check_constants(recipe, card.settings)
    pair_sets = [(pairs.name, load_pairs(pairs)) for pairs in section.pair_sets]
    other = read_predictions(against) if against else {}
    entries = whole_groups(load_corpus(recipe).splits[section.split], section.max_samples)
    scorer = Scorer(LocalModel(card, recipe.resources.device, section.batch_size), card.settings)
    scores = score_entries(entries, scorer, section.batch_size)
    labels = [card.settings.combined(entry.scores) for entry in entries]
    write_predictions(entries, labels, scores, out)
    scored = scored_entries(entries, labels, scores)
    ties = {"tie_margin": section.tie_margin, "threshold": tie_threshold(scored, section.tie_margin)}
    inside = within_groups(scored, **ties)
    differences = {}
    if other:  # paired by source; each model with its own tie threshold
        theirs = scored_entries(entries, labels, [other.get((Path(e.shard).name, e.key)) for e in entries])
        threshold = tie_threshold(theirs, section.tie_margin)
        before = within_groups(theirs, tie_margin=section.tie_margin, threshold=threshold)
        differences = group_differences(before, inside, **draws)
    report = Report(
        model=str(model),
        split=section.split,
        samples=len(scored.target),
        groups=len(set(scored.groups)),
        sources=len(set(scored.sources)),
        unscored=len(entries) - len(scored.target),
        tie_threshold=ties["threshold"],
        overall=overall(scored, **draws),
        within_groups=group_estimates(inside, **draws),
        by_edit_type=_by_edit_type(scored, ties, draws),
        probes=_probe(entries, labels, scores, scorer, recipe),
        pair_sets=[
            evaluate_pairs(name, pairs, scorer.score, batch_size=section.batch_size, **draws)
            for name, pairs in pair_sets
        ],
        against=differences,
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
    scores: list[float | None] = []
    with Progress().phase("evaluate", total=len(entries), unit="sample") as bar:
        for start in range(0, len(entries), batch_size):
            samples = [read_entry(entry) for entry in entries[start : start + batch_size]]
            scores += scorer.score([(s.source, s.result, s.instruction) for s in samples])
            bar.advance(len(samples))
    return scores


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
    scored: Scored, ties: dict[str, float], draws: dict[str, Any]
) -> dict[str, dict[str, Estimate]]:
    """Within-group figures of each edit type, and its error in label units."""
    found = {}
    for kind in sorted(set(scored.edit_types)):
        part = scored.where(np.flatnonzero(scored.edit_types == kind))
        errors = agreement(part.target, part.predicted)
        found[kind] = group_estimates(within_groups(part, **ties), **draws) | {
            name: Estimate(errors[name], None, None, len(part.target)) for name in ("mae", "rmse")
        }
    return found


def _probe(
    entries: Sequence[Entry],
    labels: Sequence[float],
    scores: Sequence[float | None],
    scorer: Scorer,
    recipe: Recipe,
) -> list[ProbeResult]:
    section = recipe.evaluate
    known = [(e, label, s) for e, label, s in zip(entries, labels, scores, strict=True) if s is not None]
    chosen = choose_probe_entries(
        [entry for entry, _, _ in known], [label for _, label, _ in known], section.probes.samples
    )
    return run_probes(
        [read_entry(known[i][0]) for i in chosen],
        [known[i][2] for i in chosen],
        scorer.score,
        instructions=[entry.instruction for entry in entries],
        std=float(np.std([score for _, _, score in known])),
        needed=section.probes.min_drop,
        resamples=section.resamples,
        seed=recipe.seed,
    )
