"""act(gate) * up over the two halves of one split tensor becomes one kernel call."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.rewrite import CallRewriter, dtype_of, op_name, rows_of, shape_of
from mlc_compile.targets.kernels import Kernels

_OPERATORS = {"relax.nn.silu": "silu", "relax.nn.relu": "relu"}


def _activation(rewriter: CallRewriter, call: relax.Expr) -> tuple[str, relax.Expr] | None:
    """(name, what it is of), whether an operator or one of nn/activations.py's own."""
    if op_name(call) in _OPERATORS:
        return _OPERATORS[op_name(call)], call.args[0]
    function = rewriter.callee(call)
    if function is None or "mlc.activation" not in function.attrs:
        return None
    return str(function.attrs["mlc.activation"]), call.args[1].fields[0]


def gated_halves(rewriter: CallRewriter, call: relax.Call) -> tuple[str, relax.Expr] | None:
    """(activation, gate_up [n, 2 size]) where `call` is act(gate) * up of the two halves."""
    if op_name(call) != "relax.multiply":
        return None
    activated, up = (rewriter.definition(arg) for arg in call.args)
    found = _activation(rewriter, activated)
    if found is None or not isinstance(up, relax.TupleGetItem) or up.index != 1:
        return None
    activation, halved = found
    gate = rewriter.definition(halved)
    if not isinstance(gate, relax.TupleGetItem) or gate.index != 0:
        return None
    split = rewriter.definition(gate.tuple_value)
    if op_name(split) != "relax.split" or not split.same_as(rewriter.definition(up.tuple_value)):
        return None
    gate_up = split.args[0]
    size = shape_of(call)[1]
    if len(shape_of(gate_up)) != 2 or shape_of(gate_up)[1] != 2 * size:
        return None
    return activation, gate_up


def _rule(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    found = gated_halves(rewriter, call)
    if found is None:
        return None
    activation, gate_up = found
    size = shape_of(call)[1]
    assert isinstance(size, int)
    kernel = rewriter.kernels.gated(activation, size, dtype_of(call), rows_of(call))
    return None if kernel is None else rewriter.call_kernel(kernel, "gated", [gate_up], [call.ty])


def fuse_gated(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _rule).transform()
