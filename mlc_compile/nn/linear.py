"""Linear layers and embeddings on plain (unquantised) weights, and how a decoder asks for them.

Activations are two-dimensional everywhere inside a decoder: [n, features], n tokens of any
sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op
from tvm_ffi import structural_equal

from mlc_compile.models.params import ParamSpec

EXPERT_LINEAR = "expert_linear"


class LayerFactory(Protocol):
    """Makes the modules that hold a model's weights; a quantisation scheme is one such factory."""

    dtype: str

    def linear(
        self, weight: ParamSpec, *, bias: bool, out_dtype: str | None = None
    ) -> nn.Module: ...

    def embedding(self, weight: ParamSpec) -> nn.Module: ...

    def experts(self, weight: ParamSpec) -> nn.Module:
        """The module is called as (x, experts); see `Experts`."""


def matmul_nt(x: Tensor, weight: Tensor, out_dtype: str | None) -> Tensor:
    """x [n, in] times weight [out, in] transposed -> [n, out]."""
    return op.matmul(x, op.permute_dims(weight, [1, 0]), out_dtype=out_dtype)


def expert_linear(
    x: Tensor,
    experts: Tensor,
    weight: Sequence[Tensor],
    shape: tuple[int, ...],
    element: Callable[[Sequence[te.Tensor], Sequence[tirx.Expr]], tirx.Expr],
    scheme: str = "",
) -> Tensor:
    """Row p of the result is x[row of p] times the weight of expert experts[p // k, p % k].

    x: [n, in], a row for each token, or [n * k, in], one for each pair p. experts: int32 [n, k].
    shape: [experts, out, in] of the weight, of which element(weight, (e, o, i)) gives one value.
    The pass fuse_experts (compiler/passes/fuse_experts.py) looks for what is emitted here.
    """
    per_token = int(experts.shape[1])
    rows = [tensor._expr.ty.shape.values[0] for tensor in (x, experts)]
    shared_x = per_token > 1 and structural_equal(*rows)
    _, width, depth = (tirx.IntImm("int64", extent) for extent in shape)

    def compute(x: te.Tensor, experts: te.Tensor, *weight: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, depth), "k")

        def product(p: tirx.Var, o: tirx.Var) -> tirx.Expr:
            token, slot = p // per_token, p % per_token
            value = element(weight, (experts[token, slot], o, k)).astype("float32")
            return te.sum(x[token if shared_x else p, k].astype("float32") * value, axis=k)

        rows = experts.shape[0] * per_token
        total = te.compute((rows, width), product, name=EXPERT_LINEAR)
        if x.dtype == "float32":
            return total
        return te.compute((rows, width), lambda *at: total[at].astype(x.dtype), name="rounded")

    attrs = {"mlc.op": EXPERT_LINEAR, "mlc.scheme": scheme, "mlc.shared_x": int(shared_x)}
    return op.tensor_expr_op(compute, EXPERT_LINEAR, [x, experts, *weight], attrs=attrs)


class Experts(nn.Module):
    """Products with the chosen of many weights: W [experts, out, in] stored as it is."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.weight = nn.Parameter(shape, dtype)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x: [n or n * k, in], experts: int32 [n, k] -> [n * k, out]; see `expert_linear`."""
        shape = tuple(int(extent) for extent in self.weight.shape)
        return expert_linear(x, experts, (self.weight,), shape, lambda weight, at: weight[0][at])


def add_bias(y: Tensor, bias: Tensor) -> Tensor:
    """y [n, out] + bias [out], which may be of another dtype (logits are float32)."""
    return op.add(y, bias if bias.dtype == y.dtype else op.astype(bias, y.dtype))


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
        return y if self.bias is None else add_bias(y, self.bias)


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
