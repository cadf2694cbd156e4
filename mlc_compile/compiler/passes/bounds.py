"""Declare the largest values of the symbolic extents, so that memory is planned to constants."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.config import CompileConfig


def upper_bounds(config: CompileConfig) -> dict[str, int]:
    """The largest number of tokens (`seq_len`), sequences (`batch_size`) and rows of the stack (`n`).

    A row of the stack is a token of a prefill chunk or a sequence of a batch.
    """
    return {
        "seq_len": config.prefill_chunk_size,
        "batch_size": config.max_batch_size,
        "n": max(config.prefill_chunk_size, config.max_batch_size),
    }


def attach_bounds(mod: IRModule, config: CompileConfig) -> IRModule:
    """`upper_bounds` as attributes of every Relax function."""
    bounds = upper_bounds(config)
    updated = IRModule(mod.functions, attrs=mod.attrs)
    for gv, func in mod.functions_items():
        if isinstance(func, relax.Function):
            updated[gv] = func.with_attr("tir_var_upper_bound", bounds).with_attr(
                "tir_non_negative_var", ["vocab_size"]
            )
    return updated
