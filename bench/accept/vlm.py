"""The shapes VLM from random weights: its two recipes once more, and held-out questions put to what they made and to
the committed folder. Resumable: run it again and it goes on where it was.
"""

from __future__ import annotations

from dataclasses import asdict

import torch

from bench.accept.base import COMMITTED, FOLDER, train
from bench.accept.evidence import conclude
from worlds.shapes.training.evaluate_vlm import as_table, evaluate

STAGES = ("vision", "vlm")
NUM_QUESTIONS = 2040
FLOOR = 0.8


def main() -> None:
    """Write `docs/evidence/vlm.md`; exits 1 when either of the two answers less than `FLOOR`."""
    torch.set_num_threads(1)
    seconds = {stage: train(stage) for stage in STAGES}
    folders = {"trained anew": FOLDER / "vlm" / "model", "committed": COMMITTED.with_name("vlm")}
    results = {name: evaluate(folder, NUM_QUESTIONS) for name, folder in folders.items()}
    body = [
        "`recipes/shapes/vision.yaml`, then `vlm.yaml`, on one core: "
        f"{', '.join(f'{stage} {s / 60:.1f} min' for stage, s in seconds.items())}.",
        "",
        f"{NUM_QUESTIONS} held-out questions, greedy answers that must be exactly right; 95 % intervals.",
    ]
    for name, table in results.items():
        body += ["", f"## {name.capitalize()}", "", as_table(table)]
    overall = {name: table[0].mean for name, table in results.items()}
    held = min(overall.values()) >= FLOOR
    body += ["", f"Both answer at least {FLOOR} of them: **{'yes' if held else 'no'}**."]
    data = {name: [asdict(item) for item in table] for name, table in results.items()}
    conclude("vlm", "The shapes VLM", body, {"seconds": seconds, "accuracy": data}, holds=held)


if __name__ == "__main__":
    main()
