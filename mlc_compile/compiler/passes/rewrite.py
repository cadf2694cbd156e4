"""What the fusing passes share: a mutator that can look through bindings and call a target's
kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import ir, relax, tirx
from tvm.ir import IRModule
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.tirx import PrimFunc

from mlc_compile.targets.kernels import Kernels


def op_name(expr: relax.Expr | None) -> str:
    """ "relax.add" for a call of that operator, the empty string for anything else."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, ir.Op):
        return str(expr.op.name)
    return ""


def shape_of(expr: relax.Expr) -> list[int | tirx.Expr]:
    """The extents of a tensor expression; static ones as int."""
    return [int(e) if isinstance(e, tirx.IntImm) else e for e in expr.ty.shape.values]


def rows_of(expr: relax.Expr) -> int | None:
    """The static number of rows of a [n, ...] tensor, None when symbolic."""
    rows = shape_of(expr)[0]
    return rows if isinstance(rows, int) else None


def dtype_of(expr: relax.Expr) -> str:
    return str(expr.ty.dtype)


class MadeOnce:
    """A target's kernels, each made once: every layer asks for the same ones."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def __getattr__(self, name: str) -> Any:
        made = functools.cache(getattr(self._kernels, name))
        setattr(self, name, made)
        return made


@mutator
class CallRewriter(PyExprMutator):
    """Visits every call of every Relax function and asks `rule` for what takes its place.

    `rule(rewriter, call)` returns an expression, or None to keep the call. TVM's mutators can't be
    inherited from, so a pass is a rule and not a subclass.
    """

    def __init__(self, mod: IRModule, kernels: Kernels, rule: Rule) -> None:
        super().__init__(mod)
        self.mod = mod
        self.kernels = kernels
        self.rule = rule
        self._added: dict[PrimFunc, relax.GlobalVar] = {}

    def transform(self) -> IRModule:
        """The module with every Relax function rewritten and dead bindings removed."""
        for gv, func in self.mod.functions_items():
            if isinstance(func, relax.Function):
                updated = self.visit_expr(func)
                self.builder_.update_func(gv, relax.analysis.remove_all_unused(updated))
        return self.builder_.get()

    def visit_call_(self, call: relax.Call) -> relax.Expr:
        call = self.visit_expr_post_order(call)
        rewritten = self.rule(self, call)
        return call if rewritten is None else rewritten

    def definition(self, expr: relax.Expr) -> relax.Expr:
        """The expression a variable is bound to, followed through aliases; else the expression
        itself."""
        while isinstance(expr, relax.Var):
            bound = self.lookup_binding(expr)
            if bound is None:
                return expr
            expr = bound
        return expr

    def callee(self, expr: relax.Expr) -> PrimFunc | None:
        """The PrimFunc of a call_tir expression."""
        if op_name(expr) != "relax.call_tir":
            return None
        func = self.builder_.get()[expr.args[0]]
        return func if isinstance(func, PrimFunc) else None

    def call_kernel(
        self,
        kernel: PrimFunc,
        name: str,
        args: Sequence[relax.Expr],
        outputs: Sequence[relax.Type],
        attrs: Mapping[str, str] | None = None,
    ) -> relax.Expr:
        """call_tir of a kernel added to the module, with these attributes; an equal kernel is added
        once.

        It has no symbol of its own yet, so that it goes when a later pass replaces its calls.
        """
        gv = self._added.get(kernel)
        if gv is None:
            private = kernel.without_attr("global_symbol")
            private = private.with_attr({"op_pattern": 8, **(attrs or {})})  # opaque: fused already
            gv = self._added[kernel] = self.builder_.add_func(private, name)
        out = list(outputs)
        return relax.call_tir(gv, list(args), out[0] if len(out) == 1 else out)


Rule = Callable[[CallRewriter, relax.Call], "relax.Expr | None"]
