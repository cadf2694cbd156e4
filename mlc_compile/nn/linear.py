"""Linear layers and embeddings on plain (unquantised) weights, and how a decoder asks for them.

Activations are two-dimensional everywhere inside a decoder: [n, features], n tokens of any
sequences.
"""

from __future__ import annotations

from typing import Protocol

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.models.spec import ParamSpec


class LayerFactory(Protocol):
    """Makes the modules that hold a model's weights; a quantisation scheme is one such factory."""

    dtype: str

    def linear(
        self, weight: ParamSpec, *, bias: bool, out_dtype: str | None = None
    ) -> nn.Module: ...

    def embedding(self, weight: ParamSpec) -> nn.Module: ...


def matmul_nt(x: Tensor, weight: Tensor, out_dtype: str | None) -> Tensor:
    """x [n, in] times weight [out, in] transposed -> [n, out]."""
    return op.matmul(x, op.permute_dims(weight, [1, 0]), out_dtype=out_dtype)


class Linear(nn.Module):
    """y = x W^T + b with W [out, in] stored as it is."""

    def __init__(
        self, shape: tuple[int, ...], dtype: str, *, bias: bool, out_dtype: str | None
    ) -> None:
        self.out_dtype = out_dtype
        self.weight = nn.Parameter(shape, dtype)
        self.bias = nn.Parameter((shape[0],), dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, in] -> [n, out]."""
        y = matmul_nt(x, self.weight, self.out_dtype)
        return y if self.bias is None else op.add(y, self.bias)


class Embedding(nn.Module):
    """Rows of W [vocab, hidden]; W transposed is the head of a model with tied embeddings."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.weight = nn.Parameter(shape, dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int32 [n] -> [n, hidden]."""
        return op.take(self.weight, ids, axis=0)

    def logits(self, x: Tensor) -> Tensor:
        """x: [n, hidden] -> float32 [n, vocab]."""
        return matmul_nt(x, self.weight, "float32")
