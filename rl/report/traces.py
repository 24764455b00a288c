"""The Chrome traces beside a page: for chrome://tracing and Perfetto, which show every span at any scale."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from core.files import atomic_write_json
from core.spans import SPANS_FILE, chrome_trace
from rl.record.summary import run_finished
from rl.report.reading import read_lines
from rl.report.runs import run_labels
from rl.report.timeline import parse_spans

TRACE = "trace.json"


def place_traces(folders: Sequence[Path], page: Path) -> list[str | None]:
    """A trace beside `page` for each run, as links relative to it; None for a run without spans.

    In its own run's folder it is the run's `trace.json`, elsewhere a copy. An unfinished run has none yet, so it is
    made from the spans so far.
    """
    return [
        _place(folder, label, page) for folder, label in zip(folders, run_labels(list(folders)), strict=True)
    ]


def _place(folder: Path, label: str, page: Path) -> str | None:
    if not (folder / SPANS_FILE).is_file():
        return None
    own = folder.resolve() == page.resolve().parent
    name = TRACE if own else f"{page.stem}_{re.sub(r'[^A-Za-z0-9.-]+', '_', label)}_{TRACE}"
    target, made = page.parent / name, folder / TRACE
    finished = run_finished(folder) and made.is_file()
    if not finished:
        notes: list[str] = []
        spans = parse_spans(read_lines(folder / SPANS_FILE, notes), notes)
        atomic_write_json(target, chrome_trace(spans))
    elif not own:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, target)
    return quote(name)
