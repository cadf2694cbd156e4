"""Unpacking group-quantised words inside vector code, without shifting every field down.

A field q at bit position p of a word is masked where it stands: that is the integer q * 2^p, and
the factor 2^-p goes into the other operand of the multiplication. Both are exact in float32.

- `unpack_raw`: q * 2^p for each field, two instructions: mask and convert. For sums where -M can be
  moved out of the loop.
- `unpack`: (q - M) * 2^p. The masked field becomes the low mantissa of 2^23, so that it reads
  2^23 + q * 2^p; subtracting 2^23 + M * 2^p leaves the value: integers below 2^24, nothing is
  rounded. AVX-512 merges mask and merge into one instruction.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tvm import tirx

from mlc_compile.quantization.scheme import WORD_BITS, QuantScheme
from mlc_compile.targets.cpu_kernels._vector import Expr, bind, bitcast, cast, const

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


def unpack(words: Expr, scheme: QuantScheme, lanes: int) -> Iterator[tuple[Field, Expr]]:
    """Each of `fields` of `words` (uint32) with its value (q - M) * 2^position (float32)."""
    for field, kept in _masked(words, fields(scheme.bits), scheme.bits, lanes):
        biased = tirx.bitwise_or(kept, const(TWO_23, "uint32", lanes))
        offset = float((1 << MANTISSA_BITS) + (scheme.max_int << field.position))
        yield field, bitcast(biased, "float32", lanes) - const(offset, "float32", lanes)


def unpack_raw(words: Expr, scheme: QuantScheme, lanes: int) -> Iterator[tuple[Field, Expr]]:
    """Each of `raw_fields` of `words` (uint32) with its value q * 2^position (float32)."""
    for field, kept in _masked(words, raw_fields(scheme.bits), scheme.bits, lanes):
        # Through int32: converting a signed integer is one instruction everywhere.
        yield field, cast(cast(kept, "int32", lanes), "float32", lanes)


def word_lanes(scheme: QuantScheme, lanes: int) -> int:
    """The widest vector whose lanes fall into groups in the same way at every multiple of it."""
    group = scheme.words_per_group
    while lanes % group and group % lanes:
        lanes //= 2
    return lanes
