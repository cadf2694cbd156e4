"""The rms_norm of a one-row product's input moves into the product's kernel.

The norm stays where something else reads its result, and the sum that it reads stays in any case.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.fuse_linear import widened
from mlc_compile.compiler.passes.rewrite import CallRewriter, dtype_of, op_name, shape_of
from mlc_compile.targets.kernels import Kernels


def _rule(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    if rewriter.callee(call) is None or not isinstance(call.args[1], relax.Tuple):
        return None
    norm = rewriter.definition(call.args[1].fields[0])
    if op_name(norm) != "relax.nn.rms_norm" or len(shape_of(norm.args[0])) != 2:
        return None
    x, weight = norm.args
    if dtype_of(weight) != dtype_of(x):
        return None
    changes = {"norm_eps": float(norm.attrs.epsilon)}
    return widened(rewriter, call, changes, {"x": x, "norm_weight": weight}, call.ty)


def fuse_linear_norm(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _rule).transform()
