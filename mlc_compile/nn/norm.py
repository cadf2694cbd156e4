"""Normalisation: one module for each norm option of `models.options`."""

from __future__ import annotations

from collections.abc import Callable

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

LAYER_NORM = "layer_norm"


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32.

    Zhang & Sennrich, "Root Mean Square Layer Normalization", 2019.
    """

    def __init__(self, size: int, eps: float, dtype: str) -> None:
        self.eps = eps
        self.weight = nn.Parameter((size,), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> [..., size]; [n, heads, d] also where size is heads * d, each head then
        being normed by itself."""
        if len(x.shape) == 3 and int(x.shape[2]) != int(self.weight.shape[0]):
            return _normed(x, self.weight, None, self.eps, centre=False)
        return op.rms_norm(x, self.weight, axes=[-1], epsilon=self.eps)


class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last axis, in float32.

    Ba, Kiros & Hinton, "Layer Normalization", 2016.
    """

    def __init__(self, size: int, eps: float, dtype: str, *, weight: bool, bias: bool) -> None:
        self.eps = eps
        self.weight = nn.Parameter((size,), dtype) if weight else None
        self.bias = nn.Parameter((size,), dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """As RMSNorm."""
        return _normed(x, self.weight, self.bias, self.eps, centre=True)


def _normed(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centre: bool
) -> Tensor:
    """Over the last axis of x, of rank 2 or 3; weight and bias have its size, or that of the last
    two axes.

    Two passes: the variance as a difference of means would lose digits where the mean is large.
    """
    given = [t for t in (weight, bias) if t is not None]

    def compute(rows: te.Tensor, *tables: te.Tensor) -> te.Tensor:
        size, outer = rows.shape[-1], rows.shape[:-1]

        def total(name: str, value: Callable[..., tirx.Expr]) -> te.Tensor:
            k = te.reduce_axis((0, size), name="k")
            return te.compute(outer, lambda *i: te.sum(value(i, k), axis=k), name=name)

        def wide(i: tuple[tirx.Var, ...], k: tirx.Var) -> tirx.Expr:
            return rows[(*i, k)].astype("float32")

        mean = total("mean", wide) if centre else None

        def centred(i: tuple[tirx.Var, ...], k: tirx.Var) -> tirx.Expr:
            return wide(i, k) if mean is None else wide(i, k) - mean[i] / size

        square = total("square", lambda i, k: centred(i, k) * centred(i, k))

        def result(*index: tirx.Var) -> tirx.Expr:
            *outer_index, k = index
            at = tuple(outer_index)
            y = centred(at, k) * tirx.rsqrt(square[at] / size + tirx.const(eps, "float32"))
            values = [table[_element(at, k, table, size)].astype("float32") for table in tables]
            if weight is not None:
                y = y * values[0]
            if bias is not None:
                y = y + values[-1]
            return y.astype(rows.dtype)

        return te.compute(rows.shape, result, name=LAYER_NORM)

    attrs = {
        "mlc.op": LAYER_NORM,
        "mlc.eps": eps,
        "mlc.centre": int(centre),
        "mlc.weight": int(weight is not None),
    }
    return op.tensor_expr_op(compute, LAYER_NORM, [x, *given], attrs=attrs)


def _element(
    outer: tuple[tirx.Var, ...], k: tirx.Var, table: te.Tensor, size: tirx.Expr
) -> tirx.Expr:
    """Where a weight's element for [..., k] lies."""
    return k if int(table.shape[0]) == int(size) else outer[-1] * size + k
