"""A linear layer with LoRA adapters in two kernels beside the base's, where PEFT's own forward takes four.

On an H100 PEFT's forward costs as much again as the linear it adapts: it writes the full-size update, scales it, and
adds it to the base's output, three more passes over the activations. Here the second matrix product accumulates into
the base's output (`addmm`), scale included.
"""

from typing import Any

import torch
from peft.tuners import lora
from torch import nn


class LoraLinear(lora.Linear):
    """PEFT's layer, with the same parameters, names and switches; no merging, dropout or variants.

    x [..., K] -> base(x) + scaling * x A^T B^T [..., N], with at most one active adapter.
    """

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter as PEFT does, its B as a module that accumulates."""
        super().update_layer(adapter_name, *args, **kwargs)
        self.lora_B[adapter_name] = _Accumulate(self.lora_B[adapter_name])  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The base's output, with the active adapter's update unless adapters are disabled."""
        base = self.base_layer(x)
        active = self._active_adapter
        name = active if isinstance(active, str) else active[0]
        if self._disable_adapters or name not in self.lora_A:
            return base
        return self.lora_B[name](self.lora_A[name](x), base, self.scaling[name])


class _Accumulate(nn.Linear):
    """B of an adapter, called as a module so that hooks on its parameter (ZeRO-3's gathering) still run."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False, device="meta")
        self.weight = plain.weight

    def forward(self, down: torch.Tensor, base: torch.Tensor, scaling: float) -> torch.Tensor:  # type: ignore[override]
        flat = torch.addmm(base.flatten(0, -2), down.flatten(0, -2), self.weight.t(), alpha=scaling)
        return flat.view(base.shape)
