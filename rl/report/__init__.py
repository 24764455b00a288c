"""One self-contained HTML page from run folders: `python -m rl.report RUN [RUN ...]`."""
