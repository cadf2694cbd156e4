"""Declare the largest values of the symbolic extents, so that memory is planned to constants."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from mlc_compile.config import CompileConfig

TOP_PROBS = 20  # most alternatives a chat API reports for one token


def upper_bounds(config: CompileConfig) -> dict[str, int]:
    """The largest values of the symbolic extents of nn/export.py and nn/sampling.py.

    A row of the transformer stack (`n`) is a token of a prefill chunk or a sequence of a batch.
    """
    chunk, batch = config.prefill_chunk_size, config.max_batch_size
    return {
        "seq_len": chunk,
        "batch_size": batch,
        "n": max(chunk, batch),
        "num_samples": batch,
        "num_seqs": batch,
        "num_positions": batch * TOP_PROBS,
        "num_tokens": batch * config.kv_tokens,
        "num_nodes": batch * chunk,
        "num_rows": max(chunk, batch),
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
