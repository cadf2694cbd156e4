"""Products with the chosen experts' weights become kernel calls.

Without it one thread computes each element of the output, weights unpacked over and over.
"""

from __future__ import annotations

from dataclasses import replace

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.rewrite import CallRewriter, dtype_of, shape_of
from mlc_compile.nn.linear import EXPERT_LINEAR
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.targets.kernels import ExpertLinearSpec, Kernels


def _rule(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    func = rewriter.callee(call)
    if func is None or func.attrs is None or func.attrs.get("mlc.op") != EXPERT_LINEAR:
        return None
    args = list(call.args[1].fields)
    x, experts, weight = args[:3]
    rows, per_token = shape_of(experts)
    name = str(func.attrs["mlc.scheme"])
    count, in_features = shape_of(weight)[0], shape_of(x)[1]
    out_features = shape_of(call)[1]
    assert isinstance(per_token, int) and isinstance(count, int)
    assert isinstance(in_features, int) and isinstance(out_features, int)
    spec = ExpertLinearSpec(
        experts=count,
        per_token=per_token,
        in_features=in_features,
        out_features=out_features,
        scheme=replace(get_scheme(name), layout="NK") if name else None,
        x_dtype=dtype_of(x),
        out_dtype=dtype_of(call),
        shared_x=bool(func.attrs["mlc.shared_x"]),
        rows=1 if rows == 1 else None,
        weight_dtype=None if name else dtype_of(weight),
    )
    kernel = rewriter.kernels.expert_linear(spec)
    if kernel is None:
        return None
    label = f"experts_{out_features}x{in_features}" + ("_gemv" if spec.rows == 1 else "")
    if len(kernel.params) == len(spec.arguments(1)):
        return rewriter.call_kernel(kernel, label, args, [call.ty])
    _, shape, dtype = spec.workspace(rows)
    both = rewriter.call_kernel(kernel, label, args, [call.ty, relax.TensorType(shape, dtype)])
    return relax.TupleGetItem(rewriter.builder_.emit(both), 0)


def fuse_experts(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _rule).transform()
