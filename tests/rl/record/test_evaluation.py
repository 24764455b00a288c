"""An evaluation loses the prompts that fail, and no others."""

import json
from types import SimpleNamespace

import numpy as np

from rl.recipe.schema import EvaluationConfig, EvaluationTaskConfig
from rl.record.evaluation import Evaluator
from rl.record.gallery import GallerySample
from rl.workers.requests import RolloutResult
from rollout.shapes import ShapeRule
from rollout.worker import Policy


class OneBadPrompt:
    """Draws and scores a prompt by its text; a batch with `bad` in it fails."""

    def __init__(self):
        self.seeds = {}

    def sample(self, requests, spec, policy, *, step, label):
        for request in requests:
            texts = [prompt.prompt for prompt in request.prompts]
            if "bad" in texts:
                yield RolloutResult(request, (), failure="cannot be drawn")
                continue
            self.seeds |= dict(zip(texts, request.seeds, strict=True))
            values = [float(text) for text in texts]
            score = SimpleNamespace(rewards=values, components={"r": values})
            yield RolloutResult(request, (), score=score)

    def score(self, requests, sample, reward_set, *, step, label):
        yield from sample(requests)


def evaluator_of(tmp_path, texts, **identity):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    task = EvaluationTaskConfig(task="t2i", prompts=str(tmp_path / "p.jsonl"), num_prompts=len(texts))
    config = EvaluationConfig(tasks=[task], batch_size=4)
    return Evaluator(config, OneBadPrompt(), tmp_path / "run", ShapeRule(tmp_path, (32, 32)), 0, **identity)


def scores(tmp_path, texts):
    evaluator = evaluator_of(tmp_path, texts)
    return evaluator.evaluate("before", Policy(1, "a", ()), 0)["t2i"], evaluator.collector.seeds


def test_a_prompt_that_cannot_be_drawn_takes_no_other_of_its_batch_along(tmp_path, caplog):
    found, seeds = scores(tmp_path, ["0", "bad", "2", "3", "4", "5"])
    assert found.rewards == [0.0, None, 2.0, 3.0, 4.0, 5.0]
    assert found.components == {"r": found.rewards}
    assert f"{tmp_path}/p.jsonl:2 is not scored: cannot be drawn" in caplog.text
    _, before = scores(tmp_path / "whole", ["0", "1", "2", "3", "4", "5"])
    assert seeds.items() <= before.items()


def test_prompts_of_several_sizes_keep_their_places(tmp_path):
    evaluator = evaluator_of(tmp_path, [str(n) for n in range(12)])
    evaluator.shapes = ShapeRule(tmp_path, (32, 32), ((16, 32), (32, 16)), (1.0, 1.0))
    requests = []
    sample = evaluator.collector.sample

    def watched(found, *args, **options):
        requests.extend(found)
        yield from sample(found, *args, **options)

    evaluator.collector.sample = watched
    found = evaluator.evaluate("before", Policy(1, "a", ()), 0)["t2i"]
    assert found.rewards == [float(n) for n in range(12)] and found.components == {"r": found.rewards}
    assert [r.places for r in requests] != [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert len({r.size for r in requests}) == 2
    again = evaluator.shapes.of(evaluator.prompts["t2i"][5], evaluator._seed(evaluator.prompts["t2i"][5]))
    assert [r.shape for r in requests if 5 in r.places] == [again]


def test_a_gallery_of_several_sizes_is_read_back(tmp_path):
    policy, shapes = Policy(1, "a", ()), [(4, 8, 3), (8, 4, 3)]
    made = [GallerySample(str(n), n, np.full(shape, n, np.uint8), 0.5) for n, shape in enumerate(shapes)]
    first = evaluator_of(tmp_path, ["0", "1"])
    first._sample = lambda *_: ([0.5, 0.5], {}, made)
    first.evaluate("before", policy, 0)
    again = evaluator_of(tmp_path, ["0", "1"])
    again.evaluate("before", policy, 0)
    found = again.gallery["t2i"]["before"]
    assert [s.prompt for s in found] == ["0", "1"]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(made, found, strict=True))
    np.savez_compressed(
        tmp_path / "run" / "evaluations" / "before" / "t2i.npz", images=np.ones((2, 4, 4, 3), np.uint8)
    )
    again.read("before")  # of a run from when all had one size
    assert [s.image.shape for s in again.gallery["t2i"]["before"]] == [(4, 4, 3)] * 2


def test_scores_of_other_prompts_weights_or_rewards_are_set_aside_and_made_again(tmp_path, caplog):
    first = evaluator_of(tmp_path, ["1", "2"], inputs_sha256="then")
    kept = first.evaluate("before", Policy(1, "a", ()), 0)
    again = evaluator_of(tmp_path, ["1", "2"], inputs_sha256="then")
    again.set_others_aside()
    assert again.read("before") == kept
    now = evaluator_of(tmp_path, ["3", "4"], inputs_sha256="now")
    now.set_others_aside()
    assert "before is of other held-out prompts, weights or rewards" in caplog.text
    assert (tmp_path / "run" / "abandoned" / "1" / "evaluations" / "before" / "t2i.json").is_file()
    assert now.read("before") == {} and "nothing is compared with it" in caplog.text
    assert now.evaluate("before", Policy(1, "a", ()), 0)["t2i"].rewards == [3.0, 4.0]
