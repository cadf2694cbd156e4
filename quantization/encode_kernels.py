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
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _vector as vec

F32, U32, I32, U16 = "float32", "uint32", "int32", "uint16"
ROUNDER = 1.5 * 2.0**23
PARTS = 8  # lanes that a group's sums and maxima are kept in (errors.py)
GROUPS = 16  # worked on in turns; a call takes no fewer

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
    (uint32 [1], to be set to 0 before); all addresses. groups, at least GROUPS, and size: int64.
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
    """Emits the body of one kernel.

    GROUPS groups are worked on in turns: first the extreme of each, then all their scales as one
    vector, then the codes of each, and last all their sums. A group by itself is one long chain of
    dependent operations, which leaves most of a processor idle.
    """

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
        # Of each group: the largest magnitude, what its scale comes from, and the two factors.
        narrowed = spec.rule == "signed" and not self.exact
        parts = (GROUPS * PARTS,)
        self.largest = T.alloc_buffer(parts, self.source_bits, layout=None)
        self.extremes = T.alloc_buffer(parts, U32, layout=None) if narrowed else None
        self.scales, self.divisors = vec.accumulators(2, GROUPS)
        self.sums = vec.accumulators(2, GROUPS * PARTS)

    def emit(self, groups: Expr, length: Expr) -> None:
        size: Expr = vec.i64(self.spec.size) if self.spec.size else length
        running = T.alloc_buffer((GROUPS,), U32, layout=None)
        vec.put(running, vec.const(0, U32, GROUPS), GROUPS)
        step = vec.i64(GROUPS)
        with vec.serial((groups + step - vec.i64(1)) // step) as turn:
            # The last turn goes back to have as many groups as all others.
            start = vec.bind(tirx.Min(turn * step, groups - step))
            with vec.serial(GROUPS) as group:
                self.extreme(group, vec.bind((start + group) * size), size)
            largest, extreme = self.peaks()
            largest = vec.bind(largest)
            vec.put(running, tirx.Max(largest, vec.get(running, GROUPS)), GROUPS)
            self.scale(start, extreme)
            with vec.serial(GROUPS) as group:
                self.codes(group, vec.bind((start + group) * size), size)
            for register, out in zip(self.sums, (self.error, self.square), strict=True):
                vec.store(out, [start], _folded(register, operator.add), GROUPS)
        name = f"llvm.vector.reduce.umax.v{GROUPS}i32"
        most = tirx.call_llvm_pure_intrin(U32, name, vec.get(running, GROUPS))
        vec.store(self.peak, [0], most, 1)

    def vectors(self, size: Expr, body: Callable[[Expr], None]) -> None:
        """body(offset) for each vector of a group."""
        if self.spec.size:
            for offset in range(0, self.spec.size, self.lanes):
                body(vec.i64(offset))
            return
        with vec.serial(size // vec.i64(self.lanes)) as i:
            body(vec.bind(i * vec.i64(self.lanes)))

    def extreme(self, group: Expr, first: Expr, size: Expr) -> None:
        """Notes what `peaks` makes of a group: the largest of magnitudes or of their keys."""
        dtype = self.source_bits

        def source(offset: Expr) -> Expr:
            return vec.load(self.weight, [first + offset], self.lanes)

        def magnitude(offset: Expr) -> Expr:
            return tirx.bitwise_and(source(offset), _magnitudes(dtype, self.lanes))

        def narrowed(offset: Expr) -> Expr:  # what differs in the source may be equal here
            wide = self.wide(vec.cast(source(offset), U32, self.lanes), self.lanes)
            return _key(vec.bitcast(self.rounded(wide, self.lanes), U32, self.lanes), U32)

        def key(offset: Expr) -> Expr:
            return _key(source(offset), dtype)

        signed = self.spec.rule == "signed" and self.exact
        self.maximum(self.largest, group, size, key if signed else magnitude)
        if self.extremes is not None:
            self.maximum(self.extremes, group, size, narrowed)

    def peaks(self) -> tuple[Expr, Expr]:
        """Of all groups: the bits of the source's largest magnitudes, as uint32, and the narrowed
        numbers that the scales come from."""
        dtype = self.source_bits
        found = _folded(self.largest, tirx.Max)
        if self.spec.rule == "absmax":
            largest = vec.bind(vec.cast(found, U32, GROUPS))
            return largest, self.narrow(self.wide(largest, GROUPS), GROUPS)
        if self.extremes is None:
            bits = vec.bind(_number(found, dtype))
            magnitudes = tirx.bitwise_and(bits, _magnitudes(dtype, GROUPS))
            largest = vec.cast(magnitudes, U32, GROUPS)
            return largest, self.wide(vec.cast(bits, U32, GROUPS), GROUPS)
        extreme = vec.bitcast(_number(_folded(self.extremes, tirx.Max), U32), F32, GROUPS)
        return vec.cast(found, U32, GROUPS), extreme

    def maximum(self, kept: Buffer, group: Expr, size: Expr, value: Callable[[Expr], Expr]) -> None:
        """Keeps the largest of unsigned integers over a group, in each of PARTS lanes."""
        lanes, dtype = self.lanes, str(kept.dtype)
        running = T.alloc_buffer((lanes,), dtype, layout=None)
        vec.put(running, vec.const(0, dtype, lanes), lanes)

        def vector(offset: Expr) -> None:
            bits = vec.bind(value(offset))
            vec.put(running, tirx.Max(bits, vec.bind(vec.get(running, lanes))), lanes)

        self.vectors(size, vector)
        largest = vec.bind(vec.get(running, lanes))
        while lanes > PARTS:
            lanes //= 2
            low, high = (vec.shuffle([largest], range(i, i + lanes)) for i in (0, lanes))
            largest = vec.bind(tirx.Max(low, high))
        vec.store(kept, [group * vec.i64(PARTS)], largest, PARTS)

    def scale(self, start: Expr, extreme: Expr) -> None:
        """Stores the scales of all groups, and notes them and what weights are divided by."""
        lanes = GROUPS
        scale = self.rounded(extreme / vec.const(float(self.most - self.top), F32, lanes), lanes)
        zero = vec.const(0.0, F32, lanes)
        scale = vec.bind(tirx.Select(scale == zero, zero, scale))  # -0.0 must not be stored
        bits = vec.bitcast(scale, U32, lanes)
        if self.spec.model == "float16":
            bits = vec.bitcast(vec.cast(scale, "float16", lanes), U16, lanes)
        elif self.spec.model == "bfloat16":
            bits = vec.cast(tirx.shift_right(bits, vec.const(16, U32, lanes)), U16, lanes)
        vec.store(self.q_scale, [start], bits, lanes)
        vec.put(self.scales, scale, lanes)
        if self.spec.model == "float16":
            inverse = vec.const(1.0, F32, lanes) / scale
            divisor = tirx.Select(scale == zero, zero, inverse)
        else:
            divisor = tirx.Select(scale == zero, vec.const(math.inf, F32, lanes), scale)
        vec.put(self.divisors, divisor, lanes)

    def codes(self, group: Expr, first: Expr, size: Expr) -> None:
        """Stores a group's words and notes its sums of squares."""
        lanes = self.lanes
        factor = vec.bind(vec.splat(vec.load(self.scales, [group], 1), lanes))
        divisor = vec.bind(vec.splat(vec.load(self.divisors, [group], 1), lanes))
        sums = vec.accumulators(2, PARTS)
        for register in sums:
            vec.put(register, vec.const(0.0, F32, PARTS), PARTS)

        def vector(offset: Expr) -> None:
            bits = vec.cast(vec.load(self.weight, [first + offset], lanes), U32, lanes)
            x = vec.bind(self.wide(bits, lanes))
            biased = self.biased(self.ratio(self.narrow(x, lanes), factor, divisor))
            q = vec.bitcast(biased, I32, lanes)
            self.put_codes(first + offset, offset, q)
            level = biased - vec.const(ROUNDER + self.top, F32, lanes)
            back = self.rounded(apart(level * factor, lanes), lanes)
            difference = vec.bind(back - x)
            for register, value in zip(sums, (difference, x), strict=True):
                self.add(register, vec.bind(apart(value * value, lanes)))

        self.vectors(size, vector)
        if self.fields is not None:
            self.put_fields(first)
        for register, kept in zip(sums, self.sums, strict=True):
            place = [group * vec.i64(PARTS)]
            vec.store(kept, place, vec.get(register, PARTS), PARTS)

    def ratio(self, x: Expr, scale: Expr, divisor: Expr) -> Expr:
        """Narrowed weights over their scale, rounded to the model dtype.

        For float16 the quotient comes from the inverse of the scale, corrected once by what is
        left over (the last step of a division by iteration). It may be off by an ulp of float32,
        which no rounding to float16 sees: x and s have 11 bits, so x / s is 2**-24 of itself or
        more away from the middle between two numbers of 11 bits, or is that middle exactly, and
        what is exact the correction finds.
        """
        lanes = self.lanes
        if self.spec.model != "float16":
            return self.rounded(x / divisor, lanes)
        x = vec.bind(x)
        near = apart(x * divisor, lanes)
        rest = vec.bind(_fma(-near, scale, x, lanes))
        return self.rounded(_fma(rest, divisor, near, lanes), lanes)

    def biased(self, ratio: Expr) -> Expr:
        """The codes plus ROUNDER, float32: each in the low bits of its number."""
        lanes = self.lanes
        shifted = self.rounded(ratio + vec.const(float(self.top), F32, lanes), lanes)
        biased = vec.bind(shifted + vec.const(ROUNDER, F32, lanes))
        biased = vec.bind(tirx.Max(biased, vec.const(ROUNDER, F32, lanes)))
        return vec.bind(tirx.Min(biased, vec.const(ROUNDER + self.most, F32, lanes)))

    def put_codes(self, position: Expr, offset: Expr, q: Expr) -> None:
        """Packs and stores the codes of the vector at element `position`: low bytes of int32."""
        lanes, bits = self.lanes, self.spec.bits
        if self.fields is not None:
            code = tirx.bitwise_and(vec.bitcast(q, U32, lanes), vec.const(0xFF, U32, lanes))
            vec.store(self.fields, [offset], code, lanes)
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
        for start in range(0, self.lanes, PARTS):
            part = values
            if self.lanes > PARTS:
                part = vec.shuffle([values], range(start, start + PARTS))
            total = vec.bind(vec.load(register, [0], PARTS) + part)
            vec.store(register, [0], total, PARTS)

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


def _magnitudes(dtype: str, lanes: int) -> Expr:
    """The mask that leaves a float's sign away."""
    return vec.const(0x7FFFFFFF if dtype == U32 else 0x7FFF, dtype, lanes)


def _key(bits: Expr, dtype: str) -> Expr:
    """Of a float's bits: orders by magnitude, the positive number above the negative one."""
    lanes = bits.ty.dtype.lanes
    top = 31 if dtype == U32 else 15
    flipped = vec.bind(tirx.bitwise_xor(bits, vec.const(1 << top, dtype, lanes)))
    name = f"llvm.fshl.v{lanes}i{top + 1}"
    one = vec.const(1, dtype, lanes)
    return tirx.call_llvm_pure_intrin(vec.vtype(dtype, lanes), name, flipped, flipped, one)


def _number(key: Expr, dtype: str) -> Expr:
    """The bits that a key was made of."""
    lanes = key.ty.dtype.lanes
    top = 31 if dtype == U32 else 15
    sign = tirx.shift_left(key, vec.const(top, dtype, lanes))
    bits = tirx.bitwise_or(tirx.shift_right(key, vec.const(1, dtype, lanes)), sign)
    return tirx.bitwise_xor(bits, vec.const(1 << top, dtype, lanes))


def _folded(kept: Buffer, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    """Of PARTS lanes of each group one vector: combined in halves, as errors.py adds."""
    parts = [vec.load(kept, [i * GROUPS], GROUPS) for i in range(PARTS)]
    width = PARTS  # lanes of a group that are left, beside those of the next group
    while width > 1:
        half = width // 2
        low = [i + lane for i in range(0, 2 * GROUPS, width) for lane in range(half)]
        high = [lane + half for lane in low]
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [
            vec.bind(combine(vec.shuffle([a, b], low), vec.shuffle([a, b], high))) for a, b in pairs
        ]
        width = half
    return parts[0]


def _fma(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    """a * b + c, rounded once."""
    dtype = vec.vtype(F32, lanes)
    return tirx.call_llvm_pure_intrin(dtype, f"llvm.fma.v{lanes}f32", a, b, c)


def _words(small: Expr, words: int) -> Expr:
    return tirx.reinterpret(vec.vtype(U32, words), small)


def apart(product: Expr, lanes: int) -> Expr:
    """A product that is rounded before it is used."""
    dtype = vec.vtype(F32, lanes)
    name = f"llvm.arithmetic.fence.{'f32' if lanes == 1 else f'v{lanes}f32'}"
    return vec.bind(tirx.call_llvm_pure_intrin(dtype, name, product))
