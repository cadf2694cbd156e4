"""Unpacking words inside vector code, without shifting every field down. What a code means stands
in targets/codes.py: (number - zero point) * scale.

A field q at bit position p of a word is masked where it stands: that is the integer q * 2^p, and
the factor 2^-p goes into the other operand of the multiplication. Both are exact in float32.

- `unpack_raw`: q * 2^p for each field, two instructions: mask and convert. For sums where the zero
  point can be moved out of the loop.
- `unpack`: (q - zero) * 2^p. The masked field becomes the low mantissa of 2^23, so that it reads
  2^23 + q * 2^p; subtracting 2^23 + zero * 2^p leaves the value: integers below 2^24, nothing is
  rounded. AVX-512 merges mask and merge into one instruction.

Numbers of e4m3 are made from their bits, at position 0 and with zero point 0 in either form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tvm import tirx

from mlc_compile.quantization.scheme import WORD_BITS, QuantScheme
from mlc_compile.targets import codes
from mlc_compile.targets.cpu_kernels._vector import (
    F32,
    Buffer,
    Expr,
    bind,
    bitcast,
    cast,
    const,
    load,
    load_float,
    load_float_rows,
    load_rows,
    shuffle,
    splat,
)

MANTISSA_BITS = 23
TWO_23 = 0x4B000000  # the bits of the float 2^23


class Field(NamedTuple):
    """One element of a word: its number, the shift applied to the word first, its place then."""

    element: int
    shift: int
    position: int

    @property
    def descale(self) -> float:
        """What the other operand is multiplied by: 2^-position."""
        return 2.0**-self.position


def fields(bits: int, top: int = MANTISSA_BITS) -> list[Field]:
    """The fields of one word, little end first, shifted so that each ends at or below bit `top`."""
    found = []
    shift = 0
    for element in range(WORD_BITS // bits):
        position = element * bits - shift
        if position + bits > top:
            shift, position = element * bits, 0
        found.append(Field(element, shift, position))
    return found


def raw_fields(bits: int) -> list[Field]:
    """The fields for `unpack_raw`: only the sign bit of a word must stay clear."""
    return fields(bits, WORD_BITS - 1)


def places(scheme: QuantScheme) -> list[Field]:
    """The fields of `unpack`."""
    return _numbers(scheme) or fields(scheme.bits)


def raw_places(scheme: QuantScheme) -> list[Field]:
    """The fields of `unpack_raw`."""
    return _numbers(scheme) or raw_fields(scheme.bits)


def _numbers(scheme: QuantScheme) -> list[Field]:
    """The fields of codes that are no integers; empty for others."""
    if scheme.codes != "e4m3":
        return []
    return [Field(i, scheme.bits * i, 0) for i in range(scheme.elems_per_word)]


def _from_bits(words: Expr, scheme: QuantScheme) -> Iterator[tuple[Field, Expr]]:
    words = bind(words)
    for field in _numbers(scheme):
        yield field, codes.e4m3(words, field.shift, bind)


def _masked(
    words: Expr, places: list[Field], bits: int, lanes: int
) -> Iterator[tuple[Field, Expr]]:
    """Each field of `words` as the integer q * 2^position."""
    words = bind(words)
    shifted, shift = words, 0
    for field in places:
        if field.shift != shift:
            shift = field.shift
            shifted = bind(tirx.shift_right(words, const(shift, "uint32", lanes)))
        if shift + bits == WORD_BITS:  # nothing is left above it
            yield field, shifted
        else:
            mask = const(((1 << bits) - 1) << field.position, "uint32", lanes)
            yield field, tirx.bitwise_and(shifted, mask)


def unpack(
    words: Expr, scheme: QuantScheme, lanes: int, zero: Expr | None
) -> Iterator[tuple[Field, Expr]]:
    """Each of `places` of `words` (uint32) with its value (number - zero) * 2^position (float32).

    zero: of each lane, where it is no constant.
    """
    if scheme.codes == "e4m3":
        yield from _from_bits(words, scheme)
        return
    constant = codes.constant_zero(scheme)
    offsets: dict[int, Expr] = {}
    for field, kept in _masked(words, fields(scheme.bits), scheme.bits, lanes):
        biased = tirx.bitwise_or(kept, const(TWO_23, "uint32", lanes))
        at = field.position
        if at not in offsets:
            if constant is not None:
                offsets[at] = const(float((1 << MANTISSA_BITS) + (constant << at)), F32, lanes)
            else:
                scaled = zero * const(2.0**at, F32, lanes)
                offsets[at] = bind(scaled + const(2.0**MANTISSA_BITS, F32, lanes))
        yield field, bitcast(biased, F32, lanes) - offsets[at]


def unpack_raw(words: Expr, scheme: QuantScheme, lanes: int) -> Iterator[tuple[Field, Expr]]:
    """Each of `raw_places` of `words` (uint32) with its number * 2^position (float32)."""
    if scheme.codes == "e4m3":
        yield from _from_bits(words, scheme)
        return
    for field, kept in _masked(words, raw_fields(scheme.bits), scheme.bits, lanes):
        # Through int32: converting a signed integer is one instruction everywhere.
        yield field, cast(cast(kept, "int32", lanes), F32, lanes)


def word_lanes(scheme: QuantScheme, lanes: int, words: int) -> int:
    """The widest vector whose lanes fall into groups in the same way at every multiple of it, in
    rows of `words`."""
    group = scheme.words_per_group
    if group >= words:
        return lanes
    while lanes % group and group % lanes:
        lanes //= 2
    return lanes


def words_of_run(scheme: QuantScheme, words: int, lanes: int) -> int | None:
    """Of `lanes` neighbouring words of a row of `words`, from a multiple of `lanes` on or up to the
    row's end: how many at a time are of one group. None where groups don't fit them."""
    group = scheme.words_per_group
    if words < lanes:
        return None
    if lanes % group == 0:
        return group
    return lanes if group % lanes == 0 or group >= words else None


class Groups:
    """Scales and zero points of a packed weight in layout "NK".

    weight: its buffers, in argument order.
    """

    def __init__(self, weight: tuple[Buffer, ...], scheme: QuantScheme) -> None:
        self.scheme = scheme
        self._scales, *zeros = weight[1:]
        self._zeros = zeros[0] if zeros else None

    def of_words(self, row: Expr, word: Expr, lanes: int) -> tuple[Expr, Expr | None]:
        """(scale, zero point unless that is constant) of each of `lanes` words of one row, from
        `word` on."""
        group = self.scheme.words_per_group
        first = tirx.floordiv(word, const(group, "int64", 1))
        if lanes <= group:
            scale = splat(load_float(self._scales, [row, first], 1), lanes)
            zero = self._zero(row, first)
            return scale, None if zero is None else splat(zero, lanes)
        count = lanes // group
        scale = load_float(self._scales, [row, first], count)
        each = [self._zero(row, first + const(i, "int64", 1)) for i in range(count)]
        spread = [lane // group for lane in range(lanes)]
        if group > 1:
            scale = shuffle([scale], spread)
        if self._zeros is None:
            return scale, None
        return scale, shuffle([each[i] for i in spread], range(lanes))

    def of_rows(self, first: Expr, group: Expr, lanes: int) -> tuple[Expr, Expr | None]:
        """(scale, zero point unless that is constant) of one group in each of `lanes` rows."""
        scale = load_float_rows(self._scales, first, group, lanes)
        if self._zeros is None:
            return scale, None
        word = load_rows(self._zeros, first, codes.zero_word(group, self.scheme), lanes)
        return scale, _zeros_in(word, group, self.scheme, lanes)

    def _zero(self, row: Expr, group: Expr) -> Expr | None:
        if self._zeros is None:
            return None
        word = load(self._zeros, [row, codes.zero_word(group, self.scheme)], 1)
        return bind(_zeros_in(word, group, self.scheme, 1))


def _zeros_in(words: Expr, group: Expr, scheme: QuantScheme, lanes: int) -> Expr:
    """The zero points of `group` in words of several rows."""
    position = splat(codes.zero_position(group, scheme), lanes)
    return codes.integer(codes.field(words, position, scheme))
