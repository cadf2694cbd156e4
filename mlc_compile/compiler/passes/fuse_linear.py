"""matmul(x, permute_dims(W)) [+ bias], W plain or `dequantize(...)`, becomes one kernel call.

Without it the whole weight is materialised in the model dtype on every call.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.rewrite import (
    CallRewriter,
    dtype_of,
    op_name,
    rows_of,
    shape_of,
)
from mlc_compile.quantization.linear import DEQUANTIZE
from mlc_compile.quantization.scheme import Layout, QuantScheme, get_scheme
from mlc_compile.targets.kernels import Kernels, LinearSpec


def _biased(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    if op_name(call) != "relax.add":
        return None
    product, bias = rewriter.definition(call.args[0]), call.args[1]
    if op_name(product) != "relax.matmul" or len(shape_of(bias)) != 1:
        return None
    return _linear(rewriter, product, bias)


def _plain(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    return _linear(rewriter, call, None) if op_name(call) == "relax.matmul" else None


def _linear(
    rewriter: CallRewriter, matmul: relax.Call, bias: relax.Expr | None
) -> relax.Expr | None:
    x, transposed = matmul.args[0], rewriter.definition(matmul.args[1])
    if op_name(transposed) != "relax.permute_dims" or len(shape_of(x)) != 2:
        return None
    weight = transposed.args[0]
    out_features, in_features = shape_of(weight)
    if not (isinstance(out_features, int) and isinstance(in_features, int)):
        return None
    scheme, operands = packed_operands(rewriter, weight)
    spec = LinearSpec(
        in_features=in_features,
        out_features=out_features,
        scheme=scheme,
        x_dtype=dtype_of(x),
        out_dtype=dtype_of(matmul),
        has_bias=bias is not None,
        rows=rows_of(x),
        weight_dtype=dtype_of(weight) if scheme is None else None,
        bias_dtype=None if bias is None else dtype_of(bias),
    )
    kernel = rewriter.kernels.linear(spec)
    if kernel is None:
        return None
    name = f"linear_{out_features}x{in_features}" + ("" if spec.rows is None else "_gemv")
    args = [x, *operands, *([] if bias is None else [bias])]
    return rewriter.call_kernel(kernel, name, args, [matmul.ty])


def packed_operands(
    rewriter: CallRewriter, weight: relax.Expr
) -> tuple[QuantScheme | None, list[relax.Expr]]:
    """(scheme, [q_weight, q_scale]) behind a `dequantize` call; (None, [weight]) of a plain weight.

    The scheme's layout is that of this weight: a tied embedding of a "KN" scheme is "NK".
    """
    call = rewriter.definition(weight)
    func = rewriter.callee(call)
    if func is None or func.attrs is None or func.attrs.get("mlc.op") != DEQUANTIZE:
        return None, [weight]
    layout: Layout = "KN" if str(func.attrs["mlc.layout"]) == "KN" else "NK"
    scheme = replace(get_scheme(str(func.attrs["mlc.scheme"])), layout=layout)
    return scheme, list(call.args[1].fields)


def fuse_linear(mod: IRModule, kernels: Kernels) -> IRModule:
    """Sums with a bias first: once a product is a kernel call, its bias can no longer join it."""
    for rule in (_biased, _plain):
        mod = CallRewriter(mod, kernels, rule).transform()
    return mod
