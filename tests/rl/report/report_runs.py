"""Run folders for the report's tests, written by the journal itself with numbers that the tests know."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from core.files import atomic_write_json
from core.spans import Span
from core.statistics import paired_bootstrap
from rl.recipe.schema import EvaluationTaskConfig, RewardConfig, RunConfig, StageConfig
from rl.record.evaluation import TaskScores
from rl.record.gallery import GallerySample
from rl.record.groups import GroupRecord
from rl.record.journal import Journal
from rl.record.state import RunState, StageProgress
from rl.record.summary import RunSummary

PROMPTS = 12
HOSTILE = (
    "</script><script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'> & \u2028 \"quotes\" 'and' {{data}} <!-- \\u003c",
)
"""Prompts that must stay text."""


def config(name: str, **changes) -> RunConfig:
    """Stages `edit` and `t2i` of 3 steps; each task evaluated with a second opinion of weight 0."""
    rewards = [RewardConfig(name="own.py:redness")]
    result = RunConfig(name=name, **changes)
    result.model.path = "models/tiny"
    result.stages = [StageConfig(task, task, f"{task}.jsonl", 3, rewards) for task in ("edit", "t2i")]
    opinion = RewardConfig(name="own.py:other", weight=0.0)
    result.evaluation.tasks = [
        EvaluationTaskConfig(task, f"{task}.jsonl", PROMPTS, [*rewards, opinion]) for task in ("edit", "t2i")
    ]
    return result


def write_run(
    folder: Path, *, name: str = "made", shift: float = 0.0, finish: bool = True, **changes
) -> Path:
    """A run of 2 x 3 steps below `folder`. `shift` raises the scores after training; step 2 has no reward, and
    step 5 made no update, so that both are gaps in their curves.
    """
    out = folder / name
    journal = Journal(out, config(name, **changes), resume_step=None)
    state = RunState()
    scores = {"before": evaluate(journal, state, "before", None, 0.0)}
    for stage in ("edit", "t2i"):
        state.stages.append(StageProgress(stage))
        for _ in range(3):
            state.step += 1
            state.stages[-1].steps += 1
            journal.spans(spans(state.step))
            journal.groups(groups(state.step, stage))
            journal.log(metrics(state.step), state.step, stage, state.stages[-1].steps)
            journal.grid(stage, stage, samples(state.step, stage), state.step)
        for record in groups(state.step, stage)[:2]:
            journal.group_pictures(record, samples(state.step, stage))
        moment = f"after_{stage}"
        scores[moment] = evaluate(journal, state, moment, scores["before"], shift)
    if finish:
        journal.finish(RunSummary(name=name, stages=(), images=96, seconds=75.0, version="0.1.0"))
    journal.metrics.close()
    return out


def metrics(step: int) -> dict[str, float | None]:
    reward = None if step == 2 else 0.1 * step
    values = {
        "reward/mean": reward, "reward/redness/mean": reward, "reward/redness/component/warm": 0.5,
        "reward/zero_spread_share": 0.25, "time/step": 2.0, "time/rollout": 1.0, "time/update": 0.5,
        "optimizer/updates": 0 if step == 5 else 2,
    }  # fmt: skip
    if step == 5:
        return values
    return values | {
        "policy/ratio_mean": 1.0 + 1e-4 * step, "policy/ratio_min": 0.99, "policy/ratio_max": 1.01,
        "policy/clip_fraction_low": 0.1, "policy/clip_fraction_high": 0.2, "policy/kl": 1e-6 * step,
        "gate/log_prob_gap_mean": 0.0, "gate/log_prob_gap/0": 0.0, "gate/log_prob_gap/10": 0.0,
    }  # fmt: skip


def evaluate(journal, state, moment, before, shift):
    """Scores of both tasks as the evaluator leaves them, with their record in metrics.jsonl."""
    scores = {}
    for task in ("edit", "t2i"):
        rewards = [round(i / PROMPTS + (shift if before else 0.0), 6) for i in range(PROMPTS)]
        rewards[3] = None
        other = [0.5] * PROMPTS
        scores[task] = TaskScores(
            moment, task, "0" * 64, 1.0, state.step, rewards, {"redness": rewards, "other": other}
        )
        atomic_write_json(journal.run_dir / "evaluations" / moment / f"{task}.json", asdict(scores[task]))
        journal.grid(
            task, state.stages[-1].name if state.stages else "before", samples(state.step, task), state.step
        )
    journal.evaluation(
        moment,
        scores,
        lambda task, now: paired_bootstrap(before[task].rewards, now.rewards) if before else None,
        state,
        1.0,
    )
    return scores


def picture(step: int, index: int) -> np.ndarray:
    """8 x 8 pixels of one colour that tells step and sample."""
    return np.full((8, 8, 3), (20 * step, 40 * index, 100), np.uint8)


def samples(step: int, task: str) -> list[GallerySample]:
    """Two fixed prompts, the second not scored at step 1."""
    return [
        GallerySample(
            HOSTILE[i],
            7 + 2**60 + i,
            picture(step, i),
            None if (step, i) == (1, 1) else 0.1 * step + i,
            picture(0, i + 3) if task == "edit" else None,
        )
        for i in range(2)
    ]


def groups(step: int, stage: str) -> list[GroupRecord]:
    """Three groups: good, bad and partly scored, and one without spread."""
    rewards: list[list[float | None]] = [[0.9, 1.0], [0.0, None], [0.5, 0.5]]
    return [
        GroupRecord(
            step, stage, 10 * step + i, HOSTILE[i % 2], r, {"redness": r, "redness/warm": [0.25, None]}
        )
        for i, r in enumerate(rewards)
    ]


def spans(step: int) -> list[Span]:
    """Ten seconds a step, with a pause of 990 s after the third."""
    start = 10.0 * step + (990.0 if step > 3 else 0.0)
    return [
        Span("rollout", "host:7", start, start + 4, step),
        Span("rollout", "host:12", start, start + 2, step),
        Span("reward", "reward", start + 2, start + 3, step),
        Span("reward", "reward", start + 2, start + 4, step),
        Span("update", "learner-0", start + 4, start + 9, step),
        Span("publish", "controller", start + 9, start + 10, step),
    ]
