"""The best checkpoints by a held-out score stay beside the last ones, also in a run that was continued."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from core.files import atomic_write_json
from rl.loop.best import best_checkpoints
from rl.loop.checkpoint import find_checkpoint, read_state, set_later_aside
from rl.loop.observer import Observer
from rl.recipe.schema import CheckpointConfig, KeepBestConfig, RunConfig, StageConfig
from rl.record.state import RunState, StageProgress
from rl.record.summary import BestCheckpoint


def recipe(**best) -> RunConfig:
    config = RunConfig(name="x", stages=[StageConfig("edit", "edit", "e.jsonl", 9)])
    config.checkpoint = CheckpointConfig(every=1, keep_last=1, keep_best=KeepBestConfig("edit", **best))
    return config


class Run:
    """The observer of a process that may be another one at every call; its learner's weights are one file."""

    def __init__(self, folder, config):
        self.folder, self.config = folder, config

    def save(self, *scores, first=1):
        """Evaluate and save steps from `first` on; a score of None is a step without evaluation."""
        learner = SimpleNamespace(
            save=lambda folder: (folder / "engine.pt").write_text("w"), adapter=lambda version, shipped: None
        )
        for step, score in enumerate(scores, first):
            made = Observer.__new__(Observer)
            made.config, made.run_dir, made.learner = self.config, self.folder, learner
            made.state = RunState(step=step, stages=[StageProgress("edit", steps=step)])
            made.journal = SimpleNamespace(config_yaml="", timed=lambda *args: nullcontext())
            made.results = SimpleNamespace(write_adapter=lambda adapter, folder: folder.mkdir())
            if score is not None:
                self.evaluate(f"step_{step:06d}", step, score)
            made._save()

    def evaluate(self, moment, step, score, component=None):
        document = {
            "moment": moment, "task": "edit", "adapter_sha256": "", "guidance_scale": 1.0, "step": step,
            "rewards": [score, None], "components": {} if component is None else {"fit": [component, 0.0]},
        }  # fmt: skip
        (self.folder / "evaluations" / moment).mkdir(parents=True, exist_ok=True)
        atomic_write_json(self.folder / "evaluations" / moment / "edit.json", document)

    def kept(self):
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("scores", "count", "kept"),
    [
        ((0.2, 0.9, 0.4, 0.3), 1, [2, 4]),
        ((0.2, 0.9, 0.4, 0.3), 2, [2, 3, 4]),
        ((0.2, 0.3, 0.4, 0.9), 1, [4]),  # the last is the best
        ((0.5, 0.5, 0.5, 0.1), 1, [1, 4]),  # of equal ones the earlier
        ((None, 0.2, None, None), 1, [2, 4]),  # without an evaluation there is no score
    ],
)
def test_the_best_stay_beside_the_last(tmp_path, scores, count, kept):
    run = Run(tmp_path, recipe(count=count))
    run.save(*scores)
    assert run.kept() == [f"step_{step:06d}" for step in kept]
    assert find_checkpoint(tmp_path, "auto").name == "step_000004"


def test_a_continued_run_goes_on_with_them_and_one_that_goes_back_sets_them_aside(tmp_path):
    run = Run(tmp_path, recipe())
    run.save(0.6, 0.9, 0.4)
    Run(tmp_path, recipe()).save(0.3, first=4)
    assert run.kept() == ["step_000002", "step_000004"]
    back = find_checkpoint(tmp_path, str(tmp_path / "checkpoints" / "step_000002"))
    set_later_aside(tmp_path, read_state(back).step)
    run.save(0.95, 0.1, first=3)
    assert run.kept() == ["step_000003", "step_000004"]
    assert [best.step for best in best_checkpoints(tmp_path, run.config)] == [3]


def test_stage_borders_count_and_a_reward_may_decide(tmp_path):
    run = Run(tmp_path, recipe(reward="fit", count=3))
    run.save(None, None, None, None, None, None, None, None, None)
    for moment, step, score in (("after_edit", 9, 0.25), ("step_000009", 9, 0.5)):
        run.evaluate(moment, step, score, component=2 * score)
    assert run.kept() == ["stage_0_end", "step_000008"]
    (best,) = best_checkpoints(tmp_path, run.config)
    border = tmp_path / "checkpoints" / "stage_0_end"
    assert best == BestCheckpoint(str(border), 9, "edit", "fit", 0.25)  # of [.5, 0]: what is missing is no 0
    assert str(best).endswith(f"generate --adapter {border}/adapter")
    assert best_checkpoints(tmp_path, RunConfig()) == []
