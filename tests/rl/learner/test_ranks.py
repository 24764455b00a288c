"""Ranks and ZeRO stages must not change what is learned: loss and every gradient of the same global batch."""

from dataclasses import replace

import pytest
import ray
import torch

from rl.learner.batching import make_train_batch
from rl.learner.learner import LearnerSpec
from rl.learner.worker import LearnerGroup, LearnerRank
from rollout.engine import RolloutEngine
from rollout.shapes import Shape
from tests.fakes.tiny_models import make_tiny_folder
from tests.rl.learner.learner_fixtures import (
    conditioning,
    learner_config,
    replica_spec,
    sample_group,
    sample_refs,
    sampling_spec,
)

SHAPES = [Shape((32, 32)), Shape((16, 64), ((16, 64),)), Shape((64, 24))]
CASES = {"zero1": (1, 1), "zero1_2ranks": (1, 2), "zero2_2ranks": (2, 2), "zero3_2ranks": (3, 2)}


class RecordingRank(LearnerRank):
    """Keeps the reduced gradients that the optimizer is about to use."""

    def record(self):
        from deepspeed.utils import safe_get_full_grad

        self.gradients = {}
        engine = self._learner().engine
        take_step = engine._take_model_step

        def recording(*args, **kwargs):
            for name, parameter in self._learner().transformer.named_parameters():
                if parameter.requires_grad:
                    self.gradients[name] = safe_get_full_grad(parameter).clone()
            return take_step(*args, **kwargs)

        engine._take_model_step = recording

    def recorded(self):
        return self.gradients


@pytest.fixture(scope="module")
def results(tmp_path_factory, ray_session):
    """Loss statistics, gradients and the adapter after one update, for each case, on 3 + 4 = 7 samples; before it, at
    rate 0, those of 3 + 4 + 1 samples of three shapes."""
    folder = make_tiny_folder(tmp_path_factory.mktemp("model"))
    engine = RolloutEngine(replica_spec(folder))
    groups = [(g, *sample_group(engine, sampling_spec(3.0), g, size, conditioning("negative")))
              for g, size in ((0, 3), (1, 4))]  # fmt: skip
    mixed = [(g, *sample_group(engine, sampling_spec(3.0), g, size, conditioning("negative"), g % 2, shape))
             for g, (size, shape) in enumerate(zip((3, 4, 1), SHAPES, strict=True))]  # fmt: skip

    def stored(refs):
        return [
            replace(r, trajectory=ray.put(r.trajectory), conditioning=ray.put(r.conditioning)) for r in refs
        ]

    refs, mixed_refs = stored(sample_refs(groups, 4)), stored(sample_refs(mixed, 4, SHAPES))
    found = {}
    for name, (stage, ranks) in CASES.items():
        config = learner_config(zero_stage=stage, ranks=ranks)
        spec = LearnerSpec(replica_spec(folder), config, sampling_spec(3.0), 0, False, False, 120.0, 120.0)
        actor = ray.remote(RecordingRank).options(num_cpus=0.1)
        actors = [actor.remote(spec, rank, ranks) for rank in range(ranks)]
        group = LearnerGroup(actors, call_timeout_s=240, start_timeout_s=240)
        group.set_negative(conditioning("negative"))
        ray.get([a.record.remote() for a in actors], timeout=240)
        for key, those, rate in ((f"{name} mixed", mixed_refs, 0.0), (name, refs, 1e-3)):
            group.fetch(make_train_batch(those, 1, ranks, 2))
            stats, _ = group.update(rate)
            gradients = ray.get([a.recorded.remote() for a in actors], timeout=240)[0]
            found[key] = (stats[0], gradients, group.adapter(1, shipped=False))
        for a in actors:
            ray.kill(a)
    return found


@pytest.mark.parametrize("shapes", ["", " mixed"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "zero1"])
def test_loss_and_gradients_do_not_depend_on_ranks_or_zero_stage(results, case, shapes):
    stats, gradients, _ = results["zero1" + shapes]
    other_stats, other, _ = results[case + shapes]
    assert other_stats.loss == pytest.approx(stats.loss, rel=1e-5)
    assert other_stats.grad_norm == pytest.approx(stats.grad_norm, rel=1e-5)
    assert gradients.keys() == other.keys() and any(g.any() for g in gradients.values())
    scale = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-5, atol=1e-5 * scale)


def test_the_whole_adapter_is_exported_from_every_zero_stage(results):
    _, _, reference = results["zero1"]
    for _, _, adapter in results.values():
        assert adapter.tensors.keys() == reference.tensors.keys()
        assert all(adapter.tensors[n].shape == t.shape for n, t in reference.tensors.items())
