"""A linear layer with LoRA adapters in two kernels beside the base's, where PEFT's own forward takes four.

PEFT's forward writes the full-size update, scales it, and adds it to the base's output: three more passes over the
activations. Here the second matrix product accumulates into the base's output (`addmm`), scale included.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import nn


class LoraLinear(lora.Linear):
    """PEFT's layer, with the same parameters, names and switches: x [..., K] -> base(x) + scaling * x A^T B^T [..., N].

    Merged adapters, or several at once, take PEFT's own forward. No dropout and no variants.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, its B as a module that accumulates."""
        super().update_layer(adapter_name, *args, **kwargs)
        self.lora_B[adapter_name] = _Accumulate(self.lora_B[adapter_name])  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The base's output, with the active adapter's update unless adapters are disabled."""
        active = self.active_adapters
        if self.merged or len(active) != 1:
            return super().forward(x)
        base = self.base_layer(x)
        if self._disable_adapters or active[0] not in self.lora_A:
            return base
        return self.lora_B[active[0]](self.lora_A[active[0]](x), base, self.scaling[active[0]])


class _Accumulate(nn.Linear):
    """B of an adapter, called as a module so that hooks on its parameter (ZeRO-3's gathering) still run."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight

    def forward(
        self, down: torch.Tensor, base: torch.Tensor | None = None, scaling: float = 1.0
    ) -> torch.Tensor:
        """down [..., r] -> base [..., N] + scaling * down B^T; without `base` the product alone, as PEFT calls it."""
        if base is None:
            return super().forward(down)
        flat = torch.addmm(base.flatten(0, -2), down.flatten(0, -2), self.weight.t(), alpha=scaling)
        return flat.view(base.shape)
