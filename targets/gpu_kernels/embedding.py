"""Rows of a packed or plain embedding table on a GPU, as a TIR PrimFunc.

One thread an element: neighbours share a word, and write side by side. The result is
(number - zero) * scale (targets/codes.py) in float32, rounded once to the model dtype, which is
what the format's own arithmetic in the model dtype gives (quantization/group.py).
"""

from __future__ import annotations

from tvm import tirx

from mlc_compile.targets import codes
from mlc_compile.targets.gpu_kernels._emit import (
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
)
from mlc_compile.targets.gpu_kernels._packed import zero_of
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kernels import EmbeddingSpec


def embedding_kernel(spec: EmbeddingSpec, *, device: GPUDevice) -> tirx.PrimFunc | None:
    """(ids int32 [n], the table's buffers, out [n, hidden]).

    Ids must be in 0..vocab-1; they are not checked, as in any gather on this path. None where the
    device lacks bfloat16 and the table has it.
    """
    scheme, hidden = spec.scheme, spec.hidden
    if "bfloat16" in (spec.dtype, scheme.model_dtype if scheme else None) and not device.bfloat16:
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

        return build_kernel("embedding", [ids, *spec.table_shapes(), out], copy)

    per_word = scheme.elems_per_word

    def unpack(ids: Buffer, *others: Buffer) -> None:
        *table, out = others

        def element(row: Expr, at: Expr) -> None:
            source = bind(load(ids, row))
            word = bind(tirx.truncdiv(at, i32(per_word)))
            position = cast((at - word * i32(per_word)) * i32(scheme.bits), U32)
            group = bind(tirx.truncdiv(at, i32(scheme.group_size)))
            value = codes.number(load(table[0], source, word), position, scheme, bind)
            difference = value - zero_of(table, source, group, scheme)
            store_float(out, [row, at], difference * load_f32(table[1], source, group))

        each_element(device, rows, hidden, element)

    return build_kernel("embedding", [ids, *spec.table_shapes(), out], unpack)
