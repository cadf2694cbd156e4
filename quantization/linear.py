"""TVM modules that consume packed group-quantised weights, and the factory a decoder is built with.

A quantised layer emits `dequantize` and then an ordinary matmul or take. The compiler's passes fuse
the pair (compiler/passes/fuse_linear.py); unfused, the pair is the slow reference of the fused
kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.models.params import ParamSpec
from mlc_compile.nn.linear import (
    Embedding,
    Experts,
    Linear,
    add_bias,
    expert_linear,
    matmul_nt,
)
from mlc_compile.quantization.policy import is_quantized, stored_layout, stored_params
from mlc_compile.quantization.scheme import QuantScheme

DEQUANTIZE = "dequantize"


def dequantize(
    q_weight: Tensor, q_scale: Tensor, shape: tuple[int, ...], scheme: QuantScheme, layout: str
) -> Tensor:
    """The weight [n, k] in the model dtype: (field - max_int) * scale (formula:
    quantization/group.py).

    q_weight is uint32 [n, words] and q_scale [n, groups]; both are transposed in layout "KN".
    """
    n, k = (tirx.IntImm("int64", extent) for extent in shape)
    kn = layout == "KN"

    def compute(words: te.Tensor, scales: te.Tensor) -> te.Tensor:
        def element(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            word, group = j // scheme.elems_per_word, j // scheme.group_size
            if kn:
                return _element(words[word, i], scales[group, i], j, scheme)
            return _element(words[i, word], scales[i, group], j, scheme)

        return te.compute((n, k), element, name=DEQUANTIZE)

    attrs = {"mlc.op": DEQUANTIZE, "mlc.scheme": scheme.name, "mlc.layout": layout}
    return op.tensor_expr_op(compute, DEQUANTIZE, [q_weight, q_scale], attrs=attrs)


def _element(word: tirx.Expr, scale: tirx.Expr, k: tirx.Expr, scheme: QuantScheme) -> tirx.Expr:
    """Element k of a row, from the word that holds it and the scale of its group."""
    shift = (k % scheme.elems_per_word * scheme.bits).astype("uint32")
    mask = tirx.const((1 << scheme.bits) - 1, "uint32")
    field = tirx.bitwise_and(tirx.shift_right(word, shift), mask)
    zero = tirx.const(scheme.max_int, scheme.model_dtype)
    return (field.astype(scheme.model_dtype) - zero) * scale


class GroupLinear(nn.Module):
    """y = x W^T + b with W [out, in] packed by `scheme`."""

    def __init__(
        self, weight: ParamSpec, scheme: QuantScheme, *, bias: bool, out_dtype: str | None
    ) -> None:
        words, scales = stored_params(weight, scheme)
        self.shape = weight.shape
        self.scheme = scheme
        self.layout = stored_layout(weight, scheme)
        self.out_dtype = out_dtype
        self.q_weight = nn.Parameter(words.shape, words.dtype)
        self.q_scale = nn.Parameter(scales.shape, scales.dtype)
        self.bias = nn.Parameter((weight.shape[0],), scheme.model_dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, in] -> [n, out]."""
        weight = dequantize(self.q_weight, self.q_scale, self.shape, self.scheme, self.layout)
        y = matmul_nt(x, weight, self.out_dtype)
        return y if self.bias is None else add_bias(y, self.bias)


class GroupEmbedding(nn.Module):
    """Rows of a packed W [vocab, hidden]; always in layout "NK" (notes/mlc-format.md)."""

    def __init__(self, weight: ParamSpec, scheme: QuantScheme) -> None:
        words, scales = stored_params(weight, scheme)
        self.shape = weight.shape
        self.scheme = scheme
        self.q_weight = nn.Parameter(words.shape, words.dtype)
        self.q_scale = nn.Parameter(scales.shape, scales.dtype)

    def _weight(self) -> Tensor:
        return dequantize(self.q_weight, self.q_scale, self.shape, self.scheme, "NK")

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int32 [n] -> [n, hidden]."""
        return op.take(self._weight(), ids, axis=0)

    def logits(self, x: Tensor) -> Tensor:
        """x: [n, hidden] -> float32 [n, vocab]."""
        return matmul_nt(x, self._weight(), "float32")


class GroupExperts(nn.Module):
    """As nn.linear.Experts, with W [experts, out, in] packed by `scheme`."""

    def __init__(self, weight: ParamSpec, scheme: QuantScheme) -> None:
        words, scales = stored_params(weight, scheme)
        self.shape = weight.shape
        self.scheme = scheme
        self.q_weight = nn.Parameter(words.shape, words.dtype)
        self.q_scale = nn.Parameter(scales.shape, scales.dtype)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x: [n or n * k, in], experts: int32 [n, k] -> [n * k, out]."""
        scheme = self.scheme

        def element(weight: Sequence[te.Tensor], at: Sequence[tirx.Expr]) -> tirx.Expr:
            words, scales = weight
            *row, k = at
            word, scale = words[(*row, k // scheme.elems_per_word)], (*row, k // scheme.group_size)
            return _element(word, scales[scale], k, scheme)

        weight = (self.q_weight, self.q_scale)
        return expert_linear(x, experts, weight, self.shape, element, scheme.name)


class SchemeLayers:
    """The `nn.linear.LayerFactory` of a quantisation scheme: policy.py says which weights it
    packs."""

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self.dtype: str = scheme.model_dtype

    def linear(self, weight: ParamSpec, *, bias: bool, out_dtype: str | None = None) -> nn.Module:
        if is_quantized(weight, self.scheme):
            return GroupLinear(weight, self.scheme, bias=bias, out_dtype=out_dtype)
        return Linear(weight.shape, self.dtype, bias=bias, out_dtype=out_dtype)

    def experts(self, weight: ParamSpec) -> nn.Module:
        if is_quantized(weight, self.scheme):
            return GroupExperts(weight, self.scheme)
        return Experts(weight.shape, self.dtype)

    def embedding(self, weight: ParamSpec) -> nn.Module:
        if is_quantized(weight, self.scheme):
            return GroupEmbedding(weight, self.scheme)
        return Embedding(weight.shape, self.dtype)
