"""matmul(x, permute_dims(W)) [+ bias], W plain or `dequantize(...)`, becomes one kernel call.

Without it the whole weight is materialised in the model dtype on every call. The kernel carries its
specification as an attribute, so that later passes can ask for one that does more (`widened`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

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

SPEC = "mlc.linear"


def call_linear(
    rewriter: CallRewriter, spec: LinearSpec, args: list[relax.Expr], out: relax.Type
) -> relax.Expr | None:
    """A call of the target's kernel for `spec`, None where it has none."""
    kernel = rewriter.kernels.linear(spec)
    if kernel is None:
        return None
    parts = {
        "_gemv": spec.rows == 1,
        "_norm": spec.norm_eps is not None,
        "_gated": spec.activation is not None,
        "_residual": spec.residual,
    }
    name = f"linear_{spec.out_features}x{spec.in_features}"
    name += "".join(part for part, is_in in parts.items() if is_in)
    attrs = {SPEC: _to_text(spec)} if spec.rows == 1 else {}
    return rewriter.call_kernel(kernel, name, args, [out], attrs)


def widened(
    rewriter: CallRewriter,
    product: relax.Expr,
    changes: Mapping[str, Any],
    operands: Mapping[str, relax.Expr],
    out: relax.Type,
) -> relax.Expr | None:
    """A call that does more than `product`, a variable bound to a linear kernel's call, does.

    changes: of the LinearSpec; operands: arguments that come in or are replaced, by name. None
    where `product` is no one-row linear kernel or has one of the changes already, or where the
    target has no kernel that does it all.
    """
    call = rewriter.definition(product)
    func = rewriter.callee(call)
    if func is None or func.attrs is None or SPEC not in func.attrs:
        return None
    spec = _from_text(str(func.attrs[SPEC]))
    if any(getattr(spec, name) for name in changes):
        return None
    try:
        wider = replace(spec, **changes)
    except ValueError:  # the fields exclude each other
        return None
    named = {name: arg for (name, _, _), arg in zip(spec.arguments(1), call.args[1], strict=False)}
    named.update(operands)
    return call_linear(
        rewriter, wider, [named[name] for name, _, _ in wider.arguments(1)[:-1]], out
    )


def _to_text(spec: LinearSpec) -> str:
    fields = asdict(spec)
    if spec.scheme is not None:
        fields["scheme"] = [spec.scheme.name, spec.scheme.layout]
    return json.dumps(fields)


def _from_text(text: str) -> LinearSpec:
    fields = json.loads(text)
    if fields["scheme"] is not None:
        name, layout = fields["scheme"]
        fields["scheme"] = replace(get_scheme(name), layout=layout)
    return LinearSpec(**fields)


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
    args = [x, *operands, *([] if bias is None else [bias])]
    return call_linear(rewriter, spec, args, matmul.ty)


def packed_operands(
    rewriter: CallRewriter, weight: relax.Expr
) -> tuple[QuantScheme | None, list[relax.Expr]]:
    """(scheme, [q_weight, q_scale, ...]) behind a `dequantize` call; (None, [weight]) of a plain
    weight.

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
