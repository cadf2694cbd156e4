"""Vector views of buffers, and the fields of packed words as float32, in TIR.

- A parameter is declared with scalars, as the model library passes it; a kernel reads it through a
  pointer to vectors (`view`), which becomes `array<vec4<u32>>` in WGSL: one access of 16 bytes.
  TVM's own vector loads of a scalar array come out as four scalar accesses there.
- What a code means stands in targets/codes.py: (number - zero point) * scale. Over one group,
  sum (q - zero) s x = s (sum q x - zero sum x), with sum x shared by all rows that meet the same x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tvm
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets import codes
from mlc_compile.targets.gpu_kernels._emit import (
    F32,
    Buffer,
    Expr,
    bind,
    cast,
    f32,
    i32,
    load,
    u32,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice

Decode = Literal["bytes", "halves"]
"""How a field becomes a float32: by a conversion of its (masked) byte; or, of 4 bits, two at a time
as the top bits of the mantissas of float16 numbers in [1, 2), which a GPU widens faster than it
converts integers."""

PORTABLE = GPUDevice()


def vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def view(
    buffer: Buffer, shape: Sequence[Expr | int], lanes: int, dtype: str | None = None
) -> Buffer:
    """`buffer` as `shape` vectors of `lanes` elements, of `dtype` when given; to be called outside
    of launches.

    The memory must start at a multiple of the vector's size, as storage bindings do.
    """
    if lanes == 1:
        return buffer
    dtype = vector(dtype or str(buffer.dtype), lanes)
    pointer = tvm.ir.PointerType(tvm.ir.PrimType(dtype), "global")
    # A plain alias would keep the pointer's type; a `reinterpret` survives until the kernel's
    # parameters are typed, and costs nothing.
    data = tirx.Var(f"{buffer.name}_x{lanes}", pointer)
    T.Bind(tirx.call_intrin(pointer, "tirx.reinterpret", buffer.data), var=data)
    full = [i32(s) if isinstance(s, int) else s for s in shape]
    return T.decl_buffer(full, dtype, data=data, layout=None)


def widest(*counts: int, most: int = 4) -> int:
    """The largest vector (4, 2 or 1 lanes) that divides all counts."""
    lanes = most
    while any(c % lanes for c in counts):
        lanes //= 2
    return lanes


def lane(value: Expr, i: int) -> Expr:
    """One element of a bound vector (or the scalar itself)."""
    lanes = value.ty.dtype.lanes
    return value if lanes == 1 else tirx.Shuffle([value], [i32(i)])


def lanes_of(value: Expr) -> list[Expr]:
    return [lane(value, i) for i in range(value.ty.dtype.lanes)]


def concat(values: Sequence[Expr]) -> Expr:
    """Four scalars as a vector."""
    return tirx.Shuffle(list(values), [i32(i) for i in range(len(values))])


def splat(value: Expr, lanes: int) -> Expr:
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def as_f32(value: Expr) -> Expr:
    return cast(value, vector(F32, value.ty.dtype.lanes))


def load_or_zero(buffer: Buffer, index: Sequence[Expr], valid: Expr | None) -> Expr:
    """A vector as float32, zero where `valid` is given and false."""
    value = as_f32(load(buffer, *index))
    if valid is None:
        return value
    zero = splat(f32(0.0), value.ty.dtype.lanes)
    return tirx.if_then_else(valid, value, zero)


def halves(word: Expr, device: GPUDevice) -> list[Expr]:
    """The two float16 numbers in a bound uint32, the low one first, as float32."""
    if device.wgsl:  # naga has no bitcast to vec2<f16>
        # Not "pure": TVM would write the call again at every use.
        pair = T.call_extern(vector(F32, 2), "unpack2x16float", word)
    else:
        pair = tirx.Cast(vector(F32, 2), tirx.reinterpret(vector("float16", 2), word))
    return lanes_of(bind(pair))


@dataclass(frozen=True)
class Fields:
    """The fields of a word as values v of which (v - offset) * factor is the code's number."""

    values: list[Expr]
    factor: float
    offset: float

    def centre(self, scheme: QuantScheme, zero: Expr | None) -> Expr | None:
        """c of sum (q - zero) x = factor * (sum v x - c * sum x), None for 0.

        zero: where it is no constant.
        """
        constant = codes.constant_zero(scheme)
        if constant is not None:
            centre = self.offset + constant / self.factor
            return f32(centre) if centre else None
        if self.factor != 1.0:
            zero = zero * f32(1 / self.factor)
        return bind(zero + f32(self.offset) if self.offset else zero)


def fields(word: Expr, scheme: QuantScheme, decode: Decode, device: GPUDevice = PORTABLE) -> Fields:
    """All fields of a bound word, first element first; used once each, or bound by the caller."""
    bits = scheme.bits
    if scheme.codes == "e4m3":
        numbers = [bind(codes.e4m3(word, bits * i, bind)) for i in range(scheme.elems_per_word)]
        return Fields(numbers, 1.0, 0.0)
    if decode == "halves" and bits == 4:
        found = [halves(bind(_half_mantissas(word, 4 * i)), device) for i in range(4)]
        return Fields([low for low, _ in found] + [high for _, high in found], 16.0, 1.0)
    if bits == 4:  # two masks for eight fields; the bytes of a register convert directly
        low = bind(tirx.bitwise_and(word, u32(0x0F0F0F0F)))
        high = bind(tirx.bitwise_and(tirx.shift_right(word, u32(4)), u32(0x0F0F0F0F)))
        pairs = [(_field(low, 8 * i, 8), _field(high, 8 * i, 8)) for i in range(4)]
        values = [v for pair in pairs for v in pair]
    else:
        values = [_field(word, bits * i, bits) for i in range(scheme.elems_per_word)]
    return Fields([cast(v, F32) for v in values], 1.0, 0.0)


def zero_of(weight: Sequence[Buffer], row: Expr, group: Expr, scheme: QuantScheme) -> Expr:
    """The zero point of a group as float32, from the buffers of a weight in layout "NK"."""
    return bind(codes.zero_point(lambda word: load(weight[2], row, word), group, scheme))


def _field(word: Expr, position: int, bits: int) -> Expr:
    if position:
        word = tirx.shift_right(word, u32(position))
    if position + bits == 32:
        return word
    return tirx.bitwise_and(word, u32((1 << bits) - 1))


def _half_mantissas(word: Expr, position: int) -> Expr:
    """The 4 bits at `position` and those 16 further up as float16 numbers 1 + q / 16."""
    top = 6  # of ten bits of mantissa
    if position < top:
        word = tirx.shift_left(word, u32(top - position))
    else:
        word = tirx.shift_right(word, u32(position - top))
    return tirx.bitwise_or(tirx.bitwise_and(word, u32(0x03C003C0)), u32(0x3C003C00))
