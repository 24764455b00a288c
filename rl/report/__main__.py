"""Command line: `python -m rl.report RUN [RUN ...] [--output report.html]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from core.files import atomic_write_text
from rl.report.document import report_document
from rl.report.page import render_page
from rl.report.traces import place_traces

LARGEST = 15_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print where it is; 2 when a folder is no run."""
    parser = argparse.ArgumentParser(
        prog="python -m rl.report",
        description="One self-contained HTML page from one or several run folders, finished or not.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder that rl.train made")
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write; default: report.html in the run's folder, or here for several runs",
    )
    options = parser.parse_args(arguments)
    output = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    try:
        document = report_document(options.runs, place_traces(options.runs, output))
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    page = render_page(document)
    atomic_write_text(output, page)
    for run in document["runs"]:
        for note in run["notes"]:
            print(f"{run['label']}: {note}")
    size = len(page.encode())
    print(f"{output}: {size / 1e6:.1f} MB")
    if size > LARGEST:
        print(f"the page is larger than {LARGEST / 1e6:.0f} MB; give fewer runs at once", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
