"""The search for scales (search.py) as TIR for LLVM: sixteen groups at once, one in each lane.

The order of operations is search.py's: candidates one after the other, sums over a group's elements
from the first to the last. Symmetric codes with groups of a fixed size only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.quantization.encode_kernels import (
    F32,
    PARTS,
    ROUNDER,
    U16,
    U32,
    EncodeSpec,
    apart,
    bits_dtype,
    rounded,
    wide,
)
from mlc_compile.targets.cpu_kernels import _vector as vec

LANES = 16
SCRATCH_PARTS = 4  # of [size, 16] float32
Expr = Any  # a tirx expression; TVM ships no types
Buffer = Any


def search_kernel(spec: EncodeSpec) -> Any:
    """A PrimFunc (weight, q_weight, q_scale, error, square, peak, importance, scratch, divisors,
    groups, a_row, count).

    As `encode_kernel`, but groups is a multiple of 16 and importance float32 [size, a_row + 16]:
    column g counts for group g % a_row of a row, scratch is float32 [4, size, 16]. divisors:
    float32 [count], of a group's peak, for the scales to try.
    """
    with IRBuilder() as builder, T.prim_func(is_private=False, s_tir=True):
        T.func_name("search")
        T.func_attr({"global_symbol": "search", "tirx.noalias": True})
        weight, model = bits_dtype(spec.source), bits_dtype(spec.model)
        arguments = {"weight": weight, "q_weight": U32, "q_scale": model, "error": F32}
        arguments |= {"square": F32, "peak": U32, "importance": F32, "scratch": F32}
        arguments |= {"divisors": F32}
        pointers = [T.arg(n, T.handle(d)) for n, d in arguments.items()]
        groups, a_row, count = (tirx.Var(n, "int64") for n in ("groups", "a_row", "count"))
        for argument in (groups, a_row, count):
            T.arg(argument.name, argument)
        buffers = [
            T.decl_buffer((vec.i64(1 << 40),), d, data=p, layout=None)
            for p, d in zip(pointers, arguments.values(), strict=True)
        ]
        _Search(spec, a_row, count, *buffers).emit(groups)
    return builder.get()


def _f32(value: float) -> Expr:
    return vec.const(value, F32, LANES)


def _register(dtype: str = F32) -> Buffer:
    return T.alloc_buffer((LANES,), dtype, layout=None)


def _get(register: Buffer) -> Expr:
    return vec.bind(vec.get(register, LANES))


def _hold(value: Expr) -> Expr:
    """A float32 vector by way of a register: TVM's simplifier looks through bindings, for long."""
    register = _register()
    vec.put(register, value, LANES)
    return _get(register)


class _Search:
    """Emits the body."""

    def __init__(self, spec: EncodeSpec, a_row: Expr, count: Expr, *buffers: Buffer) -> None:
        self.spec, self.a_row, self.count = spec, a_row, count
        self.weight, self.q_weight, self.q_scale = buffers[:3]
        self.error, self.square, self.peak, self.importance = buffers[3:7]
        self.size, self.top = spec.size, float((1 << (spec.bits - 1)) - 1)
        self.scratch, self.divisors = buffers[7:]
        # Parts of the scratch memory: the weights, narrowed too; the best levels, and those tried.
        self.source, self.x, self.levels, self.trial = (
            i * spec.size * LANES for i in range(SCRATCH_PARTS)
        )

    def elements(self, body: Callable[[Expr], None]) -> None:
        with vec.serial(self.size) as e:
            body(e)

    def at(self, part: int, e: Expr) -> Expr:
        return vec.bind(vec.load(self.scratch, [e * vec.i64(LANES) + vec.i64(part)], LANES))

    def put(self, part: int, e: Expr, value: Expr) -> None:
        vec.store(self.scratch, [e * vec.i64(LANES) + vec.i64(part)], value, LANES)

    def narrow(self, value: Expr) -> Expr:
        return rounded(value, self.spec.model, LANES)

    def emit(self, groups: Expr) -> None:
        running = _register(U32)
        vec.put(running, vec.const(0, U32, LANES), LANES)
        with vec.serial(groups // vec.i64(LANES)) as block:
            self.first = vec.bind(block * vec.i64(LANES))
            self.column = vec.bind(tirx.floormod(self.first, self.a_row))
            self.block(running)
        largest = tirx.call_llvm_pure_intrin(
            U32, f"llvm.vector.reduce.umax.v{LANES}i32", vec.get(running, LANES)
        )
        vec.store(self.peak, [0], largest, 1)

    def block(self, running: Buffer) -> None:
        high, low = _register(), _register()
        vec.put(high, _f32(-math.inf), LANES)
        vec.put(low, _f32(math.inf), LANES)
        exact = self.spec.source == self.spec.model or self.spec.model == F32
        mask = 0x7FFFFFFF if self.spec.source == F32 else 0x7FFF

        def load(e: Expr) -> None:
            start = self.first * vec.i64(self.size) + e
            bits = vec.bind(vec.load(self.weight, [start], LANES, self.size))
            bits = vec.bind(vec.cast(bits, U32, LANES))
            magnitude = vec.bind(tirx.bitwise_and(bits, vec.const(mask, U32, LANES)))
            vec.put(running, tirx.Max(magnitude, vec.get(running, LANES)), LANES)
            source = _hold(wide(bits, self.spec.source, LANES))
            x = source if exact else _hold(self.narrow(source))
            self.put(self.source, e, source)
            self.put(self.x, e, x)
            vec.put(high, tirx.Select(x > _get(high), x, _get(high)), LANES)
            vec.put(low, tirx.Select(x < _get(low), x, _get(low)), LANES)

        self.elements(load)
        negative = vec.bind(_f32(0.0) - _get(low))
        peak = _hold(tirx.Select(_get(high) >= negative, _get(high), _get(low)))
        largest = _hold(tirx.Select(_get(high) >= negative, _get(high), negative))
        best, scale = _register(), _register()
        self.candidate(peak, vec.i64(0))
        vec.put(scale, self.tried, LANES)
        vec.put(best, self.error_of(self.trial, self.tried, rounding=False), LANES)
        with vec.serial(self.count - vec.i64(1)) as number:
            self.candidate(peak, number + vec.i64(1))
            error = self.error_of(self.trial, self.tried, rounding=False)
            better = error < _get(best)
            vec.put(scale, tirx.Select(better, self.tried, _get(scale)), LANES)
            vec.put(best, tirx.Select(better, error, _get(best)), LANES)
        found = _hold(vec.get(scale, LANES))
        self.nearest(found, self.trial)
        refined = self.least_squares(found)
        chosen = _register()
        plain = self.positive_zero(self.narrow(largest / _f32(self.top)))
        self.plain(plain, 2 * self.top, self.levels)
        vec.put(chosen, plain, LANES)
        vec.put(best, self.error_of(self.levels, plain, rounding=True), LANES)
        signed = self.positive_zero(self.narrow(peak / _f32(self.top + 1)))
        self.plain(signed, 2 * self.top + 1, self.trial)
        self.compete(signed, chosen, best)
        for other in (found, refined):
            self.nearest(other, self.trial)
            self.compete(other, chosen, best)
        self.store(_hold(vec.get(chosen, LANES)))

    def candidate(self, peak: Expr, number: Expr) -> None:
        divisor = vec.splat(vec.load(self.divisors, [number], 1), LANES)
        self.tried = self.positive_zero(self.narrow(_hold(peak / divisor)))
        self.nearest(self.tried, self.trial)

    def positive_zero(self, scale: Expr) -> Expr:
        scale = _hold(scale)
        return _hold(tirx.Select(scale == _f32(0.0), _f32(0.0), scale))

    def divisor(self, scale: Expr) -> Expr:
        return _hold(tirx.Select(scale == _f32(0.0), _f32(math.inf), scale))

    def nearest(self, scale: Expr, out: int) -> None:
        divisor = self.divisor(scale)

        def element(e: Expr) -> None:
            level = _hold(self.at(self.x, e) / divisor + _f32(ROUNDER)) - _f32(ROUNDER)
            level = _hold(level)
            level = _hold(tirx.Select(level < _f32(-self.top), _f32(-self.top), level))
            top = _f32(self.top + 1)
            self.put(out, e, tirx.Select(level > top, top, level))

        self.elements(element)

    def plain(self, scale: Expr, most: float, out: int) -> None:
        """group.py's codes, as levels."""
        divisor = self.divisor(scale)

        def element(e: Expr) -> None:
            code = _hold(self.narrow(_hold(self.at(self.x, e) / divisor)))
            code = _hold(self.narrow(_hold(code + _f32(self.top))))
            code = _hold(_hold(code + _f32(ROUNDER)) - _f32(ROUNDER))
            code = _hold(tirx.Select(code < _f32(0.0), _f32(0.0), code))
            code = tirx.Select(code > _f32(most), _f32(most), code)
            self.put(out, e, code - _f32(self.top))

        self.elements(element)

    def weight_of(self, e: Expr) -> Expr:
        columns = self.a_row + vec.i64(LANES)
        return vec.bind(vec.load(self.importance, [e * columns + self.column], LANES))

    def error_of(self, levels: int, scale: Expr, *, rounding: bool) -> Expr:
        total = _register()
        vec.put(total, _f32(0.0), LANES)

        def element(e: Expr) -> None:
            back = apart(self.at(levels, e) * scale, LANES)
            if rounding:
                back = _hold(self.narrow(back))
            difference = _hold(self.at(self.x, e) - back)
            squared = apart(difference * difference, LANES)
            counted = apart(squared * self.weight_of(e), LANES)
            vec.put(total, vec.get(total, LANES) + counted, LANES)

        self.elements(element)
        return _hold(vec.get(total, LANES))

    def least_squares(self, scale: Expr) -> Expr:
        above, below = _register(), _register()
        for register in (above, below):
            vec.put(register, _f32(0.0), LANES)

        def element(e: Expr) -> None:
            level, m = self.at(self.trial, e), self.weight_of(e)
            product = apart(apart(self.at(self.x, e) * level, LANES) * m, LANES)
            squared = apart(apart(level * level, LANES) * m, LANES)
            vec.put(above, vec.get(above, LANES) + product, LANES)
            vec.put(below, vec.get(below, LANES) + squared, LANES)

        self.elements(element)
        divisor = self.divisor(_get(below))
        found = _hold(self.narrow(_hold(_get(above) / divisor)))
        magnitude = tirx.bitwise_and(
            vec.bitcast(found, U32, LANES), vec.const(0x7FFFFFFF, U32, LANES)
        )
        magnitude = vec.bind(magnitude)
        usable = tirx.Select(magnitude < vec.const(0x7F800000, U32, LANES), found, scale)
        return _hold(tirx.Select(found == _f32(0.0), scale, usable))

    def compete(self, scale: Expr, chosen: Buffer, best: Buffer) -> None:
        """Takes the trial's levels where their error is smaller."""
        error = self.error_of(self.trial, scale, rounding=True)
        better = error < _get(best)

        def element(e: Expr) -> None:
            kept = tirx.Select(better, self.at(self.trial, e), self.at(self.levels, e))
            self.put(self.levels, e, kept)

        self.elements(element)
        vec.put(chosen, tirx.Select(better, scale, _get(chosen)), LANES)
        vec.put(best, tirx.Select(better, error, _get(best)), LANES)

    def store(self, scale: Expr) -> None:
        bits = vec.bitcast(scale, U32, LANES)
        if self.spec.model == "float16":
            bits = vec.bitcast(vec.cast(scale, "float16", LANES), U16, LANES)
        elif self.spec.model == "bfloat16":
            bits = vec.cast(tirx.shift_right(bits, vec.const(16, U32, LANES)), U16, LANES)
        vec.store(self.q_scale, [self.first], bits, LANES)
        per_word = 32 // self.spec.bits
        words = self.size // per_word
        word = _register(U32)
        with vec.serial(words) as w:
            vec.put(word, vec.const(0, U32, LANES), LANES)
            for i in range(per_word):
                level = self.at(self.levels, w * vec.i64(per_word) + vec.i64(i))
                code = vec.cast(vec.cast(level + _f32(self.top), "int32", LANES), U32, LANES)
                shifted = tirx.shift_left(code, vec.const(i * self.spec.bits, U32, LANES))
                vec.put(word, tirx.bitwise_or(vec.get(word, LANES), shifted), LANES)
            start = self.first * vec.i64(words) + w
            index = tirx.Ramp(start, vec.i64(words), LANES)
            T.buffer_store(self.q_weight, vec.get(word, LANES), [index])
        self.sums(scale)

    def sums(self, scale: Expr) -> None:
        """errors.py's: eight partial sums over the elements, then added in halves."""
        for out, difference in ((self.error, True), (self.square, False)):
            parts = [_register() for _ in range(PARTS)]
            for register in parts:
                vec.put(register, _f32(0.0), LANES)
            with vec.serial(self.size // PARTS) as step:
                for lane, register in enumerate(parts):
                    e = step * vec.i64(PARTS) + vec.i64(lane)
                    value = self.at(self.source, e)
                    if difference:
                        back = self.narrow(apart(self.at(self.levels, e) * scale, LANES))
                        value = _hold(_hold(back) - value)
                    total = vec.get(register, LANES) + apart(value * value, LANES)
                    vec.put(register, total, LANES)
            values = [_get(register) for register in parts]
            while len(values) > 1:
                half = len(values) // 2
                pairs = zip(values[:half], values[half:], strict=True)
                values = [_hold(a + b) for a, b in pairs]
            vec.store(out, [self.first], values[0], LANES)
