"""concat(rms_norm(q), rms_norm(k), v) of one split qkv tensor becomes one kernel call."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.rewrite import CallRewriter, dtype_of, op_name, rows_of, shape_of
from mlc_compile.targets.kernels import Kernels


def _rule(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    if op_name(call) != "relax.concat":
        return None
    parts = rewriter.definition(call.args[0])
    fields = list(parts.fields) if isinstance(parts, relax.Tuple) else []
    if len(fields) != 3:
        return None
    norms = [rewriter.definition(field) for field in fields[:2]]
    if any(op_name(norm) != "relax.nn.rms_norm" for norm in norms):
        return None
    items = [rewriter.definition(norm.args[0]) for norm in norms] + [rewriter.definition(fields[2])]
    if any(not isinstance(item, relax.TupleGetItem) for item in items):
        return None
    splits = [rewriter.definition(item.tuple_value) for item in items]
    in_order = [item.index for item in items] == [0, 1, 2]
    if op_name(splits[0]) != "relax.split" or not in_order:
        return None
    if any(not split.same_as(splits[0]) for split in splits[1:]):
        return None
    qkv = splits[0].args[0]
    heads = (int(shape_of(fields[0])[1]), int(shape_of(fields[1])[1]), int(shape_of(qkv)[2]))
    kernel = rewriter.kernels.qk_norm(
        heads, float(norms[0].attrs.epsilon), dtype_of(qkv), rows_of(qkv)
    )
    if kernel is None:
        return None
    weights = [norm.args[1] for norm in norms]
    return rewriter.call_kernel(kernel, "qk_norm", [qkv, *weights], [call.ty])


def fuse_qk_norm(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _rule).transform()
