"""The commands of the MetaQuery proof: training runs of `pretrain.flow`, PDTR on their result, a run that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from bench.accept.commands import one_thread, rl_line, train_once
from bench.accept.evidence import ROOT, Clock

RUNS = ROOT / "runs" / "accept_metaquery"
VLM = ROOT / "recipes" / "shapes" / "vlm"
ALIGN, UNIFIED, PDTR = "metaquery_align", "metaquery_unified", "pdtr_metaquery"
PDTR_RECIPE = f"recipes/shapes/{PDTR}.yaml"
PDTR_MODEL = f"model.path={RUNS / UNIFIED / 'model'}"
LIMIT_S = 90 * 60.0

BOTH, ONLY_VLM, ONLY_TRANSFORMER = "both", "reference-vlm", "reference-transformer"
FROZEN_CONNECTOR, FROZEN_TRANSFORMER, EDIT_ONLY = "connector-frozen", "transformer-frozen", "edit-only"
VARIANTS: dict[str, tuple[str, ...]] = {
    BOTH: (),
    ONLY_VLM: ("references.transformer=false",),
    ONLY_TRANSFORMER: ("references.vlm=false",),
    FROZEN_CONNECTOR: ("train.queries=false", "train.connector=false"),
    FROZEN_TRANSFORMER: ("train.transformer=false",),
    EDIT_ONLY: ("data.edit_share=1",),
}
"""`metaquery_unified.yaml` with overrides: all start from the same aligned connector, and differ in this alone."""
VARIANT = ("steps=1000", "stop_step=0", "save_every=500", "samples.every=0")

SHORT = (
    "stages[0].steps=3", "stages[1].steps=3", "checkpoint.every=2", "gallery.prompts=0",
    "evaluation.tasks[0].num_prompts=64", "evaluation.tasks[1].num_prompts=64", "evaluation.baseline_guidance=[]",
)  # fmt: skip


def flow(clock: Clock, recipe: str, name: str, *changes: str) -> Path:
    """Train a recipe of `recipes/shapes/`, or what is left of it; returns the run's folder."""
    folder = RUNS / name
    if not (folder / "model").is_dir():
        line = [sys.executable, "-m", "pretrain.flow", f"recipes/shapes/{recipe}.yaml"]
        line += [f"output_dir={RUNS}", f"name={name}", *changes, "--resume", "auto"]
        with clock.part(name):
            subprocess.run(line, cwd=ROOT, env=one_thread(), check=True, timeout=2 * LIMIT_S)
    return folder


def train_all(clock: Clock) -> None:
    """align, unified, and unified's shorter variants."""
    aligned = flow(clock, ALIGN, ALIGN) / "model"
    start = f"model.conditioner={aligned}"
    flow(clock, UNIFIED, UNIFIED, start)
    for name, changes in VARIANTS.items():
        flow(clock, UNIFIED, name, start, *VARIANT, *changes)


def pdtr(clock: Clock) -> Path:
    """Both stages of PDTR on the unified model, as the recipe says; returns the run's folder."""
    with clock.part(PDTR):
        return train_once(PDTR_RECIPE, RUNS / PDTR, PDTR_MODEL, timeout_s=2 * LIMIT_S)


def pdtr_killed(clock: Clock) -> tuple[Path, Path]:
    """Two short runs of the same recipe: one straight, one killed after three steps and continued."""
    straight, killed = RUNS / "pdtr_straight", RUNS / "pdtr_killed"
    with clock.part("resume"):
        for folder in (straight, killed):
            if folder is killed and not (folder / "metrics.jsonl").is_file():
                line = rl_line(PDTR_RECIPE, folder, PDTR_MODEL, *SHORT)
                kill_after(line, folder / "metrics.jsonl", steps=3)
            train_once(PDTR_RECIPE, folder, PDTR_MODEL, *SHORT, timeout_s=LIMIT_S)
    return straight, killed


def kill_after(line: list[str], metrics: Path, steps: int) -> None:
    """Start a run and kill it without warning once it has logged some training steps."""
    deadline = time.monotonic() + LIMIT_S
    with subprocess.Popen(line, cwd=ROOT, env=one_thread()) as running:
        try:
            while len(training_records(metrics)) < steps:
                if running.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{' '.join(line)} ended or stood still before step {steps} (exit code {running.poll()})"
                    )
                time.sleep(0.2)
        finally:
            running.send_signal(signal.SIGKILL)


def training_records(metrics: Path) -> list[dict[str, float]]:
    """The records of a PDTR run's training steps, a last line that is half written apart."""
    if not metrics.is_file():
        return []
    text = metrics.read_text()
    records = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [record for record in records if "loss/total" in record]
