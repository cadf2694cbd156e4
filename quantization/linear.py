"""TVM modules that consume packed group-quantised weights, and the factory a decoder is built with.

A quantised layer emits `dequantize` and then an ordinary matmul or take. The compiler's passes fuse
the pair (compiler/passes/fuse_linear.py); unfused, the pair is the slow reference of the fused
kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from mlc_compile.targets import codes
from mlc_compile.targets.kernels import along

DEQUANTIZE = "dequantize"


def dequantize(
    packed: Sequence[Tensor], shape: tuple[int, ...], scheme: QuantScheme, layout: str
) -> Tensor:
    """The weight [n, k] in the model dtype (formulas: quantization/group.py).

    packed: q_weight uint32 [n, words], q_scale [n, groups] and, of affine codes, q_zero uint32
    [n, words of zero points]; all transposed in layout "KN".
    """
    n, k = (tirx.IntImm("int64", extent) for extent in shape)
    scheme = along(scheme, shape[1])

    def compute(*tensors: te.Tensor) -> te.Tensor:
        def element(i: tirx.Var, j: tirx.Var) -> tirx.Expr:
            def load(tensor: te.Tensor) -> Callable[[tirx.Expr], tirx.Expr]:
                return lambda at: tensor(at, i) if layout == "KN" else tensor(i, at)

            return _element(j, scheme, [load(tensor) for tensor in tensors])

        return te.compute((n, k), element, name=DEQUANTIZE)

    attrs = {"mlc.op": DEQUANTIZE, "mlc.scheme": scheme.name, "mlc.layout": layout}
    return op.tensor_expr_op(compute, DEQUANTIZE, list(packed), attrs=attrs)


def _element(
    k: tirx.Expr, scheme: QuantScheme, loads: Sequence[Callable[[tirx.Expr], tirx.Expr]]
) -> tirx.Expr:
    """Element k of a row, from what loads from that row of each stored tensor."""
    words, scales, *zeros = loads
    return codes.weight_at(k, scheme, words, scales, zeros[0] if zeros else words)


class _Packed(nn.Module):
    """Holds what is stored of a weight: `q_weight`, `q_scale`, and `q_zero` of affine codes."""

    def __init__(self, weight: ParamSpec, scheme: QuantScheme) -> None:
        self.shape = weight.shape
        self.scheme = scheme.of(weight)
        self.layout = stored_layout(weight, scheme)
        self._stored = [stored.name.rpartition(".")[2] for stored in stored_params(weight, scheme)]
        for name, stored in zip(self._stored, stored_params(weight, scheme), strict=True):
            setattr(self, name, nn.Parameter(stored.shape, stored.dtype))

    @property
    def packed(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._stored]

    def dequantized(self) -> Tensor:
        """The weight in the model dtype."""
        return dequantize(self.packed, self.shape, self.scheme, self.layout)


class GroupLinear(_Packed):
    """y = x W^T + b with W [out, in] packed by `scheme`."""

    def __init__(
        self, weight: ParamSpec, scheme: QuantScheme, *, bias: bool, out_dtype: str | None
    ) -> None:
        super().__init__(weight, scheme)
        self.out_dtype = out_dtype
        self.bias = nn.Parameter((weight.shape[0],), scheme.model_dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, in] -> [n, out]."""
        y = matmul_nt(x, self.dequantized(), self.out_dtype)
        return y if self.bias is None else add_bias(y, self.bias)


class GroupEmbedding(_Packed):
    """Rows of a packed W [vocab, hidden]; always in layout "NK" (notes/mlc-format.md)."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids: int32 [n] -> [n, hidden]."""
        return op.take(self.dequantized(), ids, axis=0)

    def logits(self, x: Tensor) -> Tensor:
        """x: [n, hidden] -> float32 [n, vocab]."""
        return matmul_nt(x, self.dequantized(), "float32")


class GroupExperts(_Packed):
    """As nn.linear.Experts, with W [experts, out, in] packed by `scheme`."""

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """x: [n or n * k, in], experts: int32 [n, k] -> [n * k, out]."""
        scheme = along(self.scheme, self.shape[-1])

        def element(weight: Sequence[te.Tensor], at: Sequence[tirx.Expr]) -> tirx.Expr:
            *row, k = at

            def load(tensor: te.Tensor) -> Callable[[tirx.Expr], tirx.Expr]:
                return lambda i: tensor(*row, i)

            return _element(k, scheme, [load(tensor) for tensor in weight])

        return expert_linear(x, experts, self.packed, self.shape, element, scheme.name)


class SchemeLayers:
    """The `nn.linear.LayerFactory` of a quantisation scheme: policy.py says which weights it packs,
    the scheme's overrides say how each."""

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
