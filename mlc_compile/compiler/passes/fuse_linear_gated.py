"""act(gate) * up moves into the kernel of the one-row product that gives gate and up."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.fuse_gated import gated_halves
from mlc_compile.compiler.passes.fuse_linear import widened
from mlc_compile.compiler.passes.rewrite import CallRewriter
from mlc_compile.targets.kernels import Kernels


def _rule(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    found = gated_halves(rewriter, call)
    if found is None or found[0] != "silu":  # LinearSpec.activation knows no other
        return None
    activation, gate_up = found
    return widened(rewriter, gate_up, {"activation": activation}, {}, call.ty)


def fuse_linear_gated(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _rule).transform()
