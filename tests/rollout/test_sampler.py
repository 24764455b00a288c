"""Trajectories and their replay on a tiny transformer, in float32 on the CPU."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from models.lora.attach import adapter_parameters, attach_lora
from models.sampling import sigma_table
from rollout.sampler import (
    Conditioning,
    ConditioningBatch,
    SamplingSpec,
    guided_velocity,
    replay_step,
    sample_trajectories,
)
from tests.fakes.tiny_models import make_tiny_transformer

LATENTS = (4, 8, 8)
SIGMAS = sigma_table(FlowMatchEulerDiscreteScheduler(shift=3.0), 5)
PLAIN = SamplingSpec(num_steps=5, noise_level=0.7, guidance_scale=1.0)
GUIDED = SamplingSpec(num_steps=5, noise_level=0.7, guidance_scale=4.5)


def conditioning(seed: int, *, reference: bool | int = False) -> Conditioning:
    """`reference`: how many; those after the first are of another shape."""
    generator = torch.Generator().manual_seed(seed)
    return Conditioning(
        torch.randn((12, 48), generator=generator),
        torch.randn((40,), generator=generator),
        tuple(torch.randn((4, 6, 10) if i else LATENTS, generator=generator) for i in range(reference)),
    )


def stack(*items: Conditioning) -> ConditioningBatch:
    return ConditioningBatch.stack(items, device="cpu", dtype=torch.float32)


NEGATIVE = conditioning(99)


@pytest.fixture(scope="module")
def transformer():
    """Random base weights and an adapter that is no longer zero, so that gradients and outputs are generic."""
    torch.manual_seed(0)
    model = make_tiny_transformer()
    attach_lora(model, rank=2, alpha=4.0)
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def sample(transformer, spec, batch, seeds, steps=None, negative=NEGATIVE):
    steps = spec.stochastic_steps(0) if steps is None else steps
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return sample_trajectories(transformer, batch, negative, spec, SIGMAS, LATENTS, generators, steps)


def replay(transformer, spec, batch, trajectory, position, **settings):
    index = torch.full((len(trajectory.latents),), trajectory.steps[position])
    return replay_step(
        transformer, trajectory.latents[:, position], trajectory.latents[:, position + 1], index,
        trajectory.sigmas, batch, NEGATIVE, spec, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("reference", [0, 1, 2])
@pytest.mark.parametrize("steps", [(0, 1, 2, 3, 4), (1, 2), (3,)])
@pytest.mark.parametrize(
    "spec", [PLAIN, GUIDED, SamplingSpec(5, 0.7, 4.5, variant="cps")], ids=["plain", "guided", "cps"]
)
def test_replay_gives_the_rollouts_log_probs(transformer, spec, steps, reference):
    batch = stack(conditioning(1, reference=reference), conditioning(2, reference=reference))
    trajectory = sample(transformer, spec, batch, (10, 11), steps)
    assert trajectory.steps == steps
    assert trajectory.latents.shape == (2, len(steps) + 1, *LATENTS)
    assert trajectory.log_probs.shape == (2, len(steps))
    for position in range(len(steps)):
        log_prob = replay(transformer, spec, batch, trajectory, position).log_prob
        torch.testing.assert_close(log_prob, trajectory.log_probs[:, position], rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_the_order_of_references_is_kept_from_rollout_to_replay(transformer, spec):
    """References of one size, so that only their order differs: it changes what is drawn, and a replay that swaps them
    is another policy."""
    item = conditioning(1, reference=1)
    one, other = (conditioning(seed, reference=1).reference_latents[0] for seed in (2, 3))
    batches = [stack(replace(item, reference_latents=order)) for order in ((one, other), (other, one))]
    trajectory, swapped = (sample(transformer, spec, batch, (10,)) for batch in batches)
    assert (trajectory.final_latents - swapped.final_latents).abs().max() > 1e-4
    kept, changed = (replay(transformer, spec, batch, trajectory, 1).log_prob for batch in batches)
    assert torch.equal(kept, trajectory.log_probs[:, 1])
    assert (changed - kept).abs() > 1e-5


def test_samples_at_different_steps_can_share_a_replay(transformer):
    """Groups with other windows meet in one micro-batch: the step index is per sample."""
    batch = stack(conditioning(1), conditioning(2))
    trajectory = sample(transformer, GUIDED, batch, (10, 11))
    where = torch.tensor([0, 3])
    rows = torch.arange(2)
    step = replay_step(
        transformer, trajectory.latents[rows, where], trajectory.latents[rows, where + 1], where,
        SIGMAS, batch, NEGATIVE, GUIDED,
    )  # fmt: skip
    torch.testing.assert_close(step.log_prob, trajectory.log_probs[rows, where], rtol=0, atol=1e-6)


def test_the_steps_outside_a_window_are_euler_steps(transformer):
    batch = stack(conditioning(1))
    trajectory = sample(transformer, PLAIN, batch, (10,), (1, 2))
    x = torch.randn(LATENTS, generator=torch.Generator().manual_seed(10))[None]
    for t in range(5):
        if t == 1:
            torch.testing.assert_close(trajectory.latents[:, 0], x)
            x = trajectory.latents[:, 2]
        if t in (1, 2):
            continue
        with torch.no_grad():
            velocity = guided_velocity(transformer, x, SIGMAS[t].reshape(1), batch, None, 1.0)
        x = x + (SIGMAS[t + 1] - SIGMAS[t]) * velocity
    torch.testing.assert_close(trajectory.final_latents, x)


def test_pure_ode_sampling_has_no_log_probs(transformer):
    spec = SamplingSpec(5, 0.0, 1.0, variant="ode")
    trajectory = sample(transformer, spec, stack(conditioning(1)), (10,), spec.stochastic_steps(3))
    assert trajectory.steps == ()
    assert trajectory.log_probs.shape == trajectory.latents.shape == (1, 0)
    assert trajectory.final_latents.shape == (1, *LATENTS)


def test_a_sample_depends_on_its_own_generator_alone(transformer):
    """Float32 kernels may differ in the last bits between batch sizes; another noise would differ in the first."""
    pair = sample(transformer, PLAIN, stack(conditioning(1), conditioning(1)), (10, 11))
    alone = sample(transformer, PLAIN, stack(conditioning(1)), (11,))
    torch.testing.assert_close(pair.final_latents[1:], alone.final_latents, rtol=1e-4, atol=1e-4)
    again = sample(transformer, PLAIN, stack(conditioning(1), conditioning(1)), (10, 11))
    assert torch.equal(pair.final_latents, again.final_latents)
    assert torch.equal(pair.log_probs, again.log_probs)


def test_guidance_is_u_plus_s_times_c_minus_u_and_keeps_the_reference(transformer):
    item = conditioning(1, reference=True)
    x, sigma = torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(1)), torch.full((1,), 0.6)
    with torch.no_grad():
        halves = [
            transformer(
                x, text.prompt_embeds[None], text.pooled_prompt_embeds[None], sigma * 1000,
                item.reference_latents[0][None], return_dict=False,
            )[0]
            for text in (item, NEGATIVE)
        ]  # fmt: skip
        guided = guided_velocity(transformer, x, sigma, stack(item), NEGATIVE, 3.5)
        plain = guided_velocity(transformer, x, sigma, stack(item), None, 1.0)
        below = [guided_velocity(transformer, x, sigma, stack(item), NEGATIVE, scale) for scale in (0.0, 0.5)]
    torch.testing.assert_close(guided, halves[1] + 3.5 * (halves[0] - halves[1]))
    torch.testing.assert_close(plain, halves[0])
    assert all(torch.equal(one, plain) for one in below), (
        "up to 1 there is no guidance, here as in the pipelines"
    )


def reference_log_prob(transformer, x, prev, t, item, scale, *, detach):
    """The log-probability in ten lines, for autograd."""
    sigma, sigma_next = SIGMAS[t], SIGMAS[t + 1]
    c, u = (
        transformer(x, e.prompt_embeds[None], e.pooled_prompt_embeds[None], sigma.reshape(1) * 1000)[0]
        for e in (item, NEGATIVE)
    )
    u = u.detach() if detach else u
    v = u + scale * (c - u)
    g2 = 0.7**2 * sigma / (1 - (SIGMAS[1] if t == 0 else sigma))
    dt = sigma_next - sigma
    mean = x + (v + g2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
    std = torch.sqrt(-g2 * dt)
    return (-((prev - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(math.sqrt(2 * math.pi))).mean()


@pytest.mark.parametrize("t", [0, 2])
@pytest.mark.parametrize("cfg_gradient", ["conditional", "both"])
def test_the_gradient_is_that_of_a_short_reference(transformer, cfg_gradient, t):
    item = conditioning(1)
    batch = stack(item)
    trajectory = sample(transformer, GUIDED, batch, (10,))
    parameters = list(adapter_parameters(transformer).values())
    replayed = replay(transformer, GUIDED, batch, trajectory, t, cfg_gradient=cfg_gradient).log_prob.sum()
    x, prev = trajectory.latents[:, t], trajectory.latents[:, t + 1]
    expected = reference_log_prob(transformer, x, prev, t, item, 4.5, detach=cfg_gradient == "conditional")
    torch.testing.assert_close(replayed, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = (torch.autograd.grad(value, parameters) for value in (replayed, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max() + 1))


def test_the_two_cfg_gradients_differ(transformer):
    batch = stack(conditioning(1))
    trajectory = sample(transformer, GUIDED, batch, (10,))
    parameters = list(adapter_parameters(transformer).values())
    grads = [
        torch.cat([
            g.flatten()
            for g in torch.autograd.grad(
                replay(transformer, GUIDED, batch, trajectory, 2, cfg_gradient=kind).log_prob.sum(), parameters
            )
        ])
        for kind in ("conditional", "both")
    ]  # fmt: skip
    assert float((grads[0] - grads[1]).norm() / grads[1].norm()) > 0.1


def test_samples_own_negatives_take_the_place_of_the_runs(transformer):
    """MetaQuery's editing: each sample is guided as if its negative were the whole run's."""
    own = [
        replace(
            conditioning(k, reference=True),
            negative_prompt_embeds=conditioning(50 + k).prompt_embeds,
            negative_pooled_prompt_embeds=conditioning(50 + k).pooled_prompt_embeds,
        )
        for k in (1, 2)
    ]
    together = sample(transformer, GUIDED, stack(*own), (10, 11), negative=None)
    ignored = sample(transformer, GUIDED, stack(*own), (10, 11))
    assert torch.equal(together.final_latents, ignored.final_latents)
    for k, seed in ((1, 10), (2, 11)):
        shared = conditioning(50 + k)
        alone = sample(transformer, GUIDED, stack(conditioning(k, reference=True)), (seed,), negative=shared)
        torch.testing.assert_close(
            together.final_latents[k - 1 : k], alone.final_latents, rtol=1e-4, atol=1e-4
        )
    log_prob = replay(transformer, GUIDED, stack(*own), together, 1).log_prob
    torch.testing.assert_close(log_prob, together.log_probs[:, 1], rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="with and without a negative prompt of their own"):
        stack(own[0], conditioning(2, reference=True))


def test_mixtures_and_missing_parts_are_refused(transformer):
    for counts, named in (
        ((0, 1), "no reference and samples with references of 8 x 8 latents"),
        ((2, 1), "references of 8 x 8 latents and samples with references of 8 x 8, 6 x 10 latents"),
    ):
        with pytest.raises(ValueError, match=f"samples with {named} cannot share a batch"):
            stack(*(conditioning(k, reference=count) for k, count in enumerate(counts)))
    with pytest.raises(ValueError, match="guidance_scale=4.5 needs the negative prompt"):
        sample(transformer, GUIDED, stack(conditioning(1)), (10,), negative=None)
    batch = stack(conditioning(1))
    trajectory = sample(transformer, PLAIN, batch, (10,))
    for spec in (SamplingSpec(5, 0.7, 1.0, variant="ode"), SamplingSpec(5, 0.0, 1.0)):
        with pytest.raises(ValueError, match="ODE steps have no log-probability"):
            replay(transformer, spec, batch, trajectory, 0)


# ---- branching -------------------------------------------------------------------------------------------------


def branched(transformer, spec, batch, seeds, steps, trunk_seed=7):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    trunk = torch.Generator().manual_seed(trunk_seed)
    return sample_trajectories(transformer, batch, NEGATIVE, spec, SIGMAS, LATENTS, generators, steps, trunk)


@pytest.mark.parametrize("steps", [(0,), (2,), (1, 2, 3)])
@pytest.mark.parametrize("spec", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_a_branching_group_is_one_ode_trajectory_until_its_first_stochastic_step(transformer, spec, steps):
    item = conditioning(1, reference=True)
    group = branched(transformer, spec, stack(*[item] * 3), (10, 11, 12), steps)
    x = torch.randn(LATENTS, generator=torch.Generator().manual_seed(7))[None]
    for t in range(steps[0]):
        with torch.no_grad():
            velocity = guided_velocity(
                transformer, x, SIGMAS[t].reshape(1), stack(item), NEGATIVE, spec.guidance_scale
            )
        x = x + (SIGMAS[t + 1] - SIGMAS[t]) * velocity
    torch.testing.assert_close(group.latents[:, 0], x.expand(3, *LATENTS))
    assert group.latents.shape == (3, len(steps) + 1, *LATENTS)
    assert (group.latents[0, 1] - group.latents[1, 1]).abs().max() > 0.1, "and then each has noise of its own"
    assert (group.final_latents[1] - group.final_latents[2]).abs().max() > 0.1


def test_a_branching_group_in_chunks_is_the_same_group(transformer):
    batch = stack(*[conditioning(1)] * 4)
    whole = branched(transformer, PLAIN, batch, (10, 11, 12, 13), (1, 2))
    parts = [
        branched(transformer, PLAIN, batch.rows(torch.arange(2)), s, (1, 2)) for s in ((10, 11), (12, 13))
    ]
    assert torch.equal(torch.cat([p.latents[:, :2] for p in parts]), whole.latents[:, :2])
    torch.testing.assert_close(
        torch.cat([p.final_latents for p in parts]), whole.final_latents, rtol=1e-4, atol=1e-4
    )


def test_a_trunk_needs_a_step_to_branch_at(transformer):
    with pytest.raises(ValueError, match="without a stochastic step"):
        branched(transformer, PLAIN, stack(conditioning(1)), (10,), ())


@pytest.mark.parametrize("cfg_gradient", ["conditional", "both"])
def test_a_shared_forward_replays_what_separate_ones_do(transformer, cfg_gradient):
    """Two groups of unequal size that branch at different steps, in mixed order; one brings negatives of its own."""
    items = [
        replace(conditioning(i, reference=True), negative_prompt_embeds=n.prompt_embeds,
                negative_pooled_prompt_embeds=n.pooled_prompt_embeds)
        for i, n in ((1, conditioning(5)), (2, conditioning(6)))
    ]  # fmt: skip
    one = branched(transformer, GUIDED, stack(*[items[0]] * 2), (10, 11), (1,))
    two = branched(transformer, GUIDED, stack(*[items[1]] * 3), (12, 13, 14), (3,), trunk_seed=8)
    order = [(two, 0), (one, 0), (two, 1), (two, 2), (one, 1)]
    sample, after = (torch.stack([t.latents[row, i] for t, row in order]) for i in (0, 1))
    index = torch.tensor([t.steps[0] for t, _ in order])
    batch = stack(*[items[1] if t is two else items[0] for t, _ in order])
    trunks = torch.tensor([40 if t is two else 3 for t, _ in order])
    parameters, rows = list(adapter_parameters(transformer).values()), []
    hook = transformer.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    found = []
    for shared in (None, trunks):
        step = replay_step(
            transformer,
            sample,
            after,
            index,
            SIGMAS,
            batch,
            None,
            GUIDED,
            cfg_gradient=cfg_gradient,
            trunks=shared,
        )
        weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
        found.append((step.log_prob.detach(), step.mean.detach(),
                      torch.autograd.grad((weights * step.log_prob).sum(), parameters)))  # fmt: skip
    hook.remove()
    assert rows == [5, 5, 2, 2]
    stored = torch.stack([t.log_probs[row, 0] for t, row in order])
    torch.testing.assert_close(found[1][0], stored, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1][:2], found[0][:2], rtol=1e-4, atol=1e-5)
    for a, b in zip(found[1][2], found[0][2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1))


# ---- the window -------------------------------------------------------------------------------------------------


def test_without_a_window_every_step_is_stochastic():
    assert PLAIN.stochastic_steps(7) == (0, 1, 2, 3, 4)


def test_a_window_is_consecutive_inside_its_bounds_and_reaches_both_ends():
    spec = SamplingSpec(10, 0.7, 1.0, window_size=3, window_first=2, window_last=8)
    windows = {spec.stochastic_steps(seed) for seed in range(200)}
    assert windows == {(start, start + 1, start + 2) for start in range(2, 6)}


def test_a_window_is_decided_by_its_seed():
    spec = SamplingSpec(10, 0.7, 1.0, window_size=2, window_last=10)
    assert all(spec.stochastic_steps(seed) == spec.stochastic_steps(seed) for seed in range(20))
    assert len({spec.stochastic_steps(seed) for seed in range(50)}) > 1


def test_deterministic_specs_have_no_stochastic_step():
    for spec in (
        SamplingSpec(10, 0.0, 1.0),
        SamplingSpec(10, 0.7, 1.0, "ode", window_size=2, window_last=10),
    ):
        assert spec.stochastic_steps(0) == ()
