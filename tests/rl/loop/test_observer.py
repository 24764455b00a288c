"""What an evaluation costs is counted when it is made."""

from contextlib import nullcontext
from types import SimpleNamespace

from rl.loop.observer import Observer
from rl.recipe.schema import RunConfig
from rl.record.evaluation import TaskScores
from rl.record.results import RunResults
from rl.record.state import RunState


def test_the_pictures_of_the_untrained_model_are_counted_with_their_own_evaluation(tmp_path):
    config = RunConfig(name="x")
    config.evaluation.baseline_guidance, config.learner.ema.enabled = [2.0, 4.0], False
    observer, scored = Observer.__new__(Observer), []

    def evaluate(moment, policy, step, **options):
        scored.extend([moment] * 5)
        return {"edit": TaskScores(moment, "edit", "sha", 1.0, step, [0.5], {})}

    def take_images():
        taken = len(scored)
        scored.clear()
        return taken

    observer.config, observer.run_dir, observer.state, observer.resumed = config, tmp_path, RunState(), None
    observer.evaluator = SimpleNamespace(evaluate=evaluate, gallery={}, set_others_aside=lambda: None)
    observer.rollout = SimpleNamespace(take_images=take_images, spans=["a span"])
    observer.results = RunResults(config, observer.evaluator, tmp_path)
    observer.journal = SimpleNamespace(
        timed=lambda *args: nullcontext(), evaluation=lambda *args: None, grid=lambda *args: None,
        spans=lambda spans: spans.clear(),
    )  # fmt: skip
    observer.begin_run(None)
    assert list(observer.results.moments) == ["before", "before_guidance_2", "before_guidance_4"]
    assert observer.state.images == 15 and observer.rollout.spans == []
