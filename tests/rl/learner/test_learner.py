"""The learner in one process: gradients against autograd, the gate, the KL reference, the clip, the stages."""

import math
from dataclasses import replace

import pytest
import torch

from core.failures import ClusterError
from models.components import load_transformer
from models.lora.attach import adapter_parameters, adapter_state, attach_lora, hash_state, load_adapter_state
from models.lora.files import save_adapter
from rl.learner.batching import make_train_batch
from rl.learner.gate import LogProbMismatch
from rl.learner.learner import Learner, LearnerSpec
from rl.recipe.schema import EmaConfig
from rollout.engine import RolloutEngine
from rollout.flow_sde import flow_sde_step
from rollout.sampler import SamplingSpec
from rollout.shapes import Shape
from tests.fakes.tiny_models import make_tiny_folder
from tests.rl.learner.learner_fixtures import (
    conditioning,
    learner_config,
    make_learner,
    publish,
    randomise,
    replica_spec,
    resolve,
    rollout,
    sample_group,
    sample_refs,
    sampling_spec,
    updates,
)

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("old_log_prob", ["rollout", "replay"])
def test_replay_agrees_with_the_rollout_and_a_stale_replica_trips_the_gate(folder, guidance, old_log_prob):
    learner = make_learner(folder, guidance=guidance, old_log_prob=old_log_prob)
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    first = learner.update(updates(rollout(engine, guidance=guidance)))
    assert first[0].gaps.largest <= 1e-6
    fresh = rollout(engine, guidance=guidance, first=2)  # the update was not published: a stale replica
    with pytest.raises(LogProbMismatch, match="did not sample with the learner's adapter"):
        learner.update(updates(fresh))
    publish(learner, engine, version=2)
    again = learner.update(updates(rollout(engine, guidance=guidance, first=4)))
    assert again[0].gaps.largest <= 1e-6


def test_a_batch_with_two_references_passes_the_gate_in_their_order_alone(folder):
    learner, engine = make_learner(folder, guidance=3.0), RolloutEngine(replica_spec(folder))
    randomise(learner, scale=0.2)
    publish(learner, engine)
    ((samples, count),) = updates(rollout(engine, guidance=3.0, references=2))
    swapped = [
        replace(s, conditioning=replace(c, reference_latents=c.reference_latents[::-1]))
        for s in samples
        for c in [s.conditioning]
    ]
    with pytest.raises(LogProbMismatch):
        learner.update([(swapped, count)])
    assert learner.update([(samples, count)])[0].gaps.largest <= 1e-6


@pytest.mark.parametrize(("old_log_prob", "branch"), [("rollout", False), ("replay", True)])
def test_groups_of_several_shapes_teach_what_each_teaches_alone(folder, old_log_prob, branch):
    """In one update: the gate is 0, and the gradient is the mean over all samples."""
    shapes = [Shape((32, 32)), Shape((16, 64), ((16, 64),)), Shape((16, 64), ((16, 64),)), Shape((64, 24))]
    learner, engine = make_learner(folder, old_log_prob=old_log_prob), RolloutEngine(replica_spec(folder))
    learner.sampling = spec = replace(sampling_spec(), branch=branch)
    randomise(learner)
    publish(learner, engine)
    sizes = [3, 2, 2, 1]
    groups = [
        (g, *sample_group(engine, spec, g, sizes[g], None, len(shape.references), shape))
        for g, shape in enumerate(shapes)
    ]

    def gradient(chosen):
        refs = sample_refs([groups[g] for g in chosen], 4, [shapes[g] for g in chosen])
        (shares,) = make_train_batch(refs, 1, 1, 2).updates
        samples, count = resolve(shares[0])
        (old,) = learner._old_log_probs([(samples, count)])
        gate = learner._gate()
        learner.accumulate(samples, count, old, gate)
        assert gate.check().largest <= 1e-6
        found = {}
        for name, parameter in adapter_parameters(learner.transformer, "policy").items():
            found[name], parameter.grad = parameter.grad.clone(), None
        return found, count

    together, count = gradient([0, 1, 2, 3])
    assert count == 8
    parts = [gradient(chosen) for chosen in ([0], [1, 2], [3])]
    scale = max(float(g.abs().max()) for g in together.values())
    for name, value in together.items():
        expected = sum(own[name] * n / count for own, n in parts)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("cfg_gradient", ["conditional", "both"])
def test_gradient_equals_autograd_of_a_plain_reference(folder, cfg_gradient):
    guidance, beta, clip = 3.0, 0.04, 1e-3
    learner = make_learner(
        folder, guidance=guidance, cfg_gradient=cfg_gradient, kl_beta=beta, clip_range=clip
    )
    randomise(learner)
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    (samples, count), *_ = updates(rollout(engine, guidance=guidance))
    randomise(learner, scale=0.06)  # the policy has moved since the rollout: ratios differ from 1
    old = torch.stack([s.log_probs[list(s.positions)] for s in samples])
    learner.accumulate(samples, count, old, None)
    found = {n: p.grad.clone() for n, p in adapter_parameters(learner.transformer, "policy").items()}

    plain = load_transformer(folder, dtype=torch.float32)
    attach_lora(plain, rank=4, alpha=8.0, targets=replica_spec(folder).lora_targets, adapter_name="policy")
    load_adapter_state(plain, learner.adapter(), "policy")
    base = load_transformer(folder, dtype=torch.float32)
    negative, total = conditioning("negative"), 0.0

    def velocity(model, x, sigma, text):
        return model(x, text.prompt_embeds[None], text.pooled_prompt_embeds[None], sigma[None] * 1000).sample

    for s in samples:
        for i in s.positions:
            x, prev, (sigma, after) = s.latents[i][None], s.latents[i + 1][None], s.sigmas[[i, i + 1]]
            means = []
            for model in (plain, base):
                u = velocity(model, x, sigma, negative)
                u = u.detach() if cfg_gradient == "conditional" else u
                v = u + guidance * (velocity(model, x, sigma, s.conditioning) - u)
                step = flow_sde_step(
                    v,
                    x,
                    float(sigma),
                    float(after),
                    sigma_clip=float(s.sigmas[1]),
                    noise_level=0.7,
                    prev_sample=prev,
                )
                means.append((step.mean, step.log_prob))
            ratio = torch.exp(means[0][1] - s.log_probs[i])
            surrogate = torch.maximum(-s.advantage * ratio, -s.advantage * ratio.clamp(1 - clip, 1 + clip))
            kl = ((means[0][0] - means[1][0].detach()) ** 2).mean() / (2 * step.diffusion**2)
            total = total + (surrogate + beta * kl).sum() / (count * len(s.positions))
    total.backward()
    reference = adapter_parameters(plain, "policy")
    scale = max(float(p.grad.abs().max()) for p in reference.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, reference[name].grad, rtol=1e-4, atol=1e-5 * scale)


def test_two_updates_per_rollout_make_the_clip_act(folder):
    learner = make_learner(folder, updates_per_rollout=2, learning_rate=5e-3, clip_range=1e-4)
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    first, second = learner.update(updates(rollout(engine), num_updates=2))
    assert first.clip_fraction_low == first.clip_fraction_high == 0.0
    assert first.ratio_min == pytest.approx(1.0, abs=1e-6) == first.ratio_max
    assert second.clip_fraction_low + second.clip_fraction_high > 0
    assert second.gaps is None and first.gaps is not None


def test_a_compiled_learner_replays_on_the_graph_that_it_trains_on(folder):
    """Graphs with and without gradient round differently, so old log-probabilities come from the one with it."""
    learner = make_learner(folder, updates_per_rollout=2, old_log_prob="replay")
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    batches = updates(rollout(engine), num_updates=2)
    eager, modes = learner._old_log_probs(batches)[1], []
    learner.replica = replace(learner.replica, compile=True)
    learner.transformer.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    first, second = learner._old_log_probs(batches)
    assert first is None and second is not None and not second.requires_grad
    assert modes and all(modes)
    assert torch.equal(second, eager)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_an_update_whose_gradient_is_not_finite_changes_nothing_and_is_told(folder, zero_stage):
    learner = make_learner(folder, zero_stage=zero_stage, ema=EmaConfig(enabled=True, every=1))
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    (samples, count), *_ = updates(rollout(engine))
    before, average = hash_state(learner.adapter()), hash_state(learner.shipped_adapter())
    (skipped,) = learner.update([([replace(samples[0], advantage=float("nan")), *samples[1:]], count)])
    assert skipped.skipped and not math.isfinite(skipped.grad_norm)
    assert (hash_state(learner.adapter()), hash_state(learner.shipped_adapter())) == (before, average)
    (applied,) = learner.update([(samples, count)])
    assert not applied.skipped and hash_state(learner.adapter()) != before


@pytest.mark.parametrize("kl_reference", ["stage_start", "base"])
def test_kl_is_measured_from_the_stage_start(folder, kl_reference):
    learner = make_learner(folder, kl_reference=kl_reference, learning_rate=5e-3)
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    first_stage = [learner.update(updates(rollout(engine)))[0].kl]
    publish(learner, engine, 2)
    first_stage.append(learner.update(updates(rollout(engine, first=2)))[0].kl)
    assert first_stage[0] == 0.0 and first_stage[1] > 0.0
    learner.begin_stage()
    publish(learner, engine, 3)
    second_stage = [learner.update(updates(rollout(engine, first=4)))[0].kl]
    publish(learner, engine, 4)
    second_stage.append(learner.update(updates(rollout(engine, first=6)))[0].kl)
    if kl_reference == "stage_start":
        assert second_stage[0] == 0.0
    else:
        assert second_stage[0] > 0.0
    assert second_stage[1] > 0.0


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_training_goes_on_from_an_adapter_which_is_its_kl_reference(folder, tmp_path, zero_stage):
    trained = make_learner(folder)
    engine = RolloutEngine(replica_spec(folder))
    publish(trained, engine)
    trained.update(updates(rollout(engine)))
    start, replica = trained.adapter(), replica_spec(folder)
    save_adapter(start, tmp_path, rank=4, alpha=8.0, targets=replica.lora_targets)
    held = {"model.adapter": hash_state(start)}
    learner = make_learner(folder, zero_stage=zero_stage, adapter=str(tmp_path), held=held)
    assert hash_state(learner.adapter()) == hash_state(start)
    publish(learner, engine, 2)
    (first,) = learner.update(updates(rollout(engine, first=2)))
    assert first.kl == 0.0 and hash_state(learner.adapter()) != hash_state(start)
    publish(learner, engine, 3)
    assert learner.update(updates(rollout(engine, first=4)))[0].kl > 0.0
    with pytest.raises(ClusterError, match="another adapter in .* than the driver"):
        make_learner(folder, adapter=str(tmp_path), held={"model.adapter": "0"})


def test_a_stage_restarts_the_optimizer_and_keeps_the_adapter(folder):
    trained = make_learner(folder)
    engine = RolloutEngine(replica_spec(folder))
    publish(trained, engine)
    trained.update(updates(rollout(engine)))
    kept = trained.adapter()
    trained.begin_stage()
    assert hash_state(trained.adapter()) == hash_state(kept)

    fresh = make_learner(folder)
    load_adapter_state(fresh.transformer, kept, "policy")
    fresh.engine.optimizer.refresh_fp32_params()
    fresh.begin_stage()
    publish(trained, engine, 2)
    groups = rollout(engine, first=2)
    trained.update(updates(groups))
    fresh.update(updates(groups))
    assert hash_state(trained.adapter()) == hash_state(fresh.adapter())


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_stage_continues_from_what_the_one_before_shipped(folder, zero_stage):
    """With a moving average: weights, KL reference and the optimizer's own copy are the average."""
    learner = make_learner(folder, zero_stage=zero_stage, learning_rate=5e-3, ema=EmaConfig(True, 0.5, 1))
    engine = RolloutEngine(replica_spec(folder))
    for version in (1, 2):
        publish(learner, engine, version)
        learner.update(updates(rollout(engine, first=2 * version)))
    shipped = learner.shipped_adapter()
    assert hash_state(shipped) != hash_state(learner.adapter())
    learner.begin_stage()
    for state in (learner.adapter(), learner.reference_state(), learner.shipped_adapter()):
        assert hash_state(state) == hash_state(shipped)
    publish(learner, engine, 3)
    (first,) = learner.update(updates(rollout(engine, first=8)))
    assert first.kl == 0.0 and first.gaps.largest <= 1e-6
    moved = max(float((t - shipped[n]).abs().max()) for n, t in learner.adapter().items())
    assert 0 < moved <= 5.1e-3, "one Adam step from the average, not from the weights before"


@pytest.mark.parametrize("window", [1, 2])
def test_branching_groups_share_a_row_where_they_branch_and_teach_the_same(folder, window):
    """Two groups of 4 in a micro-batch of 8: 2 rows at the first stochastic step instead of 8, policy and KL alike."""
    spec = SamplingSpec(4, 0.7, 3.0, window_size=window, window_last=3, branch=True)
    learner, engine = make_learner(folder, micro_batch_size=8), RolloutEngine(replica_spec(folder))
    randomise(learner, scale=0.2)
    learner.begin_stage()
    publish(learner, engine)
    groups = [(g, *sample_group(engine, spec, g, 4, conditioning("negative"))) for g in range(2)]
    assert all(torch.equal(t.latents[0, 0], t.latents[3, 0]) for _, t, _ in groups)
    randomise(learner, scale=0.21)
    (samples, count), *_ = updates(groups, micro=8)
    old = torch.stack([s.log_probs[list(s.positions)] for s in samples])
    rows, found = [], []
    hook = learner.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    for branch in (True, False):
        learner.sampling = replace(spec, branch=branch)
        learner.engine.zero_grad()
        statistics = learner.accumulate(samples, count, old, None).result(0.0, None)
        gradients = {n: p.grad.clone() for n, p in adapter_parameters(learner.transformer, "policy").items()}
        found.append((statistics, gradients))
    hook.remove()
    # A step is two halves of the guidance for the policy and two for the reference.
    assert rows == [2] * 4 + [8] * 4 * (window - 1) + [8] * 4 * window
    (shared, ours), (apart, theirs) = found
    assert shared.kl == pytest.approx(apart.kl, rel=1e-4) and apart.kl > 0
    assert shared.loss == pytest.approx(apart.loss, rel=1e-4, abs=1e-6)
    scale = max(float(g.abs().max()) for g in theirs.values())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_rate_of_an_update_is_the_one_set(folder, zero_stage):
    """Adam's first step of a stage moves an element by the rate where its gradient is well above epsilon."""
    learner = make_learner(folder, zero_stage=zero_stage, learning_rate=1e-3)
    engine = RolloutEngine(replica_spec(folder))
    for version, rate in ((1, 1e-3), (2, 2e-4)):
        before = learner.adapter()
        publish(learner, engine, version)
        learner.set_learning_rate(rate)
        learner.update(updates(rollout(engine, first=2 * version)))
        moved = max(float((t - before[n]).abs().max()) for n, t in learner.adapter().items())
        assert moved == pytest.approx(rate, rel=0.02)
        learner.begin_stage()


def test_padding_samples_change_nothing(folder):
    learner = make_learner(folder)
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    groups = rollout(engine, groups=1, size=3)
    gradients = []
    for micro in (1, 2):  # 3 samples: micro-batches of 2 need one of weight 0
        learner.config.micro_batch_size = micro
        learner.engine.zero_grad()
        (samples, count), *_ = updates(groups, micro=micro)
        assert len(samples) == (3 if micro == 1 else 4) and count == 3
        learner.accumulate(samples, count, None, None)
        gradients.append(
            {n: p.grad.clone() for n, p in adapter_parameters(learner.transformer, "policy").items()}
        )
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-9)


def test_the_base_is_never_touched(folder):
    learner = make_learner(folder)
    engine = RolloutEngine(replica_spec(folder))
    publish(learner, engine)
    before = {n: p.clone() for n, p in learner.transformer.named_parameters() if ".policy." not in n}
    moved = adapter_state(learner.transformer, "policy")
    learner.update(updates(rollout(engine)))
    assert all(torch.equal(p, before[n]) for n, p in learner.transformer.named_parameters() if n in before)
    assert hash_state(adapter_state(learner.transformer, "policy")) != hash_state(moved)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_gradients_add_up_in_float32_whatever_the_weights_are_in(folder, zero_stage):
    """The same micro-batch 24 times is 24 times its gradient; summed in bfloat16 it is rounded on the way."""
    spec = replica_spec(folder, dtype="bfloat16")
    config = learner_config(zero_stage=zero_stage, kl_beta=0.0)
    learner = Learner(LearnerSpec(spec, config, sampling_spec(), 0, False, False, 120.0, 120.0))
    learner.set_learning_rate(0.0)
    engine = RolloutEngine(spec)
    publish(learner, engine)
    (samples, count), *_ = updates(rollout(engine, groups=1, size=2))
    samples = [replace(sample, positions=(0,)) for sample in samples]
    norms = []
    for times in (1, 24):
        learner.accumulate(samples * times, count, None, None)
        learner.engine.step()
        norms.append(learner.engine.get_global_grad_norm())
    assert norms[1] == pytest.approx(24 * norms[0], rel=1e-5)


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_bfloat16_publishes_what_it_trains(folder, zero_stage):
    spec = replica_spec(folder, dtype="bfloat16")
    config = learner_config(zero_stage=zero_stage, updates_per_rollout=2, micro_batch_size=4)
    learner = Learner(LearnerSpec(spec, config, sampling_spec(3.0), 0, False, True, 120.0, 120.0))
    learner.negative = conditioning("negative")
    engine = RolloutEngine(spec)
    for first in (0, 2):
        receipt = publish(learner, engine, version=first)
        assert receipt.sha256 == hash_state(learner.adapter())
        assert {t.dtype for t in learner.adapter().values()} == {torch.bfloat16}
        groups = rollout(engine, guidance=3.0, first=first)
        stats = learner.update(updates(groups, num_updates=2, micro=4))
        assert stats[0].gaps.largest <= 2e-2 and stats[1].ratio_max != 1.0
        assert stats[0].gaps.largest <= 1e-6, "batches of one size agree"
    assert receipt.probe_shift > 0
    stale = updates(rollout(engine, guidance=3.0, first=4), num_updates=2, micro=4)
    with pytest.raises(LogProbMismatch, match="log_prob_tolerance=1e-05"):
        learner.update(stale)
