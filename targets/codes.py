"""How the codes of a packed weight become numbers: what `dequantize` of a graph and every target's
kernels share (formulas: quantization/group.py).

    weight = (number of the code - zero point) * scale

- The number of a code is the code itself, or what its bits mean in e4m3.
- The zero point is the same for all codes (M of symmetric ones, 0 in e4m3), or an integer of each
  group, packed along the groups as codes are along K.
- A scheme here is that of one weight (`targets.kernels.along`): one scale a row is a group as long
  as the row.

Everything is float32 and exact up to the product with the scale. Operands may be vectors.

e4m3 (Micikevicius et al., "FP8 formats for deep learning", 2022): a sign, four bits of exponent
with bias 7, three of mantissa, no infinities. Numbers are built from integers, so that nothing
depends on a device's float8 types or on how it treats denormals. The two codes of NaN, which are
never stored, read as +-480.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx

from mlc_compile.quantization.scheme import QuantScheme

Expr = Any  # a tirx expression; TVM ships no types
Bind = Callable[[Expr], Expr]

F32, I32, U32 = "float32", "int32", "uint32"

_MANTISSA = 20  # where a code's seven bits stand as the last of the exponent, first of the mantissa
_REBIAS = (127 - 7) << 23
_SMALLEST_NORMAL = 2.0**-6


def _lanes(value: Expr) -> int:
    lanes: int = value.ty.dtype.lanes
    return lanes


def _cast(value: Expr, dtype: str) -> Expr:
    lanes = _lanes(value)
    return tirx.Cast(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def _bits_as(value: Expr, dtype: str) -> Expr:
    lanes = _lanes(value)
    return tirx.reinterpret(dtype if lanes == 1 else f"{dtype}x{lanes}", value)


def _const(number: float, dtype: str, like: Expr) -> Expr:
    value, lanes = tirx.const(number, dtype), _lanes(like)
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def _shifted(word: Expr, right: int) -> Expr:
    """`word` shifted right, or left where `right` is negative."""
    if right == 0:
        return word
    shift = tirx.shift_right if right > 0 else tirx.shift_left
    return shift(word, _const(abs(right), U32, word))


def _itself(value: Expr) -> Expr:
    return value


def constant_zero(scheme: QuantScheme) -> int | None:
    """The zero point of all codes; None where each group has its own."""
    return {"symmetric": scheme.max_int, "e4m3": 0, "affine": None}[scheme.codes]


def e4m3(word: Expr, position: int, bind: Bind = _itself) -> Expr:
    """The float32 number of the eight bits at `position` of a uint32.

    bind: names a value that is used twice.
    """
    magnitude = tirx.bitwise_and(
        _shifted(word, position - _MANTISSA), _const(0x7F << _MANTISSA, U32, word)
    )
    normal = bind(_bits_as(magnitude + _const(_REBIAS, U32, word), F32))
    # With exponent 0 this reads 2^-7 (1 + m / 8) for a subnormal 2^-6 m / 8: twice that, less 2^-6.
    # It is larger than `normal` for all other exponents.
    double = normal * _const(2.0, F32, word) - _const(_SMALLEST_NORMAL, F32, word)
    value = tirx.Select(normal < _const(_SMALLEST_NORMAL, F32, word), double, normal)
    sign = tirx.bitwise_and(_shifted(word, position - 24), _const(0x80000000, U32, word))
    return _bits_as(tirx.bitwise_or(_bits_as(value, U32), sign), F32)


def field(word: Expr, position: Expr, scheme: QuantScheme) -> Expr:
    """The code at bit `position` (uint32, as is `word`)."""
    mask = _const((1 << scheme.bits) - 1, U32, word)
    return tirx.bitwise_and(tirx.shift_right(word, position), mask)


def integer(code: Expr) -> Expr:
    """A code (uint32) as float32: through a signed integer, one instruction everywhere."""
    return _cast(_cast(code, I32), F32)


def number(word: Expr, position: Expr, scheme: QuantScheme, bind: Bind = _itself) -> Expr:
    """The float32 number of the code at bit `position` (uint32, as is `word`)."""
    code = field(word, position, scheme)
    if scheme.codes == "e4m3":
        return e4m3(bind(code), 0, bind)
    return integer(code)


def zero_word(group: Expr, scheme: QuantScheme) -> Expr:
    """Which word of a row of zero points holds that of `group`."""
    return tirx.truncdiv(group, tirx.const(scheme.elems_per_word, group.ty.dtype))


def zero_position(group: Expr, scheme: QuantScheme) -> Expr:
    """The bit (uint32) of that word where it begins."""
    place = tirx.truncmod(group, tirx.const(scheme.elems_per_word, group.ty.dtype))
    return _cast(place * tirx.const(scheme.bits, group.ty.dtype), U32)


def zero_point(load: Callable[[Expr], Expr], group: Expr, scheme: QuantScheme) -> Expr:
    """The zero point of `group` as float32; `load` gives a word of the row's zero points, and is
    called only where they are no constant."""
    constant = constant_zero(scheme)
    if constant is not None:
        return tirx.const(float(constant), F32)
    word = load(zero_word(group, scheme))
    return integer(field(word, zero_position(group, scheme), scheme))


def weight_at(
    k: Expr,
    scheme: QuantScheme,
    words: Callable[[Expr], Expr],
    scales: Callable[[Expr], Expr],
    zeros: Callable[[Expr], Expr],
) -> Expr:
    """Element k of a row in the model dtype, from what loads a word, a scale and, of affine codes,
    a word of zero points of that row: the definition that kernels are faster forms of."""
    group = k // scheme.group_size
    position = (k % scheme.elems_per_word * scheme.bits).astype(U32)
    value = number(words(k // scheme.elems_per_word), position, scheme)
    difference = value - zero_point(zeros, group, scheme)
    # One rounding: the float32 product of a number of 8 bits and a narrower type's scale is exact.
    return (difference * scales(group).astype(F32)).astype(scheme.model_dtype)
