"""TVM modules that consume packed group-quantised weights, and the factory a decoder is built with.

A quantised layer emits `dequantize` and then an ordinary matmul or take. The compiler's passes fuse
the pair (compiler/passes/fuse_linear.py); unfused, the pair is the slow reference of the fused
kernel.
"""

from __future__ import annotations

from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.models.spec import ParamSpec
from mlc_compile.nn.linear import Embedding, Linear, matmul_nt
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
    bits, per_word = scheme.bits, scheme.elems_per_word
    mask = tirx.const((1 << bits) - 1, "uint32")
    zero = tirx.const(scheme.max_int, scheme.model_dtype)
    kn = layout == "KN"

    def compute(words: te.Tensor, scales: te.Tensor) -> te.Tensor:
        def element(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            word = j // per_word
            group = j // scheme.group_size
            packed = words[word, i] if kn else words[i, word]
            scale = scales[group, i] if kn else scales[i, group]
            shift = (j % per_word * bits).astype("uint32")
            field = tirx.bitwise_and(tirx.shift_right(packed, shift), mask)
            return (field.astype(scheme.model_dtype) - zero) * scale

        return te.compute((n, k), element, name=DEQUANTIZE)

    attrs = {"mlc.op": DEQUANTIZE, "mlc.scheme": scheme.name, "mlc.layout": layout}
    return op.tensor_expr_op(compute, DEQUANTIZE, [q_weight, q_scale], attrs=attrs)


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
        return y if self.bias is None else op.add(y, self.bias)


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

    def embedding(self, weight: ParamSpec) -> nn.Module:
        if is_quantized(weight, self.scheme):
            return GroupEmbedding(weight, self.scheme)
        return Embedding(weight.shape, self.dtype)
