"""Equation 2 by hand: the clipped term per sample and step, both forms of the KL, and the weights."""

import math

import pytest
import torch

from rl.learner.grpo import gaussian_kl, grpo_loss
from rollout.flow_sde import flow_sde_step


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def loss_of(log_ratio: torch.Tensor, advantages: torch.Tensor, *, clip: float = 0.2, **settings):
    count = len(advantages)
    settings.setdefault("weights", torch.full((count,), 1 / count))
    return grpo_loss(
        log_prob=log_ratio,
        old_log_prob=torch.zeros(count),
        advantages=advantages,
        clip_range=clip,
        **settings,
    )


def test_the_four_corners_of_the_clip():
    """rho 1.5 and .5, A of either sign: max(-A rho, -A clip(rho, .8, 1.2))."""
    log_ratio = torch.log(tensor(1.5, 1.5, 0.5, 0.5))
    loss = loss_of(log_ratio, tensor(2.0, -2.0, 2.0, -2.0))
    assert loss.policy_loss.tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6])
    assert float(loss.loss) == pytest.approx((-2.4 + 3.0 - 1.0 + 1.6) / 4)
    assert loss.clipped_high.tolist() == [True, True, False, False]
    assert loss.clipped_low.tolist() == [False, False, True, True]
    assert loss.ratio.tolist() == pytest.approx([1.5, 1.5, 0.5, 0.5])
    assert loss.approx_kl.tolist() == pytest.approx([math.log(1.5) ** 2 / 2] * 2 + [math.log(2) ** 2 / 2] * 2)


def test_clipped_pairs_have_no_gradient_and_others_have_minus_a_rho():
    log_prob = torch.log(tensor(1.5, 1.5, 0.5, 0.5)).requires_grad_(True)
    loss_of(log_prob, tensor(2.0, -2.0, 2.0, -2.0), weights=torch.ones(4)).loss.backward()
    assert log_prob.grad.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0])


def test_on_policy_the_gradient_is_the_policy_gradient():
    """At rho = 1 the clip is inactive however narrow it is: d loss / d log_prob = -A / N."""
    log_prob = torch.zeros(3, requires_grad=True)
    advantages = tensor(1.0, -2.0, 0.5)
    loss = loss_of(log_prob, advantages, clip=1e-4)
    loss.loss.backward()
    torch.testing.assert_close(log_prob.grad, -advantages / 3)
    assert not (loss.clipped_low | loss.clipped_high).any()


def test_shares_of_unequal_size_add_up_to_the_global_mean():
    generator = torch.Generator().manual_seed(0)
    log_ratio, advantages, kl = (torch.randn(7, generator=generator) for _ in range(3))
    whole = loss_of(0.1 * log_ratio, advantages, kl=kl.abs(), kl_beta=0.04)
    parts = []
    for rows in (slice(0, 5), slice(5, 7)):
        padded = [torch.cat([t[rows], t[rows][-1:]]) for t in (0.1 * log_ratio, advantages, kl.abs())]
        weights = torch.cat([torch.full((rows.stop - rows.start,), 1 / 7), torch.zeros(1)])
        parts.append(loss_of(padded[0], padded[1], kl=padded[2], kl_beta=0.04, weights=weights).loss)
    torch.testing.assert_close(sum(parts), whole.loss)


def test_the_kl_is_added_with_beta_and_carries_gradient():
    kl = tensor(0.5, 1.5).requires_grad_(True)
    loss = loss_of(torch.zeros(2), tensor(1.0, -1.0), kl=kl, kl_beta=0.04)
    assert loss.loss.item() == pytest.approx(0.04 * 1.0)
    loss.loss.backward()
    assert kl.grad.tolist() == pytest.approx([0.02, 0.02])
    assert not loss.kl.requires_grad
    without = loss_of(torch.zeros(2), tensor(1.0, -1.0), kl_beta=0.04)
    assert without.kl.tolist() == [0.0, 0.0]


def test_both_kl_forms_by_hand():
    """mu - mu_ref = .3 everywhere: .09 / (2 g^2) and .09 / (2 g^2 (-dt)), at g = .7, -dt = .1."""
    mean = torch.zeros(2, 4, 2, 2)
    g, std = tensor(0.7, 1.4), tensor(0.7, 1.4) * math.sqrt(0.1)
    plain = gaussian_kl(mean + 0.3, mean, g, std, "without_dt")
    exact = gaussian_kl(mean + 0.3, mean, g, std, "exact")
    assert plain.tolist() == pytest.approx([0.09 / 0.98, 0.09 / 3.92])
    assert exact.tolist() == pytest.approx([0.9 / 0.98, 0.9 / 3.92])


def test_the_exact_form_is_the_kl_of_the_two_steps():
    """torch.distributions as the independent reference, averaged over elements as the log-probability is."""
    generator = torch.Generator().manual_seed(1)
    x, v, w = (torch.randn((2, 4, 2, 2), generator=generator) for _ in range(3))
    one, two = (flow_sde_step(u, x, 0.6, 0.5, sigma_clip=0.9, noise_level=0.7) for u in (v, w))
    std = one.step_std.reshape(2, 1, 1, 1)
    normal = torch.distributions.Normal
    expected = (
        torch.distributions.kl_divergence(normal(one.mean, std), normal(two.mean, std)).flatten(1).mean(1)
    )
    exact = gaussian_kl(one.mean, two.mean, one.diffusion, one.step_std, "exact")
    torch.testing.assert_close(exact, expected, rtol=1e-4, atol=1e-6)
    plain = gaussian_kl(one.mean, two.mean, one.diffusion, one.step_std, "without_dt")
    torch.testing.assert_close(plain, exact * 0.1, rtol=1e-4, atol=1e-6)
