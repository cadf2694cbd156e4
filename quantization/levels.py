"""What the codes of a group stand for, in numpy: one class for each `QuantScheme.codes`.

A weight is decoded as `level * s`: s the scale of its group in the model dtype, the level a small
number that a code stands for. Each class says how levels become codes and back, how the plain rule
("absmax") chooses scale, zero point and levels of a group, which other scales a search should try
(search.py), and which level is nearest to a weight.

Arrays are element-major: weights, levels and codes [size, columns], a column a group; scales and
zero points [columns]. All arithmetic is float32, an operation a rounding, half to even; where a
scale is 0, weights are divided by infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlc_compile.quantization.group import (
    Array,
    Float32,
    absmax,
    divisor,
    round_fraction,
    signed,
    signed_peak,
)
from mlc_compile.quantization.scheme import QuantScheme, numpy_dtype

Codes = npt.NDArray[np.uint32]

E4M3_MAX = 448.0
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
# Divisors of a group's largest weight that a search tries (found by measurement; the first best
# counts). The range of symmetric codes is M for one sign and M + 1 for the other: the scale has the
# sign that gives the largest weight the longer side. Below it are scales that no weight needs in
# full, above it those that clip. Those far above serve groups whose largest weights matter little.
_FEW_BITS = tuple(quarter / 4 for quarter in (*range(-3, 9), 10, 12, 16, 24))
_EIGHT_BITS = tuple(float(step) for step in range(-8, 9))
_AFFINE = (-3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 9.0)
_E4M3_DIVISORS = tuple(float(top) for top in range(224, 481, 16))


class Levels(Protocol):
    """How the codes of a scheme are chosen and read."""

    def absmax(self, x: Float32) -> tuple[Float32, Array, Float32 | None]:
        """(levels, scales in the model dtype, zero points or None) by the plain rule. May overwrite
        `x`."""
        ...

    def signed(self, x: Float32) -> tuple[Float32, Array, Float32 | None]:
        """As `absmax` by the rule that uses all symmetric codes; other kinds do already."""
        ...

    def candidates(self, x: Float32) -> Iterator[tuple[Array, Float32 | None]]:
        """Scales, in the model dtype, and zero points to try, in the order in which they count."""
        ...

    def nearest(self, x: Float32, scale: Array, zero: Float32 | None) -> Float32:
        """The level nearest to each weight."""
        ...

    def codes(self, levels: Float32, zero: Float32 | None) -> Codes:
        """The codes that stand for levels."""
        ...

    def read(self, codes: npt.NDArray[Any], zero: Float32 | None) -> Float32:
        """The levels that codes (any shape; zero points that broadcast) stand for."""
        ...


class Symmetric:
    """level = q - M. The rules "absmax" and "signed" are group.py's; the latter and a search also
    use the code 2M + 1, and scales below 0.

        nearest    clip(rint(w / s), -M, M + 1)
        candidates s = p / (M + d) rounded to the model dtype, p the weight of largest magnitude
                   (of two the positive one)
    """

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self.top = np.float32(scheme.max_int)

    def absmax(self, x: Float32) -> tuple[Float32, Array, None]:
        codes, scale = absmax(x, self.scheme)
        return self.read(codes, None), scale, None

    def signed(self, x: Float32) -> tuple[Float32, Array, None]:
        codes, scale = signed(x, self.scheme)
        return self.read(codes, None), scale, None

    def candidates(self, x: Float32) -> Iterator[tuple[Array, None]]:
        peak = signed_peak(x)
        for divisor_of_peak in candidate_divisors(self.scheme):
            yield _narrowed(peak / divisor_of_peak, self.scheme), None

    def nearest(self, x: Float32, scale: Array, zero: Float32 | None) -> Float32:
        level = x / divisor(scale)
        np.rint(level, out=level)
        return np.clip(level, -self.top, self.top + 1, out=level)

    def codes(self, levels: Float32, zero: Float32 | None) -> Codes:
        return (levels + self.top).astype(np.int32).view(np.uint32)

    def read(self, codes: npt.NDArray[Any], zero: Float32 | None) -> Float32:
        levels: Float32 = codes.astype(np.float32)
        levels -= self.top
        return levels


def candidate_divisors(scheme: QuantScheme) -> Float32:
    """What a search divides the peak of a group of symmetric codes by, in order."""
    offsets = np.array(_EIGHT_BITS if scheme.bits == 8 else _FEW_BITS, np.float32)
    return np.float32(scheme.max_int) + offsets


class Affine:
    """level = q - z, with q and z whole numbers from 0 to T = 2**bits - 1.

    high, low = max(w, 0), min(w, 0) over the group
    absmax     s = high / T - low / T rounded to the model dtype, z = clip(rint(-low / s), 0, T)
    candidates s = high / D - low / D rounded likewise, D = T + d, with the range's middle at the
               codes' middle: z = clip(rint(T / 2 - (high + low) / s / 2), 0, T)
    nearest    clip(rint(w / s) + z, 0, T) - z
    """

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme
        self.top = np.float32((1 << scheme.bits) - 1)

    def absmax(self, x: Float32) -> tuple[Float32, Array, Float32]:
        high, low = self._range(x)
        scale = _narrowed(high / self.top - low / self.top, self.scheme)
        zero: Float32 = np.clip(np.rint(-low / divisor(scale)), 0, self.top)
        return self.nearest(x, scale, zero), scale, zero

    def signed(self, x: Float32) -> tuple[Float32, Array, Float32]:
        return self.absmax(x)

    def candidates(self, x: Float32) -> Iterator[tuple[Array, Float32]]:
        high, low = self._range(x)
        for offset in _AFFINE:
            count = self.top + np.float32(offset)
            scale = _narrowed(high / count - low / count, self.scheme)
            middle = self.top / 2 - (high + low) / divisor(scale) / 2
            yield scale, np.clip(np.rint(middle), 0, self.top)

    def nearest(self, x: Float32, scale: Array, zero: Float32 | None) -> Float32:
        assert zero is not None
        level = x / divisor(scale)
        np.rint(level, out=level)
        level += zero
        np.clip(level, 0, self.top, out=level)
        level -= zero
        return level

    def codes(self, levels: Float32, zero: Float32 | None) -> Codes:
        assert zero is not None
        return (levels + zero).astype(np.int32).view(np.uint32)

    def read(self, codes: npt.NDArray[Any], zero: Float32 | None) -> Float32:
        assert zero is not None
        levels: Float32 = codes.astype(np.float32)
        levels -= zero
        return levels

    def _range(self, x: Float32) -> tuple[Float32, Float32]:
        """Of each column with 0 in it, so that 0 is always among the values."""
        zero = np.float32(0)
        return np.maximum(x.max(axis=0), zero), np.minimum(x.min(axis=0), zero)


class E4M3:
    """level = the float8 (4 exponent bits, bias 7, 3 mantissa bits, no infinity) of the code byte.

        absmax     s = max|w| / 448 rounded to the model dtype
        candidates s = max|w| / D rounded likewise
        nearest    clip(w / s, -448, 448) rounded to float8, half to even; zeros keep their sign

    So the code 0x7f or 0xff (NaN) is never written.
    """

    def __init__(self, scheme: QuantScheme) -> None:
        self.scheme = scheme

    def absmax(self, x: Float32) -> tuple[Float32, Array, None]:
        scale = _narrowed(_largest(x) / np.float32(E4M3_MAX), self.scheme)
        return self.nearest(x, scale, None), scale, None

    def signed(self, x: Float32) -> tuple[Float32, Array, None]:
        return self.absmax(x)

    def candidates(self, x: Float32) -> Iterator[tuple[Array, None]]:
        largest = _largest(x)
        for top in _E4M3_DIVISORS:
            yield _narrowed(largest / np.float32(top), self.scheme), None

    def nearest(self, x: Float32, scale: Array, zero: Float32 | None) -> Float32:
        level = x / divisor(scale)
        np.clip(level, -E4M3_MAX, E4M3_MAX, out=level)
        # Below 2**-6 float8 is even, 2**-9: the spacing of float32 between 2**14 and 2**15. The
        # sign of a zero is lost there and set again.
        even = np.float32(1.5 * 2.0**14)
        small = np.copysign((level + even) - even, level)
        tiny = np.abs(level) < 2.0**-6
        round_fraction(level, "e4m3")
        np.copyto(level, small, where=tiny)
        return level

    def codes(self, levels: Float32, zero: Float32 | None) -> Codes:
        return levels.astype(_E4M3).view(np.uint8).astype(np.uint32)

    def read(self, codes: npt.NDArray[Any], zero: Float32 | None) -> Float32:
        levels: Float32 = codes.astype(np.uint8).view(_E4M3).astype(np.float32)
        return levels


def levels_of(scheme: QuantScheme) -> Levels:
    """How the codes of `scheme`, which packs, are chosen and read."""
    kinds: dict[str, Callable[[QuantScheme], Levels]] = {
        "symmetric": Symmetric,
        "affine": Affine,
        "e4m3": E4M3,
    }
    return kinds[scheme.codes](scheme)


def _largest(x: Float32) -> Float32:
    """max|w| of each column, never -0.0."""
    found: Float32 = np.abs(np.maximum(x.max(axis=0), -x.min(axis=0)))
    return found


def _narrowed(scale: Float32, scheme: QuantScheme) -> Array:
    """Scales in the model dtype, never -0.0."""
    found: Array = scale.astype(numpy_dtype(scheme.model_dtype))
    found[found == 0] = 0
    return found
