"""Everything the page shows, as one JSON document made from run folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core import __version__
from core.spans import SPANS_FILE, Span
from rl.report.compare import ablation, differing_settings, ends
from rl.report.curves import drawn_panels, training_table
from rl.report.evaluations import Scores, base_guidance, changes, evaluation_curves, read_scores
from rl.report.gallery import flat_prompts, gallery, groups, read_groups
from rl.report.pictures import Shelf
from rl.report.reading import number, read_lines
from rl.report.runs import Run, read_run, run_labels, run_state
from rl.report.timeline import parse_spans, timeline

PICTURE_BUDGET = 8_000_000
"""Characters of data URIs in the galleries of all runs; the page stays below 15 MB with all the rest."""
GROUP_PICTURE_BUDGET = 2_500_000
MOST_NUMBERS = 250_000
"""Values in the curves of all runs."""
MOST_SPANS = 40_000
_COLUMNS = 60


def report_document(folders: Sequence[Path], trace_links: Sequence[str | None]) -> dict[str, Any]:
    """The document of some run folders; `trace_links` are where the page will find their traces.

    Raises FileNotFoundError when one of them is no run folder.
    """
    labels = run_labels(list(folders))
    runs = [read_run(folder, label) for folder, label in zip(folders, labels, strict=True)]
    shelf, share = Shelf(), len(runs)
    entries, tables, all_scores = [], [], []
    for run, link in zip(runs, trace_links, strict=True):
        table = training_table(run.metrics, run.notes, max(2, MOST_NUMBERS // _COLUMNS // share))
        scores = read_scores(run)
        spans = parse_spans(read_lines(run.path / SPANS_FILE, run.notes), run.notes)
        tables.append(table)
        all_scores.append(scores)
        entries.append(_run_entry(run, table, scores, spans, shelf, share) | {"trace": link})
    stages = list(
        dict.fromkeys(part for run in runs for stage in run.stages for part in stage.parts)
    ) or list(dict.fromkeys(str(part) for table in tables for part in table["parts"] if part))
    return {
        "made": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "version": __version__,
        "runs": entries,
        "panels": drawn_panels(tables, stages),
        "pictures": shelf.uris,
        "settings": differing_settings(runs) if len(runs) > 1 else [],
        "ablation": ablation(runs, [ends(scores) for scores in all_scores]),
    }


def _run_entry(
    run: Run, table: dict[str, Any], scores: Sequence[Scores], spans: Sequence[Span], shelf: Shelf, share: int
) -> dict[str, Any]:
    summary, records = run.summary or {}, read_groups(run)
    return {
        "label": run.label,
        "state": run_state(run),
        "finished": run.summary is not None,
        "stages": [asdict(stage) for stage in run.stages],
        "lastStep": run.last_step,
        "images": number(summary.get("images")),
        "seconds": number(summary.get("seconds")),
        "restarts": number(summary.get("restarts")),
        "learnerRestarts": number(summary.get("learner_restarts")),
        "commit": summary.get("commit") if isinstance(summary.get("commit"), str) else None,
        "train": table,
        "evaluation": evaluation_curves(run, scores),
        "guidance": base_guidance(scores),
        "changes": changes(run, scores),
        "gallery": gallery(run, shelf, PICTURE_BUDGET // share),
        "flat": flat_prompts(records),
        "groups": groups(run, records, shelf, GROUP_PICTURE_BUDGET // share),
        "timeline": timeline(run, spans, MOST_SPANS // share),
        "alarms": run.alarms,
        "notes": run.notes,
    }
