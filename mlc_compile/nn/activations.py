"""Activations by the names that config.json's `hidden_act` gives them, and the cap of logits.

- Each is one elementwise TE operation, float32 inside whatever the dtype, that fusion takes into
  its neighbours; only silu and relu, which lower well everywhere, are Relax operations.
- Nothing overflows, and exp2, tanh and erfc are ours: WGSL's and Metal's lose digits, overflow or
  do not exist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.targets.cpu_kernels import _attn_math as math
from mlc_compile.targets.cpu_kernels._attn_math import f32, let, polynomial
from mlc_compile.targets.cpu_kernels.elementwise import ERFC_POLYNOMIAL

ACTIVATION = "activation"
"""The attribute `mlc.op` of what is emitted here; `mlc.activation` says which."""

Formula = Callable[[tirx.Expr], tirx.Expr]

F32 = "float32"
OPAQUE = 8
"""The `op_pattern` of what fusion leaves alone."""

LARGEST = 126.0
"""2 to this power, and 1 more, is finite."""


def _exp2(x: tirx.Expr) -> tirx.Expr:
    return math.exp2(tirx.min(x, f32(LARGEST)))


def _gate(x: tirx.Expr, slope: tirx.Expr) -> tirx.Expr:
    """x sigmoid(slope), without cancellation at either end."""
    return x / (f32(1) + _exp2(slope * f32(-math.LOG2_E)))


def _quick_gelu(x: tirx.Expr) -> tirx.Expr:
    return _gate(x, x * f32(1.702))


def _gelu_tanh(x: tirx.Expr) -> tirx.Expr:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))); (1 + tanh(u)) / 2 is sigmoid(2u)."""
    cubic = x * (f32(1.5957691216057308) + f32(0.07135481282562302) * x * x)
    return let(cubic, lambda slope: _gate(x, slope), F32)


def _gelu(x: tirx.Expr) -> tirx.Expr:
    """x/2 (1 + erf(x / sqrt(2))) through erfc, so that the negative tail keeps its digits.

    erfc is that of targets/cpu_kernels/elementwise.py, with our own polynomial.
    """

    def from_size(a: tirx.Expr) -> tirx.Expr:
        def tail(t: tirx.Expr) -> tirx.Expr:
            exponent = (polynomial(ERFC_POLYNOMIAL, t) - a * a) * f32(math.LOG2_E)
            return let(exponent, lambda e: t * _exp2(e), F32)

        return let(f32(1) / (f32(1) + f32(0.5) * a), tail, F32)

    erfc = let(tirx.max(x, f32(0) - x) * f32(0.7071067811865476), from_size, F32)

    def gelu(tail: tirx.Expr) -> tirx.Expr:
        return f32(0.5) * x * tirx.Select(x > f32(0), f32(2) - tail, tail)

    return let(erfc, gelu, F32)


def _relu2(x: tirx.Expr) -> tirx.Expr:
    return let(tirx.max(x, f32(0)), lambda y: y * y, F32)


def _wide(value: tirx.Expr) -> tirx.Expr:
    """`value` as float32; bfloat16 by its bits, because TVM 0.27 forgets, where a target has no
    bfloat16, to lower a cast within the value of a `Let`, and then casts the bits as a number.

    What comes before must not be inlined here for the same reason: see `_elementwise`.
    """
    if str(value.ty.dtype) != "bfloat16":
        return value.astype(F32)
    bits = tirx.reinterpret("uint16", value).astype("uint32")
    return tirx.reinterpret(F32, tirx.shift_left(bits, tirx.const(16, "uint32")))


def _elementwise(x: Tensor, name: str, formula: Formula, attrs: dict[str, str | int]) -> Tensor:
    """`formula` of every element as float32, rounded to the dtype of `x` once.

    Only bfloat16 is not fused.
    """

    def compute(tensor: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tirx.Expr:
            value = let(_wide(tensor(*index)), formula, F32)
            return value.astype(tensor.dtype)

        return te.compute(tensor.shape, element, name=name)

    if x.dtype == "bfloat16":
        attrs = {**attrs, "op_pattern": OPAQUE}
    return op.tensor_expr_op(compute, name, [x], attrs=attrs)


def _activation(name: str, formula: Formula) -> Callable[[Tensor], Tensor]:
    attrs: dict[str, str | int] = {"mlc.op": ACTIVATION, "mlc.activation": name}
    return lambda x: _elementwise(x, name, formula, attrs)


_GELU_TANH = _activation("gelu_pytorch_tanh", _gelu_tanh)

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": op.silu,
    "swish": op.silu,
    "gelu": _activation("gelu", _gelu),
    "gelu_new": _GELU_TANH,
    "gelu_fast": _GELU_TANH,
    "gelu_pytorch_tanh": _GELU_TANH,
    "quick_gelu": _activation("quick_gelu", _quick_gelu),
    "relu": op.relu,
    "relu2": _activation("relu2", _relu2),
}


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """cap * tanh(x / cap) (Gemma 2, arXiv 2408.00118)."""

    def capped(value: tirx.Expr) -> tirx.Expr:
        # tanh(10) is 1; beyond it, tanh's polynomial for small numbers would overflow.
        bounded = tirx.max(tirx.min(value * f32(1 / cap), f32(10)), f32(-10))
        return f32(cap) * math.tanh(bounded)

    return _elementwise(x, "soft_cap", capped, {})
