"""The moving average by hand."""

import pytest
import torch

from core.training.ema import MovingAverage


def test_the_average_by_hand():
    ema = MovingAverage({"a": torch.tensor([1.0, 2.0])}, decay=0.9, every=1)
    ema.update({"a": torch.tensor([2.0, 4.0])})
    assert ema.average["a"].tolist() == pytest.approx([1.1, 2.2])
    ema.update({"a": torch.tensor([3.0, 6.0])})
    assert ema.average["a"].tolist() == pytest.approx([1.29, 2.58])


def test_it_is_due_every_so_many_updates():
    ema = MovingAverage({"a": torch.zeros(1)}, decay=0.9, every=3)
    assert [ema.due() for _ in range(7)] == [False, False, True, False, False, True, False]


def test_a_counter_set_back_by_a_resume_continues_its_rhythm():
    ema = MovingAverage({"a": torch.zeros(1)}, decay=0.9, every=3)
    ema.updates = 5
    assert ema.due()


def test_it_starts_as_a_copy_and_stays_apart():
    live = {"a": torch.ones(2)}
    ema = MovingAverage(live, decay=0.5, every=1)
    live["a"].zero_()
    assert ema.average["a"].tolist() == [1.0, 1.0]
    ema.state(torch.float32)["a"].zero_()
    assert ema.average["a"].tolist() == [1.0, 1.0]


def test_small_steps_survive_because_the_average_is_float32():
    """In bfloat16 1 + .1 * .01 would round back to 1 each time."""
    ema = MovingAverage({"a": torch.ones(1, dtype=torch.bfloat16)}, decay=0.9, every=1)
    for _ in range(50):
        ema.update({"a": torch.full((1,), 1.0078125, dtype=torch.bfloat16)})
    assert ema.average["a"].dtype == torch.float32
    assert float(ema.average["a"]) == pytest.approx(1.0078125 - 0.0078125 * 0.9**50, abs=1e-6)
    assert ema.state(torch.bfloat16)["a"].dtype == torch.bfloat16


def test_a_ramp_keeps_an_early_average_from_being_all_initial_weights():
    ema = MovingAverage({"a": torch.zeros(1)}, decay=0.9, ramp=True)
    expected = 0.0
    for n, live in enumerate((1.0, 2.0, 4.0)):
        ema.step({"a": torch.tensor([live])})
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * live
        assert float(ema.average["a"]) == pytest.approx(expected)
    assert ema.updates == 3


def test_live_weights_lend_their_place_and_get_it_back():
    live = {"a": torch.tensor([2.0])}
    ema = MovingAverage({"a": torch.tensor([1.0])}, decay=0.9)
    with ema.in_place_of(live):
        assert live["a"].tolist() == [1.0]
    assert live["a"].tolist() == [2.0] and ema.average["a"].tolist() == [1.0]


def test_an_average_that_was_cut_otherwise_is_refused():
    ema = MovingAverage({"a": torch.zeros(2)}, decay=0.9)
    ema.load({"a": torch.ones(2)}, 7)
    assert ema.average["a"].tolist() == [1.0, 1.0] and ema.updates == 7
    with pytest.raises(ValueError, match="ranks, ZeRO stage and trained parts must be those"):
        ema.load({"a": torch.ones(3)}, 7)
