"""Explicit vector code in TIR: the few operations that every CPU kernel here is made of.

- A vector value is a TIR expression whose dtype has lanes (`float32x16`); one lane is a scalar.
- Values used twice are bound (`let`): LLVM sees one definition and no pass has to look for it.
- An accumulator is a buffer of exactly one vector on the stack: LLVM turns it into a register.

Nothing here knows an instruction set: LLVM picks the instructions, so the same code serves AVX-512,
AVX2, SSE2 and NEON; only the number of lanes differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

F32 = "float32"

Expr = Any  # a tirx expression; TVM ships no types
Buffer = Any


def i64(value: int) -> Expr:
    """A 64-bit index constant: symbolic row counts are int64, so all index arithmetic is."""
    return tirx.const(value, "int64")


def vtype(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def bind(value: Expr) -> Expr:
    """Name ``value`` so that later uses share one computation."""
    return T.Bind(value)


def const(value: float | int, dtype: str, lanes: int) -> Expr:
    return splat(tirx.const(value, dtype), lanes)


def splat(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def _indices(index: Sequence[Expr | int], lanes: int, stride: int) -> list[Expr]:
    full = [i64(i) if isinstance(i, int) else i for i in index]
    if lanes > 1:
        full[-1] = tirx.Ramp(full[-1], i64(stride), lanes)
    return full


def load(buffer: Buffer, index: Sequence[Expr | int], lanes: int, stride: int = 1) -> Expr:
    """``lanes`` elements from ``index`` on, ``stride`` apart along the last axis."""
    return tirx.BufferLoad(buffer, _indices(index, lanes, stride))


def _float(value: Expr, dtype: str, lanes: int) -> Expr:
    """A loaded value as float32; one of bfloat16 comes as its bits (`_bits`)."""
    if dtype == F32:
        return value
    if dtype != "bfloat16":
        return cast(value, F32, lanes)
    wide = cast(value, "uint32", lanes)
    return bitcast(tirx.shift_left(wide, const(16, "uint32", lanes)), F32, lanes)


def _bits(value: Expr, dtype: str, lanes: int) -> Expr:
    # By hand, because TVM's bfloat16 passes overlook values under `let`.
    return bitcast(value, "uint16", lanes) if dtype == "bfloat16" else value


def load_float(buffer: Buffer, index: Sequence[Expr | int], lanes: int) -> Expr:
    """`load` from a float32, float16 or bfloat16 buffer, as float32."""
    dtype = str(buffer.dtype)
    return _float(_bits(load(buffer, index, lanes), dtype, lanes), dtype, lanes)


def load_float_rows(buffer: Buffer, row: Expr, column: Expr, lanes: int) -> Expr:
    """`load_rows` from a float32, float16 or bfloat16 buffer, as float32."""
    dtype = str(buffer.dtype)
    return _float(load_rows(buffer, row, column, lanes), dtype, lanes)


def store_float(buffer: Buffer, index: Sequence[Expr | int], value: Expr, lanes: int) -> None:
    """`store` a float32 vector into a buffer of any of the three types, rounded to nearest even."""
    dtype = str(buffer.dtype)
    if dtype == "float16":
        value = cast(value, dtype, lanes)
    elif dtype == "bfloat16":
        value = bind(value)
        bits = bind(bitcast(value, "uint32", lanes))
        odd = tirx.bitwise_and(
            tirx.shift_right(bits, const(16, "uint32", lanes)), const(1, "uint32", lanes)
        )
        rounded = bits + odd + const(0x7FFF, "uint32", lanes)
        # Rounding could carry a NaN into infinity: keep its top bits, quiet.
        quiet = tirx.bitwise_or(bits, const(0x400000, "uint32", lanes))
        magnitude = tirx.bitwise_and(bits, const(0x7FFFFFFF, "uint32", lanes))
        nan = magnitude > const(0x7F800000, "uint32", lanes)
        rounded = tirx.Select(nan, quiet, rounded)
        half = cast(tirx.shift_right(rounded, const(16, "uint32", lanes)), "uint16", lanes)
        value = bitcast(half, dtype, lanes)
    store(buffer, index, value, lanes)


def load_rows(buffer: Buffer, row: Expr, column: Expr, lanes: int) -> Expr:
    """One element from each of ``lanes`` rows, one load each; bfloat16 as its bits."""
    dtype = str(buffer.dtype)
    found = [_bits(tirx.BufferLoad(buffer, [row + i64(r), column]), dtype, 1) for r in range(lanes)]
    return found[0] if lanes == 1 else shuffle(found, range(lanes))


def store(buffer: Buffer, index: Sequence[Expr | int], value: Expr, lanes: int) -> None:
    T.buffer_store(buffer, value, _indices(index, lanes, 1))


def prefetch(buffer: Buffer, index: Sequence[Expr | int]) -> None:
    """Start to load the cache line of one element; harmless when that lies outside the buffer."""
    address = tirx.address_of(load(buffer, index, 1))
    read, keep, data = (tirx.const(i, "int32") for i in (0, 3, 1))
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch.p0", address, read, keep, data))


def cast(value: Expr, dtype: str, lanes: int) -> Expr:
    return tirx.Cast(vtype(dtype, lanes), value)


def bitcast(value: Expr, dtype: str, lanes: int) -> Expr:
    return tirx.reinterpret(vtype(dtype, lanes), value)


def shuffle(vectors: Sequence[Expr], lanes: Sequence[int]) -> Expr:
    """Lane ``i`` of the result is lane ``lanes[i]`` of the concatenated ``vectors``.

    TVM wants no result wider than its input, so that is padded with copies; LLVM drops them.
    """
    parts = list(vectors)
    total = sum(part.ty.dtype.lanes for part in parts)
    while total < len(lanes):
        parts, total = parts + parts, 2 * total
    return tirx.Shuffle(parts, [tirx.const(i, "int32") for i in lanes])


def accumulators(count: int, lanes: int) -> list[Buffer]:
    """``count`` float32 vectors that live in registers; not initialised."""
    # TVM keeps small "global" buffers on the stack; any other scope costs a call to its heap.
    return [T.alloc_buffer((lanes,), F32, layout=None) for _ in range(count)]


def buffer(shape: Sequence[Expr | int], dtype: str) -> Buffer:
    """Scratch memory from TVM's pool of this thread."""
    full = [i64(s) if isinstance(s, int) else s for s in shape]
    return T.alloc_buffer(full, dtype, layout=None)


def argument(name: str, shape: Sequence[Expr | int], dtype: str) -> Buffer:
    """The next parameter of the function that is being built."""
    full = [i64(s) if isinstance(s, int) else s for s in shape]
    return T.arg(name, T.buffer(full, dtype, layout=None))


def get(register: Buffer, lanes: int) -> Expr:
    return load(register, [0], lanes)


def put(register: Buffer, value: Expr, lanes: int) -> None:
    store(register, [0], value, lanes)


def serial(extent: Expr | int) -> Any:
    return T.serial(i64(extent) if isinstance(extent, int) else extent)


def parallel(extent: Expr | int) -> Any:
    return T.parallel(i64(extent) if isinstance(extent, int) else extent)


def power_of_two(limit: int) -> int:
    """The largest power of two that is at most ``limit`` (>= 1)."""
    return 1 << (limit.bit_length() - 1)


def pieces(total: int, lanes: int) -> list[tuple[int, int]]:
    """What full vectors leave of ``total`` elements: ``(offset, lanes)`` of narrower vectors."""
    offset = total - total % lanes
    found = []
    while offset < total:
        width = power_of_two(min(total - offset, lanes))
        found.append((offset, width))
        offset += width
    return found


def concat(parts: Sequence[Expr], lanes: int) -> Expr:
    """Vectors of ``lanes`` each, side by side."""
    return parts[0] if len(parts) == 1 else shuffle(parts, range(lanes * len(parts)))


def widen(value: Expr, lanes: int, first: int, count: int, to: int) -> Expr:
    """``count`` lanes of a float32 vector, from ``first`` on, padded with zeros to ``to``."""
    if lanes == to == count:
        return value
    zero = const(0.0, F32, lanes)
    return shuffle([value, zero], [first + i if i < count else lanes for i in range(to)])


def horizontal_sum(value: Expr, lanes: int) -> Expr:
    """The sum of all lanes, a scalar."""
    while lanes > 1:
        value = bind(value)
        lanes //= 2
        low = shuffle([value], list(range(lanes)))
        high = shuffle([value], list(range(lanes, 2 * lanes)))
        value = low + high
    return value


def horizontal_sums4(values: Sequence[Expr], lanes: int) -> Expr:
    """The lane sums of four vectors as one vector of four; ``lanes`` >= 4."""

    def pair(a: Expr, b: Expr, low: Sequence[int], high: Sequence[int]) -> Expr:
        # The same pattern in every 128-bit block: one shuffle instruction each on any machine.
        def spread(pattern: Sequence[int]) -> list[int]:
            return [
                block + (i if i < 4 else lanes + i - 4)
                for block in range(0, lanes, 4)
                for i in pattern
            ]

        return bind(shuffle([a, b], spread(low)) + shuffle([a, b], spread(high)))

    a, b, c, d = (bind(v) for v in values)
    ab = pair(a, b, (0, 4, 1, 5), (2, 6, 3, 7))  # a02 b02 a13 b13
    cd = pair(c, d, (0, 4, 1, 5), (2, 6, 3, 7))
    total = pair(ab, cd, (0, 1, 4, 5), (2, 3, 6, 7))  # a b c d
    while lanes > 4:
        lanes //= 2
        low = shuffle([total], list(range(lanes)))
        high = shuffle([total], list(range(lanes, 2 * lanes)))
        total = bind(low + high)
    return total


def transpose(vectors: Sequence[Expr], lanes: int) -> list[Expr]:
    """Transpose a square of ``lanes`` vectors: lane j of vector i becomes lane i of vector j.

    Inside each 128-bit block by interleaving (one instruction on SSE, AVX and NEON), then blocks of
    four lanes.
    """
    v = list(vectors)

    def swap(distance: int) -> None:
        for i in range(lanes):
            if i & distance:
                continue
            a, b = v[i], v[i + distance]
            low = [j if not j & distance else lanes + j - distance for j in range(lanes)]
            high = [j + distance if not j & distance else lanes + j for j in range(lanes)]
            v[i], v[i + distance] = bind(shuffle([a, b], low)), bind(shuffle([a, b], high))

    if lanes < 4:
        if lanes == 2:
            swap(1)
        return v

    def interleave(a: Expr, b: Expr, pattern: Sequence[int]) -> Expr:
        index = [
            block + (i if i < 4 else lanes + i - 4) for block in range(0, lanes, 4) for i in pattern
        ]
        return bind(shuffle([a, b], index))

    for base in range(0, lanes, 4):
        a, b, c, d = v[base : base + 4]
        ab_low, ab_high = interleave(a, b, (0, 4, 1, 5)), interleave(a, b, (2, 6, 3, 7))
        cd_low, cd_high = interleave(c, d, (0, 4, 1, 5)), interleave(c, d, (2, 6, 3, 7))
        v[base] = interleave(ab_low, cd_low, (0, 1, 4, 5))
        v[base + 1] = interleave(ab_low, cd_low, (2, 3, 6, 7))
        v[base + 2] = interleave(ab_high, cd_high, (0, 1, 4, 5))
        v[base + 3] = interleave(ab_high, cd_high, (2, 3, 6, 7))
    distance = 4
    while distance < lanes:
        swap(distance)
        distance *= 2
    return v
