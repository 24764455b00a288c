"""What a training stage offers to the loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class StageLoss:
    """Loss of one batch, and named figures of it for the log."""

    loss: Tensor
    figures: dict[str, float] = field(default_factory=dict)


class Stage(Protocol):
    """One kind of training. Data must be a function of (seed, step) alone."""

    @property
    def modules(self) -> Sequence[nn.Module]:
        """What is trained, in a fixed order: the average and the optimizers follow it."""
        ...

    def loss(self, step: int) -> StageLoss: ...

    def sample_grid(self) -> Image.Image | None:
        """A picture that shows how far the modules are; None where there is nothing to see."""
        ...

    def export(self, folder: Path) -> dict[str, float]:
        """Write the parts this stage owns in the released layout; returns figures measured on the way."""
        ...
