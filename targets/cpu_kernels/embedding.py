"""Rows of a packed or plain embedding table on the CPU, as a TIR PrimFunc.

Lanes are the elements of one word, each shifted down by its own amount; a row is short, so this
needs no rearrangement. The result is (number - zero) * scale (targets/codes.py) in float32, rounded
once to the model dtype, which is what the format's own arithmetic in the model dtype gives
(quantization/group.py).
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets import codes
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._packed import Groups
from mlc_compile.targets.cpu_kernels._vector import Expr
from mlc_compile.targets.kernels import EmbeddingSpec

# Waking the thread pool takes microseconds; one core writes this many elements in about 10.
PARALLEL_ELEMENTS = 1 << 15


def embedding_kernel(spec: EmbeddingSpec, *, vector_bits: int) -> tirx.PrimFunc:
    """(ids int32 [n], the table's buffers, out [n, hidden]).

    Ids must be in 0..vocab-1; they are not checked, as in any gather on this path.
    """
    lanes = max(vector_bits // 32, 1)
    scheme, hidden = spec.scheme, spec.hidden
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("embedding")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows = vec.i64(1) if spec.rows == 1 else T.int64()
        ids = vec.argument("ids", (rows,), "int32")
        buffers = tuple(vec.argument(*entry) for entry in spec.table_shapes())
        table = buffers[0]
        out = vec.argument("out", (rows, hidden), spec.dtype)

        def copy(row: Expr) -> None:
            source = vec.bind(vec.cast(vec.load(ids, [row], 1), "int64", 1))

            def move(at: Expr | int, width: int) -> None:
                vec.store(out, [row, at], vec.load(table, [source, at], width), width)

            with vec.serial(hidden // lanes) as i:
                move(i * vec.i64(lanes), lanes)
            for offset, width in vec.pieces(hidden, lanes):
                move(offset, width)

        def unpack(row: Expr) -> None:
            assert scheme is not None
            source = vec.bind(vec.cast(vec.load(ids, [row], 1), "int64", 1))
            per_word = scheme.elems_per_word
            step = tirx.Ramp(tirx.const(0, "int32"), tirx.const(scheme.bits, "int32"), per_word)
            shifts = vec.cast(step, "uint32", per_word)
            groups, constant = Groups(buffers, scheme), codes.constant_zero(scheme)

            def emit(word: Expr, width: int) -> None:
                packed = vec.splat(vec.load(table, [source, word], 1), per_word)
                value = codes.number(packed, shifts, scheme, vec.bind)
                scale, zero = groups.of_words(source, word, 1)
                if zero is None:
                    assert constant is not None
                    zero = vec.const(float(constant), vec.F32, 1)
                value = (value - vec.splat(zero, per_word)) * vec.splat(scale, per_word)
                value = vec.bind(value)
                at = word * vec.i64(per_word)
                if width == per_word:
                    vec.store_float(out, [row, at], value, per_word)
                    return
                for lane in range(width):
                    vec.store_float(out, [row, at + vec.i64(lane)], vec.shuffle([value], [lane]), 1)

            full = hidden // per_word
            with vec.serial(full) as word:
                emit(word, per_word)
            if hidden % per_word:
                emit(vec.i64(full), hidden % per_word)

        one = copy if scheme is None else unpack
        if spec.rows == 1:
            one(vec.i64(0))
        else:
            with T.If(rows < vec.i64(max(PARALLEL_ELEMENTS // hidden, 2))):
                with T.Then(), vec.serial(rows) as row:
                    one(row)
                with T.Else(), vec.parallel(rows) as row:
                    one(row)
    return builder.get()
