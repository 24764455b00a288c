"""The best checkpoints by a held-out score (`checkpoint.keep_best`). They follow from the folder alone, so that a
resumed run knows them too."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from rl.loop.checkpoint import checkpoints
from rl.recipe.schema import KeepBestConfig, RunConfig
from rl.record.evaluation import EVALUATIONS, read_scores
from rl.record.summary import BestCheckpoint


def best_checkpoints(run_dir: Path, config: RunConfig) -> list[BestCheckpoint]:
    """Those that `checkpoint.keep_best` asks for, the best first, of equal ones the earlier; stage borders count."""
    wanted, found = config.checkpoint.keep_best, []
    if wanted is None:
        return []
    for path, step in checkpoints(run_dir).items():
        border = re.fullmatch(r"stage_(\d+)_end", path.name)
        moment = f"after_{config.stages[int(border[1])].name}" if border else f"step_{step:06d}"
        score = _score(run_dir / EVALUATIONS / moment, wanted)
        if score is not None:
            found.append(BestCheckpoint(str(path), step, wanted.task, wanted.reward, score))
    return sorted(found, key=lambda best: best.score, reverse=True)[: wanted.count]


def _score(folder: Path, wanted: KeepBestConfig) -> float | None:
    """The mean over the prompts that were scored; None without one."""
    scores = read_scores(folder / f"{wanted.task}.json")
    if scores is None:
        return None
    column = scores.rewards if wanted.reward is None else scores.components.get(wanted.reward, [])
    scored = [value for value in column if value is not None]
    return float(np.mean(scored)) if scored else None
