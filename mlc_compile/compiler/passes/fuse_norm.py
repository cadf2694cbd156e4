"""rms_norm and layer_norm become kernels; together with the residual add before them when there is
one.

The sum is a second result of the fused kernel, for it is also the next residual.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tvm import relax
from tvm.ir import IRModule
from tvm.tirx import PrimFunc

from mlc_compile.compiler.passes.rewrite import CallRewriter, dtype_of, op_name, rows_of, shape_of
from mlc_compile.nn.norm import LAYER_NORM
from mlc_compile.targets.kernels import Kernels, LayerNormSpec


class _NormRule:
    """A rule with a memory: the sums that fused kernels return in place of residual adds."""

    def __init__(self) -> None:
        self.sums: dict[relax.Var, relax.Var] = {}

    def __call__(self, rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
        if op_name(call) == "relax.nn.rms_norm" and len(shape_of(call.args[0])) == 2:
            return self._rms_norm(rewriter, call)
        function = rewriter.callee(call)
        if function is not None and function.attrs.get("mlc.op") == LAYER_NORM:
            return self._layer_norm(rewriter, call, function)
        args = [self._summed(a) for a in call.args]
        if all(new is old for new, old in zip(args, call.args, strict=True)):
            return None
        return relax.Call(call.op, args, call.attrs, call.ty_args)

    def _summed(self, expr: relax.Expr) -> relax.Expr:
        """The sum that a fused kernel has made already, or the expression itself."""
        if isinstance(expr, relax.Tuple):  # a kernel's arguments
            fields = [self._summed(field) for field in expr.fields]
            same = all(new is old for new, old in zip(fields, expr.fields, strict=True))
            return expr if same else relax.Tuple(fields)
        return self.sums.get(expr, expr) if isinstance(expr, relax.Var) else expr

    def _rms_norm(self, rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
        x, weight = call.args
        size, eps = shape_of(x)[1], float(call.attrs.epsilon)
        dtype, rows, kernels = dtype_of(x), rows_of(x), rewriter.kernels
        assert isinstance(size, int)
        return self._norm(
            rewriter,
            call,
            [x, weight],
            "rms_norm",
            lambda added: (kernels.add_rms_norm if added else kernels.rms_norm)(
                size, eps, dtype, rows
            ),
        )

    def _layer_norm(
        self, rewriter: CallRewriter, call: relax.Call, function: PrimFunc
    ) -> relax.Expr | None:
        x, *tables = call.args[1].fields
        *_, size = shape_of(x)
        heads = shape_of(x)[1] if len(shape_of(x)) == 3 else None
        assert isinstance(size, int) and (heads is None or isinstance(heads, int))
        if any(dtype_of(table) != dtype_of(x) for table in tables):
            return None
        weight = bool(function.attrs["mlc.weight"])
        spec = LayerNormSpec(
            size,
            float(function.attrs["mlc.eps"]),
            dtype_of(x),
            heads=heads,
            weight=weight,
            bias=len(tables) > weight,
            own_tables=bool(tables) and shape_of(tables[0])[0] != size,
            centre=bool(function.attrs["mlc.centre"]),
        )
        return self._norm(
            rewriter,
            call,
            [x, *tables],
            "layer_norm",
            lambda added: rewriter.kernels.layer_norm(replace(spec, added=added), rows_of(x)),
        )

    def _norm(
        self,
        rewriter: CallRewriter,
        call: relax.Call,
        args: list[relax.Expr],
        name: str,
        kernel_of: Callable[[bool], PrimFunc | None],
    ) -> relax.Expr | None:
        """The norm of args[0] as a kernel; `kernel_of(added)` makes it, if the target has it."""
        x, *tables = args
        summed = self._summed(x)
        total = rewriter.definition(x)
        if summed is x and op_name(total) == "relax.add" and all(a.ty == x.ty for a in total.args):
            kernel = kernel_of(True)
            if kernel is not None:
                types = [call.ty, call.ty]
                pair = rewriter.builder_.emit(
                    rewriter.call_kernel(kernel, f"add_{name}", [*total.args, *tables], types)
                )
                self.sums[x] = rewriter.builder_.emit(relax.TupleGetItem(pair, 1))
                return relax.TupleGetItem(pair, 0)
        kernel = kernel_of(False)
        if kernel is None:
            return None
        return rewriter.call_kernel(kernel, name, [summed, *tables], [call.ty])


def fuse_norm(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _NormRule()).transform()
