"""Root-mean-square normalisation, the one module of `models.spec.RMSNorm`."""

from __future__ import annotations

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(self, size: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = nn.Parameter((size,), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> [..., size]."""
        return op.rms_norm(x, self.weight, axes=[-1], epsilon=self.eps)
