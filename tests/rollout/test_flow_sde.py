"""The step function against figures worked by hand and against an independent NumPy reference in float64."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from scipy.stats import norm

from models.sampling import sigma_table
from rollout.flow_sde import flow_sde_step

SIGMAS_T10 = (1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0)
SHAPE = (3, 2, 4, 4)


@pytest.fixture(scope="module")
def sigmas() -> torch.Tensor:
    return sigma_table(FlowMatchEulerDiscreteScheduler(shift=3.0), 10)


def noise(*seeds: int, shape: tuple[int, ...] = SHAPE) -> list[torch.Tensor]:
    return [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def reference_step(v, x, sigma, sigma_next, clip, a):
    """Probability-flow drift plus g^2/2 times the score, discretised, in float64 -> mean, g, std."""
    v, x = v.double().numpy(), x.double().numpy()
    dt = sigma_next - sigma
    g = a * math.sqrt(sigma / (1 - (clip if sigma == 1 else sigma)))
    score = -(x + (1 - sigma) * v) / sigma
    return x + (v - g**2 / 2 * score) * dt, g, g * math.sqrt(-dt)


def test_the_sigma_table_is_the_schedulers(sigmas):
    assert sigmas.dtype == torch.float32
    np.testing.assert_allclose(sigmas.numpy(), SIGMAS_T10, atol=5e-7)


def test_taking_the_table_leaves_the_scheduler_alone():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    before = scheduler.sigmas.clone()
    sigma_table(scheduler, 7)
    assert torch.equal(scheduler.sigmas, before)


def test_check_figures_of_the_first_and_last_step(sigmas):
    v, x = noise(1, 2)
    clip = float(sigmas[1])
    first = flow_sde_step(v, x, float(sigmas[0]), clip, sigma_clip=clip, noise_level=0.7)
    assert first.diffusion.tolist() == pytest.approx([3.5057] * 3, abs=5e-5)
    assert first.step_std.tolist() == pytest.approx([0.7] * 3, abs=1e-6)
    last = flow_sde_step(v, x, float(sigmas[9]), float(sigmas[10]), sigma_clip=clip, noise_level=0.7)
    assert last.step_std.tolist() == pytest.approx([0.0063] * 3, abs=5e-5)


def test_one_element_worked_by_hand():
    """g = .7 sqrt(.5/.5) = .7; mean = 1 (1 - .049) + .5 (1 + .245)(-.1) = .88875; std = .7 sqrt(.1)."""
    one = torch.ones(1, 1, 1, 1)
    step = flow_sde_step(0.5 * one, one, 0.5, 0.4, sigma_clip=0.9, noise_level=0.7, prev_sample=0.9 * one)
    assert float(step.mean) == pytest.approx(0.88875, abs=1e-6)
    assert float(step.diffusion) == pytest.approx(0.7, abs=1e-6)
    assert float(step.step_std) == pytest.approx(0.2213594, abs=1e-6)
    assert float(step.log_prob) == pytest.approx(-0.0012915 + 1.5079675 - 0.9189385, abs=1e-6)


@pytest.mark.parametrize("t", [0, 1, 5, 8, 9])
def test_sde_matches_the_score_form(sigmas, t):
    v, x, z = noise(3, 4, 5)
    sigma, sigma_next, clip = (float(sigmas[i]) for i in (t, t + 1, 1))
    mean, g, std = reference_step(v, x, sigma, sigma_next, clip, 0.7)
    prev = torch.from_numpy(mean).float() + std * z
    log_prob = norm.logpdf(prev.double().numpy(), mean, std).reshape(3, -1).mean(1)
    step = flow_sde_step(v, x, sigma, sigma_next, sigma_clip=clip, noise_level=0.7, prev_sample=prev)
    np.testing.assert_allclose(step.mean.numpy(), mean, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(step.diffusion.numpy(), [g] * 3, rtol=1e-5)
    np.testing.assert_allclose(step.step_std.numpy(), [std] * 3, rtol=1e-5)
    np.testing.assert_allclose(step.log_prob.numpy(), log_prob, atol=2e-4 if t == 9 else 1e-5)


def test_sigma_clip_acts_at_sigma_one_alone():
    """A sigma between the clip and 1 keeps its own denominator: g = a sqrt(.98 / .02) = 4.9."""
    v, x = noise(6, 7)
    at = torch.tensor([1.0, 0.98, 0.98])
    step = flow_sde_step(v, x, at, 0.9, sigma_clip=0.96, noise_level=0.7)
    assert step.diffusion.tolist() == pytest.approx([0.7 * 5, 4.9, 4.9], rel=1e-5)


def test_replaying_a_sampled_step_gives_its_log_prob(sigmas):
    v, x = noise(6, 7)
    for variant in ("sde", "cps"):
        settings = dict(sigma_clip=float(sigmas[1]), noise_level=0.7, variant=variant)
        sampled = flow_sde_step(v, x, 0.6, 0.5, generator=generators(1, 2, 3), **settings)
        replayed = flow_sde_step(v, x, 0.6, 0.5, prev_sample=sampled.prev_sample, **settings)
        assert torch.equal(sampled.log_prob, replayed.log_prob)
        assert torch.equal(sampled.prev_sample, replayed.prev_sample)


def test_sampled_noise_is_mean_plus_std_times_the_generators(sigmas):
    v, x = noise(8, 9)
    step = flow_sde_step(
        v, x, 0.6, 0.5, sigma_clip=float(sigmas[1]), noise_level=0.7, generator=generators(11, 12, 13)
    )
    z = torch.stack([torch.randn(SHAPE[1:], generator=g) for g in generators(11, 12, 13)])
    torch.testing.assert_close(step.prev_sample, step.mean + step.step_std[:, None, None, None] * z)


def test_cps_against_its_definition_and_its_marginal():
    """With the exact velocity, CPS lands on (1 - s') x0 + sqrt(s'^2 - s^2) eps + s z: variance s'^2 around x0."""
    clean, eps = noise(10, 11)
    sigma, sigma_next, a = 0.8, 0.6, 0.7
    x = (1 - sigma) * clean + sigma * eps
    step = flow_sde_step(
        eps - clean,
        x,
        sigma,
        sigma_next,
        sigma_clip=0.9,
        noise_level=a,
        variant="cps",
        generator=generators(1, 2, 3),
    )
    s = sigma_next * math.sin(a * math.pi / 2)
    expected = (1 - sigma_next) * clean + math.sqrt(sigma_next**2 - s**2) * eps
    torch.testing.assert_close(step.mean, expected, rtol=1e-5, atol=1e-5)
    assert step.step_std.tolist() == pytest.approx([s] * 3, rel=1e-6)
    assert step.diffusion.tolist() == pytest.approx([s / math.sqrt(0.2)] * 3, rel=1e-6)
    residual = (step.prev_sample - step.mean).square().flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, -residual)


@pytest.mark.parametrize("settings", [("ode", 0.7), ("sde", 0.0), ("cps", 0.0)])
def test_deterministic_steps_are_euler_and_have_no_log_prob(settings):
    v, x = noise(12, 13)
    variant, a = settings
    step = flow_sde_step(v, x, 0.6, 0.5, sigma_clip=0.9, noise_level=a, variant=variant)
    torch.testing.assert_close(step.prev_sample, x - 0.1 * v)
    assert step.log_prob is None
    assert step.step_std.tolist() == step.diffusion.tolist() == [0.0] * 3


def test_sde_without_noise_is_the_limit_of_small_noise():
    v, x = noise(14, 15)
    small = flow_sde_step(v, x, 0.6, 0.5, sigma_clip=0.9, noise_level=1e-4)
    torch.testing.assert_close(small.mean, x - 0.1 * v, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["sde", "cps", "ode"])
def test_sigmas_per_sample_equal_floats(sigmas, variant):
    v, x, prev = noise(16, 17, 18)
    settings = dict(sigma_clip=float(sigmas[1]), noise_level=0.7, variant=variant)
    index = torch.tensor([0, 4, 8])
    given = None if variant == "ode" else prev
    batch = flow_sde_step(v, x, sigmas[index], sigmas[index + 1], prev_sample=given, **settings)
    for i, t in enumerate(index.tolist()):
        rows = slice(i, i + 1)
        alone = flow_sde_step(
            v[rows], x[rows], float(sigmas[t]), float(sigmas[t + 1]),
            prev_sample=None if given is None else given[rows], **settings,
        )  # fmt: skip
        assert torch.equal(batch.mean[rows], alone.mean)
        assert torch.equal(batch.diffusion[rows], alone.diffusion)
        if variant != "ode":
            assert torch.equal(batch.log_prob[rows], alone.log_prob)


def test_a_generator_per_sample_makes_samples_independent():
    v, x = noise(19, 20)
    settings = dict(sigma_clip=0.9, noise_level=0.7)
    together = flow_sde_step(v, x, 0.6, 0.5, generator=generators(1, 2, 3), **settings)
    for i, generator in enumerate(generators(1, 2, 3)):
        alone = flow_sde_step(v[i : i + 1], x[i : i + 1], 0.6, 0.5, generator=[generator], **settings)
        assert torch.equal(together.prev_sample[i : i + 1], alone.prev_sample)
    swapped = flow_sde_step(v, x, 0.6, 0.5, generator=generators(1, 9, 3), **settings)
    changed = (swapped.prev_sample != together.prev_sample).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]


def test_one_generator_serves_the_batch():
    v, x = noise(21, 22)
    settings = dict(sigma_clip=0.9, noise_level=0.7)
    (generator,), (again,) = generators(5), generators(5)
    step = flow_sde_step(v, x, 0.6, 0.5, generator=generator, **settings)
    z = torch.randn(SHAPE, generator=again)
    torch.testing.assert_close(step.prev_sample, step.mean + step.step_std[:, None, None, None] * z)


def test_bfloat16_in_float32_throughout():
    """A velocity in bfloat16 is read as it is; nothing that follows is rounded to it."""
    v, x = noise(23, 24)
    low = v.bfloat16()
    settings = dict(sigma_clip=0.9, noise_level=0.7)
    step = flow_sde_step(low, x, 0.6, 0.5, generator=generators(1, 2, 3), **settings)
    same = flow_sde_step(low.float(), x, 0.6, 0.5, generator=generators(1, 2, 3), **settings)
    for name in ("prev_sample", "log_prob", "mean", "diffusion", "step_std"):
        assert getattr(step, name).dtype == torch.float32
        assert torch.equal(getattr(step, name), getattr(same, name))
    assert not torch.equal(step.prev_sample, step.prev_sample.bfloat16().float())


def test_latents_rounded_to_bfloat16_would_bias_the_last_log_prob(sigmas):
    """Why latents stay float32: a rounding of the latents costs about 3.5e-2 at the last step of ten."""
    (v, x) = noise(25, 26, shape=(4, 16, 32, 32))
    settings = dict(sigma_clip=float(sigmas[1]), noise_level=0.7)
    at = (float(sigmas[9]), float(sigmas[10]))
    step = flow_sde_step(v, x, *at, generator=generators(1, 2, 3, 4), **settings)
    rounded = flow_sde_step(v, x, *at, prev_sample=step.prev_sample.bfloat16(), **settings)
    assert float((rounded.log_prob - step.log_prob).mean()) == pytest.approx(-3.5e-2, rel=0.2)


def test_the_gradient_flows_through_the_mean_alone():
    v, x = noise(27, 28)
    v.requires_grad_(True)
    step = flow_sde_step(v, x, 0.6, 0.5, sigma_clip=0.9, noise_level=0.7, generator=generators(1, 2, 3))
    step.log_prob.sum().backward()
    d_mean_d_v = (1 + 0.49 * 0.6 / 0.4 / 1.2 * 0.4) * -0.1
    residual = step.prev_sample - step.mean
    expected = residual / step.step_std[:, None, None, None].square() * d_mean_d_v / math.prod(SHAPE[1:])
    torch.testing.assert_close(v.grad, expected.detach(), rtol=1e-4, atol=1e-6)


def test_errors_say_what_to_do():
    v, x = noise(29, 30)
    with pytest.raises(ValueError, match="choose 'sde', 'cps' or 'ode'"):
        flow_sde_step(v, x, 0.6, 0.5, sigma_clip=0.9, noise_level=0.7, variant="dance")
    for settings in (dict(noise_level=0.7, variant="ode"), dict(noise_level=0.0)):
        with pytest.raises(ValueError, match="deterministic"):
            flow_sde_step(v, x, 0.6, 0.5, sigma_clip=0.9, prev_sample=x, **settings)
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        flow_sde_step(v, x, 0.6, 0.5, sigma_clip=0.9, noise_level=0.7, generator=generators(1, 2))
