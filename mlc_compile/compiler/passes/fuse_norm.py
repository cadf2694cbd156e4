"""rms_norm becomes a kernel; together with the residual add before it when there is one.

The sum is a second result of the fused kernel, for it is also the next residual.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.rewrite import CallRewriter, dtype_of, op_name, rows_of, shape_of
from mlc_compile.targets.kernels import Kernels


class _NormRule:
    """A rule with a memory: the sums that fused kernels return in place of residual adds."""

    def __init__(self) -> None:
        self.sums: dict[relax.Var, relax.Var] = {}

    def __call__(self, rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
        if op_name(call) == "relax.nn.rms_norm" and len(shape_of(call.args[0])) == 2:
            return self._norm(rewriter, call)
        args = [self.sums.get(a, a) if isinstance(a, relax.Var) else a for a in call.args]
        if all(new is old for new, old in zip(args, call.args, strict=True)):
            return None
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _norm(self, rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
        x, weight = call.args
        size, eps = shape_of(x)[1], float(call.attrs.epsilon)
        dtype, rows, kernels = dtype_of(x), rows_of(x), rewriter.kernels
        assert isinstance(size, int)
        total = rewriter.definition(x)
        if op_name(total) == "relax.add" and all(a.ty == x.ty for a in total.args):
            kernel = kernels.add_rms_norm(size, eps, dtype, rows)
            if kernel is not None:
                args, types = [*total.args, weight], [call.ty, call.ty]
                pair = rewriter.builder_.emit(
                    rewriter.call_kernel(kernel, "add_rms_norm", args, types)
                )
                self.sums[x] = rewriter.builder_.emit(relax.TupleGetItem(pair, 1))
                return relax.TupleGetItem(pair, 0)
        kernel = kernels.rms_norm(size, eps, dtype, rows)
        if kernel is None:
            return None
        return rewriter.call_kernel(kernel, "rms_norm", [x, weight], [call.ty])


def fuse_norm(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _NormRule()).transform()
