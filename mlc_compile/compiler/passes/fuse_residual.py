"""residual + product becomes one kernel call for one row."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.fuse_linear import widened
from mlc_compile.compiler.passes.rewrite import CallRewriter, op_name
from mlc_compile.targets.kernels import Kernels


def _rule(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    if op_name(call) != "relax.add" or any(arg.ty != call.ty for arg in call.args):
        return None
    left, right = call.args
    for product, residual in ((right, left), (left, right)):
        fused = widened(rewriter, product, {"residual": True}, {"residual": residual}, call.ty)
        if fused is not None:
            return fused
    return None


def fuse_residual(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _rule).transform()
