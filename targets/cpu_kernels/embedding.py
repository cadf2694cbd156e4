"""Rows of a packed or plain embedding table on the CPU, as a TIR PrimFunc.

Lanes are the elements of one word, each shifted down by its own amount; a row is short, so this
needs no rearrangement. The result is (q - M) * scale in float32, rounded once to the model dtype,
which is what the format's own arithmetic in the model dtype gives (quantization/group.py).
"""

from __future__ import annotations

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._vector import Expr
from mlc_compile.targets.kernels import EmbeddingSpec

# Waking the thread pool takes microseconds; one core writes this many elements in about 10.
PARALLEL_ELEMENTS = 1 << 15


def embedding_kernel(spec: EmbeddingSpec, *, vector_bits: int) -> tirx.PrimFunc:
    """(ids int32 [n], q_weight [vocab, words], q_scale [vocab, groups] | weight, out [n, hidden]).

    Ids must be in 0..vocab-1; they are not checked, as in any gather on this path.
    """
    lanes = max(vector_bits // 32, 1)
    scheme, hidden = spec.scheme, spec.hidden
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("embedding")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        rows = vec.i64(1) if spec.rows == 1 else T.int64()
        ids = vec.argument("ids", (rows,), "int32")
        if scheme is None:
            table = vec.argument("weight", (spec.vocab, hidden), spec.dtype)
        else:
            shape = (spec.vocab, scheme.num_words(hidden))
            table = vec.argument("q_weight", shape, scheme.storage_dtype)
            shape = (spec.vocab, scheme.num_groups(hidden))
            scales = vec.argument("q_scale", shape, scheme.model_dtype)
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
            per_word, per_group = scheme.elems_per_word, scheme.words_per_group
            step = tirx.Ramp(tirx.const(0, "int32"), tirx.const(scheme.bits, "int32"), per_word)
            shifts = vec.cast(step, "uint32", per_word)
            mask = vec.const((1 << scheme.bits) - 1, "uint32", per_word)
            zero = vec.const(scheme.max_int, "int32", per_word)

            def emit(word: Expr, group: Expr, width: int) -> None:
                packed = vec.splat(vec.load(table, [source, word], 1), per_word)
                field = tirx.bitwise_and(tirx.shift_right(packed, shifts), mask)
                value = vec.cast(vec.cast(field, "int32", per_word) - zero, vec.F32, per_word)
                scale = vec.load_float(scales, [source, group], 1)
                value = vec.bind(value * vec.splat(scale, per_word))
                at = word * vec.i64(per_word)
                if width == per_word:
                    vec.store_float(out, [row, at], value, per_word)
                    return
                for lane in range(width):
                    vec.store_float(out, [row, at + vec.i64(lane)], vec.shuffle([value], [lane]), 1)

            full = hidden // per_word
            with vec.serial(full) as word:
                emit(word, tirx.floordiv(word, vec.i64(per_group)), per_word)
            if hidden % per_word:
                emit(vec.i64(full), vec.i64(full // per_group), hidden % per_word)

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
