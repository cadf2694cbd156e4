"""Dense feed-forward blocks, the modules of `models.options.GatedMLP` and `MLP`."""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.nn.activations import ACTIVATIONS


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); gate and up are one fused matrix (Shazeer, "GLU Variants",
    2020)."""

    def __init__(self, gate_up_proj: nn.Module, down_proj: nn.Module, activation: str) -> None:
        self.gate_up_proj = gate_up_proj
        self.down_proj = down_proj
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, hidden] -> [n, hidden]."""
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)  # [n, intermediate] each
        return self.down_proj(op.multiply(self.activation(gate), up))


class MLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, up_proj: nn.Module, down_proj: nn.Module, activation: str) -> None:
        self.up_proj = up_proj
        self.down_proj = down_proj
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, hidden] -> [n, hidden]."""
        return self.down_proj(self.activation(self.up_proj(x)))
