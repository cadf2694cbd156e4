"""Unpacking group-quantised words inside vector code, without shifting every field down.

A field of `bits` bits at position p of a word is put, in place, into the mantissa of the float 2^23:
`(word & mask) | bits_of(2^23)` is exactly 2^23 + q * 2^p as long as p + bits <= 23. Subtracting
2^23 + M * 2^p leaves (q - M) * 2^p, exactly: two integers below 2^24. So a field costs one logic instruction
(AVX-512 merges the two) and one subtraction, and the factor 2^-p goes into the other operand, where it is
exact too. Fields above bit 22 get one shift per word, not one per field.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from tvm import tirx

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.cpu_kernels._vector import Expr, bind, bitcast, const

MANTISSA_BITS = 23
TWO_23 = 0x4B000000  # the bits of the float 2^23


class Field(NamedTuple):
    """One element of a word: element number, shift applied to the word first, position after it."""

    element: int
    shift: int
    position: int

    @property
    def descale(self) -> float:
        """What the other operand is multiplied by: 2^-position."""
        return 2.0**-self.position


def fields(bits: int) -> list[Field]:
    """The fields of one word, little end first."""
    found = []
    shift = 0
    for element in range(32 // bits):
        position = element * bits - shift
        if position + bits > MANTISSA_BITS:
            shift, position = element * bits, 0
        found.append(Field(element, shift, position))
    return found


def unpack(words: Expr, scheme: QuantScheme, lanes: int) -> Iterator[tuple[Field, Expr]]:
    """Each field of `words` (uint32 vector) with its value (q - M) * 2^position (float32 vector)."""
    words = bind(words)
    shifted, shift = words, 0
    mask = (1 << scheme.bits) - 1
    for field in fields(scheme.bits):
        if field.shift != shift:
            shift = field.shift
            shifted = bind(tirx.shift_right(words, const(shift, "uint32", lanes)))
        kept = tirx.bitwise_and(shifted, const(mask << field.position, "uint32", lanes))
        biased = tirx.bitwise_or(kept, const(TWO_23, "uint32", lanes))
        offset = float((1 << MANTISSA_BITS) + (scheme.max_int << field.position))
        yield field, bitcast(biased, "float32", lanes) - const(offset, "float32", lanes)


def word_lanes(scheme: QuantScheme, lanes: int) -> int:
    """The widest vector of words whose lanes fall into groups in the same way at every multiple of it."""
    group = scheme.words_per_group
    while lanes % group and group % lanes:
        lanes //= 2
    return lanes
