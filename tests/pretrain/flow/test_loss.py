import math

import torch

from pretrain.flow.loss import add_noise, draw_sigmas, prompt_dropout_mask, shift_sigma, velocity_error
from worlds.shapes.training.kontext import task_of


def test_shift_three_moves_the_middle_to_three_quarters():
    assert shift_sigma(torch.tensor(0.5), 3.0).item() == 0.75
    assert torch.equal(shift_sigma(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]))


def test_sigmas_are_logit_normal_before_the_shift():
    sigma = draw_sigmas(20000, 3.0, torch.Generator().manual_seed(0)).double()
    unshifted = sigma / (3 - 2 * sigma)
    logits = torch.log(unshifted / (1 - unshifted))
    assert abs(logits.mean().item()) < 0.03
    assert abs(logits.std().item() - 1) < 0.03


def test_a_perfect_velocity_has_no_error_and_leads_back_to_the_clean_latents():
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    noisy = add_noise(clean, noise, sigma)
    velocity = noise - clean
    assert velocity_error(velocity, clean, noise).abs().max() == 0
    torch.testing.assert_close(noisy - sigma.view(-1, 1, 1, 1) * velocity, clean)


def test_the_error_is_the_mean_square_of_each_sample():
    clean, noise = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2)
    prediction = torch.stack([torch.zeros(1, 2, 2), torch.full((1, 2, 2), 3.0)])
    assert velocity_error(prediction, clean, noise).tolist() == [1.0, 4.0]


def test_prompt_dropout_has_its_rate():
    mask = prompt_dropout_mask(10000, 0.1, torch.Generator().manual_seed(2))
    assert math.isclose(mask.float().mean().item(), 0.1, abs_tol=0.01)


def test_tasks_alternate_and_keep_their_share():
    assert [task_of(step, 0.5) for step in range(4)] == ["t2i", "edit", "t2i", "edit"]
    assert sum(task_of(step, 0.25) == "edit" for step in range(400)) == 100
    assert {task_of(step, 1.0) for step in range(5)} == {"edit"}
