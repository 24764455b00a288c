"""Steps that DeepSpeed leaves out are counted by the trainer, and end it when they are no accident."""

from types import SimpleNamespace

import pytest

from core.training import supervised
from core.training.supervised import SupervisedRank


class Rank(SupervisedRank):
    """A rank around an engine that says whether its steps took effect."""

    def __init__(self, applied):
        self.settings = SimpleNamespace(
            micro_batches=1,
            steps=9,
            optimization=SimpleNamespace(lr=1.0, warmup_fraction=0.0, final_lr_fraction=1.0),
        )
        self.step = self.skipped = 0
        self._peaks, self.batches, self.averaged = [], iter([0] * 9), 0
        self.average = SimpleNamespace(step=self._count, live=lambda: None)
        self.engine = SimpleNamespace(
            optimizer=SimpleNamespace(param_groups=[]), backward=lambda loss: None, step=lambda: None,
            was_step_applied=iter(applied).__next__, get_global_grad_norm=lambda: 1.0, train=lambda: None,
        )  # fmt: skip

    def _count(self, live):
        self.averaged += 1

    def build(self): ...

    def micro_batches(self, first_step): ...

    def micro_loss(self, batch):
        return 0.0, None

    def figures(self, parts, gradient_norm, learning_rate):
        return gradient_norm


def test_a_few_are_borne_and_leave_the_average_alone(caplog):
    rank = Rank([True, False, False, True])
    assert rank.advance(4) == [1.0] * 4
    assert (rank.skipped, rank.averaged) == (2, 2)
    assert "step 1: skipped, its gradient is not finite (1 so far)" in caplog.text


def test_more_of_them_end_the_training_by_the_step():
    rank = Rank([False] * 9)
    with pytest.raises(FloatingPointError, match=f"^step {supervised.MOST_SKIPPED}: 4 steps were skipped"):
        rank.advance(9)
