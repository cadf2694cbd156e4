"""take(W, ids) along axis 0, W plain or `dequantize(...)`, becomes one kernel call.

Without it the whole embedding table is dequantised to fetch a few rows.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.compiler.passes.fuse_linear import packed_operands
from mlc_compile.compiler.passes.rewrite import CallRewriter, dtype_of, op_name, rows_of, shape_of
from mlc_compile.targets.kernels import EmbeddingSpec, Kernels


def _rule(rewriter: CallRewriter, call: relax.Call) -> relax.Expr | None:
    if op_name(call) != "relax.take" or call.attrs.axis != 0:
        return None
    table, ids = call.args
    vocab, hidden = shape_of(table)
    if not (isinstance(vocab, int) and isinstance(hidden, int)) or dtype_of(ids) != "int32":
        return None
    scheme, operands = packed_operands(rewriter, table)
    spec = EmbeddingSpec(vocab, hidden, scheme, dtype_of(table), rows_of(ids))
    kernel = rewriter.kernels.embedding(spec)
    if kernel is None:
        return None
    return rewriter.call_kernel(kernel, "embedding", [ids, *operands], [call.ty])


def fuse_embedding(mod: IRModule, kernels: Kernels) -> IRModule:
    return CallRewriter(mod, kernels, _rule).transform()
