"""Rows of a packed or plain embedding table on a GPU, as a TIR PrimFunc.

One thread an element: neighbours share a word, and write side by side. The result is
(q - M) * scale in float32, rounded once to the model dtype, which is what the format's own
arithmetic in the model dtype gives (quantization/group.py).
"""

from __future__ import annotations

from tvm import tirx

from mlc_compile.targets.gpu_kernels._emit import (
    F32,
    I32,
    U32,
    Argument,
    Buffer,
    Expr,
    bind,
    build_kernel,
    cast,
    each_element,
    i32,
    load,
    load_f32,
    store,
    store_float,
    symbol,
    u32,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kernels import EmbeddingSpec


def embedding_kernel(spec: EmbeddingSpec, *, device: GPUDevice) -> tirx.PrimFunc | None:
    """(ids int32 [n], q_weight [vocab, words], q_scale [vocab, groups] | weight, out [n, hidden]).

    Ids must be in 0..vocab-1; they are not checked, as in any gather on this path. None for
    bfloat16.
    """
    scheme, hidden = spec.scheme, spec.hidden
    if "bfloat16" in (spec.dtype, scheme.model_dtype if scheme else None):
        return None
    rows = 1 if spec.rows == 1 else symbol("n")
    ids: Argument = ("ids", (rows,), I32)
    out: Argument = ("out", (rows, hidden), spec.dtype)
    if scheme is None:

        def copy(ids: Buffer, table: Buffer, out: Buffer) -> None:
            each_element(
                device,
                rows,
                hidden,
                lambda row, at: store(out, [row, at], load(table, bind(load(ids, row)), at)),
            )

        return build_kernel(
            "embedding", [ids, ("weight", (spec.vocab, hidden), spec.dtype), out], copy
        )

    per_word, group, bits = scheme.elems_per_word, scheme.group_size, scheme.bits

    def unpack(ids: Buffer, table: Buffer, scales: Buffer, out: Buffer) -> None:
        def element(row: Expr, at: Expr) -> None:
            source = bind(load(ids, row))
            word = bind(tirx.truncdiv(at, i32(per_word)))
            shift = cast((at - word * i32(per_word)) * i32(bits), U32)
            field = tirx.shift_right(load(table, source, word), shift)
            code = cast(tirx.bitwise_and(field, u32((1 << bits) - 1)), I32)
            value = cast(code - i32(scheme.max_int), F32)
            scale = load_f32(scales, source, tirx.truncdiv(at, i32(group)))
            store_float(out, [row, at], value * scale)

        each_element(device, rows, hidden, element)

    arguments: list[Argument] = [
        ids,
        ("q_weight", (spec.vocab, scheme.num_words(hidden)), scheme.storage_dtype),
        ("q_scale", (spec.vocab, scheme.num_groups(hidden)), scheme.model_dtype),
        out,
    ]
    return build_kernel("embedding", arguments, unpack)
