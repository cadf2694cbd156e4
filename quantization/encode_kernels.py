"""Group encoding as TIR for LLVM: `quantization/group.py`, the reference, bit for bit.

One kernel encodes a run of whole groups that lie one after another; rows, layouts and padding are
the caller's (`compiled.py`). Arguments are plain addresses, because sources are read-only maps of
any alignment.

- Weights become float32 (exact), are narrowed to the model dtype by the CPU's own conversion or,
  for bfloat16, by integer arithmetic, and go on in float32, as in the reference.
- Rounding is monotonic, so the narrowed maximum is the maximum of the narrowed magnitudes; one
  maximum over the source's bits serves the scale and the check for values that are not finite.
- Adding 1.5 * 2**23 leaves a float's nearest integer, half to even, in its low bits: `rint` and the
  conversion in one operation.
- LLVM may fuse a multiplication with an addition, which numpy cannot; `apart` forbids it where
  the reference rounds twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _vector as vec

F32, U32, I32, U16 = "float32", "uint32", "int32", "uint16"
ROUNDER = 1.5 * 2.0**23
ROUNDER_BITS = 0x4B400000
INFINITY_BITS = 0x7F800000
ERROR_LANES = 8  # as quantization.group sums squares

Expr = Any  # a tirx expression; TVM ships no types
Buffer = Any


@dataclass(frozen=True)
class EncodeSpec:
    """What one kernel does.

    source, model: "float16", "bfloat16" or "float32". size: elements of a group, 0 where it comes
    at run time (a multiple of 16). rule: "absmax" or "signed" (group.py).
    """

    source: str
    model: str
    codes: str
    bits: int
    size: int
    rule: str = "absmax"


def bits_dtype(dtype: str) -> str:
    """The unsigned integer that holds the bits of a float dtype."""
    return U32 if dtype == F32 else U16


def encode_kernel(spec: EncodeSpec) -> Any:
    """A PrimFunc (weight, q_weight, q_scale, error, square, peak, groups, size).

    weight: source bits; q_weight: words; q_scale: model dtype bits, one a group; error, square:
    float32, the sums of (w' - w)**2 and w**2 of each group; peak: the bits of the largest |weight|
    (uint32 [1], to be set to 0 before); all addresses. groups, size: int64.
    """
    with IRBuilder() as builder, T.prim_func(is_private=False, s_tir=True):
        T.func_name("encode")
        T.func_attr({"global_symbol": "encode", "tirx.noalias": True})
        groups = tirx.Var("groups", "int64")
        length = tirx.Var("length", "int64")
        names = ("weight", "q_weight", "q_scale", "error", "square", "peak")
        scale_dtype = bits_dtype(spec.model)
        dtypes = (bits_dtype(spec.source), U32, scale_dtype, F32, F32, U32)
        pointers = [T.arg(n, T.handle(d)) for n, d in zip(names, dtypes, strict=True)]
        T.arg("groups", groups)
        T.arg("length", length)
        buffers = [
            T.decl_buffer((vec.i64(1 << 40),), d, data=p, layout=None)
            for p, d in zip(pointers, dtypes, strict=True)
        ]
        _Encoder(spec, *buffers).emit(groups, length)
    return builder.get()


class _Encoder:
    """Emits the body of one kernel."""

    def __init__(
        self,
        spec: EncodeSpec,
        weight: Buffer,
        q_weight: Buffer,
        q_scale: Buffer,
        error: Buffer,
        square: Buffer,
        peak: Buffer,
    ) -> None:
        self.spec = spec
        self.weight, self.q_weight, self.q_scale = weight, q_weight, q_scale
        self.error, self.square, self.peak = error, square, peak
        self.source_bits = bits_dtype(spec.source)
        self.exact = spec.source == spec.model or spec.model == F32
        self.top = (1 << (spec.bits - 1)) - 1
        # Elements worked on at once: LLVM cuts such a vector into registers.
        self.lanes = next(n for n in (32, 16, 8) if (spec.size or 16) % n == 0)
        self.most = 2 * self.top + (spec.rule == "signed")
        # Codes of 3 bits do not fill bytes: they wait for their group here.
        self.fields = None
        if 32 % spec.bits:
            self.fields = T.alloc_buffer((spec.size,), U32, layout=None)

    def emit(self, groups: Expr, length: Expr) -> None:
        size: Expr = vec.i64(self.spec.size) if self.spec.size else length
        running = T.alloc_buffer((1,), U32, layout=None)
        vec.store(running, [0], vec.const(0, U32, 1), 1)
        with vec.serial(groups) as group:
            first = vec.bind(group * size)
            largest, extreme = self.extreme(first, size)
            old = vec.bind(vec.load(running, [0], 1))
            vec.store(running, [0], tirx.Select(largest > old, largest, old), 1)
            self.codes(group, first, size, self.scale(group, extreme))
        vec.store(self.peak, [0], vec.load(running, [0], 1), 1)

    def vectors(self, size: Expr, body: Callable[[Expr], None]) -> None:
        """body(offset) for each vector of a group."""
        if self.spec.size:
            for offset in range(0, self.spec.size, self.lanes):
                body(vec.i64(offset))
            return
        with vec.serial(size // vec.i64(self.lanes)) as i:
            body(vec.bind(i * vec.i64(self.lanes)))

    def extreme(self, first: Expr, size: Expr) -> tuple[Expr, Expr]:
        """Of a group: the bits of the source's largest magnitude, as uint32, and the narrowed
        number that the scale comes from."""
        dtype = self.source_bits
        width = 32 if dtype == U32 else 16

        def source(offset: Expr) -> Expr:
            return vec.load(self.weight, [first + offset], self.lanes)

        def magnitude(offset: Expr) -> Expr:
            mask = vec.const((1 << (width - 1)) - 1, dtype, self.lanes)
            return tirx.bitwise_and(source(offset), mask)

        def key(bits: Expr, kind: str) -> Expr:
            """Orders by magnitude, the positive number above the negative one."""
            top = 31 if kind == U32 else 15
            flipped = vec.bind(tirx.bitwise_xor(bits, vec.const(1 << top, kind, self.lanes)))
            return _rotated(flipped, kind, self.lanes)

        def number(value: Expr, kind: str) -> Expr:
            """The bits that a key was made of."""
            top = 31 if kind == U32 else 15
            sign = tirx.shift_left(value, vec.const(top, kind, 1))
            bits = tirx.bitwise_or(tirx.shift_right(value, vec.const(1, kind, 1)), sign)
            return vec.bind(tirx.bitwise_xor(bits, vec.const(1 << top, kind, 1)))

        if self.spec.rule == "absmax":
            largest = vec.bind(vec.cast(self.maximum(size, magnitude, dtype), U32, 1))
            return largest, self.narrow(self.wide(largest, 1), 1)
        if self.exact:
            bits = number(self.maximum(size, lambda o: key(source(o), dtype), dtype), dtype)
            mask = vec.const((1 << (width - 1)) - 1, dtype, 1)
            largest = vec.bind(vec.cast(tirx.bitwise_and(bits, mask), U32, 1))
            return largest, self.wide(vec.cast(bits, U32, 1), 1)
        largest = vec.bind(vec.cast(self.maximum(size, magnitude, dtype), U32, 1))

        def narrowed(offset: Expr) -> Expr:  # what differs in the source may be equal here
            wide = self.wide(vec.cast(source(offset), U32, self.lanes), self.lanes)
            return key(vec.bitcast(self.rounded(wide, self.lanes), U32, self.lanes), U32)

        bits = number(self.maximum(size, narrowed, U32), U32)
        return largest, vec.bind(vec.bitcast(bits, F32, 1))

    def maximum(self, size: Expr, value: Callable[[Expr], Expr], dtype: str) -> Expr:
        """The largest of unsigned integers over a group."""
        lanes = self.lanes
        running = T.alloc_buffer((lanes,), dtype, layout=None)
        vec.store(running, [0], vec.const(0, dtype, lanes), lanes)

        def vector(offset: Expr) -> None:
            bits = vec.bind(value(offset))
            old = vec.bind(vec.load(running, [0], lanes))
            vec.store(running, [0], tirx.Max(bits, old), lanes)

        self.vectors(size, vector)
        name = f"llvm.vector.reduce.umax.v{lanes}{'i32' if dtype == U32 else 'i16'}"
        return vec.bind(tirx.call_llvm_pure_intrin(dtype, name, vec.load(running, [0], lanes)))

    def scale(self, group: Expr, extreme: Expr) -> Expr:
        """Stores a group's scale and returns it as float32."""
        divisor = self.most - self.top
        scale = self.rounded(extreme / vec.const(float(divisor), F32, 1), 1)
        zero = vec.const(0.0, F32, 1)
        scale = vec.bind(tirx.Select(scale == zero, zero, scale))  # -0.0 must not be stored
        bits = vec.bitcast(scale, U32, 1)
        if self.spec.model == "float16":
            bits = vec.bitcast(vec.cast(scale, "float16", 1), U16, 1)
        elif self.spec.model == "bfloat16":
            bits = vec.cast(tirx.shift_right(bits, vec.const(16, U32, 1)), U16, 1)
        vec.store(self.q_scale, [group], bits, 1)
        return scale

    def codes(self, group: Expr, first: Expr, size: Expr, scale: Expr) -> None:
        """Stores a group's words and sums of squares."""
        lanes = self.lanes
        zero = vec.const(0.0, F32, 1)
        infinity = vec.const(math.inf, F32, 1)
        divisor = vec.bind(vec.splat(vec.bind(tirx.Select(scale == zero, infinity, scale)), lanes))
        factor = vec.bind(vec.splat(scale, lanes))
        sums = [T.alloc_buffer((ERROR_LANES,), F32, layout=None) for _ in range(2)]
        for register in sums:
            vec.store(register, [0], vec.const(0.0, F32, ERROR_LANES), ERROR_LANES)

        def vector(offset: Expr) -> None:
            bits = vec.cast(vec.load(self.weight, [first + offset], lanes), U32, lanes)
            x = vec.bind(self.wide(bits, lanes))
            q = vec.bind(self.quantized(self.narrow(x, lanes), divisor))
            self.put_codes(first + offset, offset, q)
            level = vec.cast(q - vec.const(self.top, I32, lanes), F32, lanes)
            back = self.rounded(apart(level * factor, lanes), lanes)
            difference = vec.bind(back - x)
            for register, value in zip(sums, (difference, x), strict=True):
                self.add(register, vec.bind(apart(value * value, lanes)))

        self.vectors(size, vector)
        if self.fields is not None:
            self.put_fields(first)
        for register, out in zip(sums, (self.error, self.square), strict=True):
            total = vec.horizontal_sum(vec.load(register, [0], ERROR_LANES), ERROR_LANES)
            vec.store(out, [group], total, 1)

    def quantized(self, x: Expr, divisor: Expr) -> Expr:
        """The codes of narrowed weights, int32."""
        lanes = self.lanes
        ratio = self.rounded(x / divisor, lanes)
        shifted = self.rounded(ratio + vec.const(float(self.top), F32, lanes), lanes)
        integer = vec.bitcast(vec.bind(shifted + vec.const(ROUNDER, F32, lanes)), I32, lanes)
        integer = integer - vec.const(ROUNDER_BITS, I32, lanes)
        integer = tirx.Max(integer, vec.const(0, I32, lanes))
        return tirx.Min(integer, vec.const(self.most, I32, lanes))

    def put_codes(self, position: Expr, offset: Expr, q: Expr) -> None:
        """Packs and stores the codes (int32) of the vector at element `position`."""
        lanes, bits = self.lanes, self.spec.bits
        if self.fields is not None:
            vec.store(self.fields, [offset], vec.cast(q, U32, lanes), lanes)
            return
        small = vec.cast(q, "uint8", lanes)
        if bits == 4:
            pairs = vec.bind(tirx.reinterpret(f"uint16x{lanes // 2}", small))
            joined = tirx.bitwise_or(pairs, tirx.shift_right(pairs, vec.const(4, U16, lanes // 2)))
            small = vec.cast(joined, "uint8", lanes // 2)
        words = lanes * bits // 32
        per_word = vec.i64(32 // bits)
        vec.store(self.q_weight, [position // per_word], vec.bind(_words(small, words)), words)

    def put_fields(self, first: Expr) -> None:
        """Packs a group of codes that do not fill bytes."""
        per_word = 32 // self.spec.bits
        start = vec.bind(first // vec.i64(per_word))
        for word in range(self.spec.size // per_word):
            value: Expr = vec.load(self.fields, [word * per_word], 1)
            for i in range(1, per_word):
                field = vec.load(self.fields, [word * per_word + i], 1)
                shift = vec.const(i * self.spec.bits, U32, 1)
                value = tirx.bitwise_or(value, tirx.shift_left(field, shift))
            vec.store(self.q_weight, [start + vec.i64(word)], value, 1)

    def add(self, register: Buffer, values: Expr) -> None:
        """Adds a vector to the lane sums, eight elements after the other."""
        for start in range(0, self.lanes, ERROR_LANES):
            part = values
            if self.lanes > ERROR_LANES:
                part = vec.shuffle([values], range(start, start + ERROR_LANES))
            total = vec.bind(vec.load(register, [0], ERROR_LANES) + part)
            vec.store(register, [0], total, ERROR_LANES)

    def wide(self, bits: Expr, lanes: int) -> Expr:
        return wide(bits, self.spec.source, lanes)

    def narrow(self, x: Expr, lanes: int) -> Expr:
        """Source values rounded to the model dtype, as float32."""
        return x if self.exact else self.rounded(x, lanes)

    def rounded(self, x: Expr, lanes: int) -> Expr:
        return rounded(x, self.spec.model, lanes)


def wide(bits: Expr, dtype: str, lanes: int) -> Expr:
    """The float32 of a float's bits given as uint32."""
    if dtype == F32:
        return vec.bitcast(bits, F32, lanes)
    if dtype == "bfloat16":
        return vec.bitcast(tirx.shift_left(bits, vec.const(16, U32, lanes)), F32, lanes)
    return vec.cast(vec.bitcast(vec.cast(bits, U16, lanes), "float16", lanes), F32, lanes)


def rounded(x: Expr, dtype: str, lanes: int) -> Expr:
    """float32 values rounded to `dtype`, as float32."""
    if dtype == F32:
        return vec.bind(x)
    if dtype == "float16":
        return vec.bind(vec.cast(vec.bind(vec.cast(x, "float16", lanes)), F32, lanes))
    bits = _held(vec.bitcast(x, U32, lanes), lanes)
    odd = tirx.bitwise_and(
        tirx.shift_right(bits, vec.const(16, U32, lanes)), vec.const(1, U32, lanes)
    )
    bits = bits + odd + vec.const(0x7FFF, U32, lanes)
    bits = tirx.bitwise_and(bits, vec.const(0xFFFF0000, U32, lanes))
    return vec.bitcast(_held(bits, lanes), F32, lanes)


def _held(value: Expr, lanes: int) -> Expr:
    """A uint32 vector by way of a register: TVM's simplifier looks through bindings, for long."""
    register = T.alloc_buffer((lanes,), U32, layout=None)
    vec.store(register, [0], value, lanes)
    return vec.bind(vec.load(register, [0], lanes))


def _rotated(bits: Expr, dtype: str, lanes: int) -> Expr:
    """Unsigned integers, rotated left by one."""
    name = f"llvm.fshl.v{lanes}{'i32' if dtype == U32 else 'i16'}"
    one = vec.const(1, dtype, lanes)
    return tirx.call_llvm_pure_intrin(vec.vtype(dtype, lanes), name, bits, bits, one)


def _words(small: Expr, words: int) -> Expr:
    return tirx.reinterpret(vec.vtype(U32, words), small)


def apart(product: Expr, lanes: int) -> Expr:
    """A product that is rounded before it is used."""
    dtype = vec.vtype(F32, lanes)
    name = f"llvm.arithmetic.fence.{'f32' if lanes == 1 else f'v{lanes}f32'}"
    return vec.bind(tirx.call_llvm_pure_intrin(dtype, name, product))
