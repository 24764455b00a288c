"""Where a run stands: everything a resumed run needs beside the learner's own state."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from core.inputs import Inputs


@dataclass
class StageProgress:
    """What a stage has come to so far. `updates` took effect; `fates`: of its groups (`rl/loop/step.py`); `rewards`: by
    part of the stage, what its `RewardMonitor` has seen."""

    name: str
    steps: int = 0
    seconds: float = 0.0
    reward_mean: float | None = None
    samples: int = 0
    missing: int = 0
    updates: int = 0
    fates: dict[str, int] = field(default_factory=dict)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class RunState:
    """Stage `stage` (index) has `stages[stage].steps` finished steps; `step` counts over all stages.

    All sampling is a pure function of seed, stage and step, so no random-number state is kept. `unseen`: evaluation and
    pictures of the last step are still to be made, since the run was stopped before. `inputs`: what the run reads
    beside its recipe; `changes`: a line for each of them that was another at a resume.
    """

    stage: int = 0
    step: int = 0
    version: int = 0
    images: int = 0
    seconds: float = 0.0
    restarts: int = 0
    failed_prompts: int = 0
    stages: list[StageProgress] = field(default_factory=list)
    unseen: bool = False
    skipped_updates: int = 0
    learner_restarts: int = 0
    inputs: Inputs = field(default_factory=Inputs)
    changes: list[str] = field(default_factory=list)
