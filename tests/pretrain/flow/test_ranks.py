"""Two ranks as Ray actors: gradients, averages and resume of the same global batches."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from core.cluster.ranks import LocalRank, start_ranks
from pretrain.flow.rank import FlowRank
from tests.pretrain.flow.flow_runs import flow_recipe


class RecordingRank(FlowRank):
    """Keeps the reduced gradients that the optimizer is about to use, of every step."""

    def restart(self, zero_stage):
        """The same actor and process group serve another ZeRO stage, from step 0."""
        self.settings = replace(self.settings, zero_stage=zero_stage)
        self.step, self.batches = 0, None
        self.setup("", 0)
        self.record()

    def record(self):
        from deepspeed.utils import safe_get_full_grad

        self.gradients = []
        take_step = self.engine._take_model_step

        def recording(*args, **kwargs):
            named = self.model.named_parameters()
            self.gradients.append({n: safe_get_full_grad(p).clone() for n, p in named if p.requires_grad})
            return take_step(*args, **kwargs)

        self.engine._take_model_step = recording

    def recorded(self):
        return self.gradients

    def averaged(self):
        return self.average.whole(self.model, keep=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory, tiny_model, tiny_vlm):
    """One rank, ZeRO-1: figures, gradients and average of 4 steps."""
    recipe = flow_recipe(tmp_path_factory.mktemp("one"), tiny_model, "deepspeed.zero_stage=1", vlm=tiny_vlm)
    rank = LocalRank(partial(RecordingRank, recipe)).rank
    rank.record()
    return rank.advance(4), rank.recorded(), rank.averaged()


@pytest.fixture(scope="module")
def two(tmp_path_factory, tiny_model, tiny_vlm, ray_session):
    recipe = flow_recipe(tmp_path_factory.mktemp("two"), tiny_model, "resources.ranks=2", vlm=tiny_vlm)
    ranks = start_ranks(partial(RecordingRank, recipe), 2, recipe.resources)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_learn_what_one_learns_and_resume_exactly(tmp_path, one, two, stage):
    figures, gradients, average = one
    two.call("restart", stage)
    halves = two.call("advance", 2)
    two.call("save", str(tmp_path))
    halves = [first + second for first, second in zip(halves, two.call("advance", 4), strict=True)]
    recorded, averaged = two.call("recorded")[0], two.call("averaged")[0]
    two.call("load", str(tmp_path), 2)
    assert two.call("advance", 4) == [half[2:] for half in halves]
    again = two.call("averaged")
    assert all(torch.equal(again[rank][n], averaged[n]) for rank in (0, 1) for n in averaged)
    for step, whole in enumerate(figures):
        parts = [half[step] for half in halves]
        assert whole.losses == pytest.approx(parts[0].losses + parts[1].losses, rel=1e-4)
        assert whole.sigmas == parts[0].sigmas + parts[1].sigmas and {p.task for p in parts} == {whole.task}
        assert parts[0].gradient_norm == pytest.approx(whole.gradient_norm, rel=1e-4)
    first, total = gradients[0], figures[0].gradient_norm
    assert recorded[0].keys() == first.keys() and len(first) > 100
    for name, gradient in first.items():
        # A key's bias has no gradient but for rounding, and the last block reads no text query: hence the floor.
        gap = float((recorded[0][name] - gradient).norm()) / max(float(gradient.norm()), 1e-6 * total)
        assert gap < 1e-5, f"{name}: {gap}"
    for name, tensor in average.items():
        torch.testing.assert_close(averaged[name], tensor, rtol=1e-3, atol=1e-5)
