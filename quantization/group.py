"""Symmetric groups in numpy: the plain rules for scales and codes, and narrowing, bit for bit.

Formulas (mlc-format.md, "Group quant, exact"), for group j of a row and M = scheme.max_int:

    scale[j]  = max|w| / M
    q[k]      = clip(round(w[k] / scale[j] + M), 0, 2M)          round half to even
    w'[k]     = (q[k] - M) * scale[j]

Every operation is one rounding in the model dtype, after the weight itself was narrowed to it.

- The arithmetic runs in float32. For float16 and bfloat16 operands this gives the same bits:
  float32 carries 24 >= 2p + 2 significant bits (p = 11 and 8), for which rounding a quotient or a
  sum twice is innocuous (Figueroa, "When is double rounding innocuous?", 1995). The tests compare
  it with plain float16 and bfloat16 arithmetic and with exact rationals.
- A group whose scale is 0 (all zero, or too small for the model dtype) gets q = M: weight 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError
from mlc_compile.quantization.scheme import QuantScheme, numpy_dtype

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

# Elements worked on at once: some temporaries of this size stay in a core's second-level cache.
_CHUNK = 48 * 1024

# |x| at or above this rounds to infinity: the largest finite value plus half of its last digit.
OVERFLOW = {
    "float16": (2 - 2.0**-11) * 2.0**15,
    "bfloat16": (2 - 2.0**-8) * 2.0**127,
    "float32": (2 - 2.0**-24) * 2.0**127,
}


def narrow(weight: Array, dtype: str, *, name: str = "weight") -> Array:
    """`weight` (any shape, a floating dtype) rounded to the model dtype `dtype`.

    Raises InputError naming the tensor when a value is not finite or does not fit `dtype`.
    """
    _check_range(weight, dtype, name)
    return weight.astype(numpy_dtype(dtype), copy=False)


def row_chunks(n: int, row_length: int) -> Iterator[slice]:
    """Slices of `n` rows, of so many that temporaries stay in a cache; results don't depend on
    them."""
    step = max(1, _CHUNK // max(1, row_length))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def element_major(weight: Array, scheme: QuantScheme, name: str) -> Float32:
    """A few rows [n, K] as groups [size, n * groups], narrowed to the model dtype and padded with
    zeros, in float32: maxima, scaling, sums and packing then run along contiguous rows.

    Raises InputError as `narrow` does.
    """
    rows, k = weight.shape
    groups, size = scheme.num_groups(k), scheme.group_of(k)
    narrowed = _narrow_to_float32(weight, scheme.model_dtype, name)
    if groups * size != k:
        narrowed = np.pad(narrowed, ((0, 0), (0, groups * size - k)))
    found: Float32 = np.array(narrowed.reshape(rows * groups, size).T, order="C")
    return found


def absmax(x: Float32, scheme: QuantScheme) -> tuple[npt.NDArray[np.uint32], Array]:
    """(codes [size, columns], scales [columns] in the model dtype) of groups [size, columns] that
    `element_major` made; the formula of this module. Overwrites `x`."""
    top = np.float32(scheme.max_int)
    max_abs = np.abs(np.maximum(x.max(axis=0), -x.min(axis=0)))  # abs: -0.0 must not be stored
    scale = (max_abs / top).astype(numpy_dtype(scheme.model_dtype))
    return _codes(x, scale, scheme, 2 * scheme.max_int), scale


def signed(x: Float32, scheme: QuantScheme) -> tuple[npt.NDArray[np.uint32], Array]:
    """As `absmax`, by the rule that uses all codes (llama.cpp's Q4_0 has it mirrored):

        p     = the weight of largest magnitude, the positive one of two
        scale = p / (M + 1)                                 below 0 where p is
        q[k]  = clip(round(w[k] / scale + M), 0, 2M + 1)    so q = 2M + 1 for p

    Roundings are those of `absmax`. A step is smaller by M / (M + 1), and what lies on the side
    that p is not on is at most M steps away or is clipped to that.
    """
    peak = signed_peak(x) / np.float32(scheme.max_int + 1)
    scale = peak.astype(numpy_dtype(scheme.model_dtype))
    scale[scale == 0] = 0  # -0.0 must not be stored
    return _codes(x, scale, scheme, 2 * scheme.max_int + 1), scale


def signed_peak(x: Float32) -> Float32:
    """The number of largest magnitude in each column; of two the positive one."""
    high, low = x.max(axis=0), x.min(axis=0)
    peak: Float32 = np.where(high >= -low, high, low)
    return peak


def _codes(x: Float32, scale: Array, scheme: QuantScheme, most: int) -> npt.NDArray[np.uint32]:
    """clip(round(x / scale + M), 0, most), each operation rounded to the model dtype."""
    x /= divisor(scale)
    round_fraction(x, scheme.model_dtype)
    x += np.float32(scheme.max_int)
    round_fraction(x, scheme.model_dtype)
    np.rint(x, out=x)
    np.clip(x, 0, most, out=x)
    return x.astype(np.int32).view(np.uint32)


def divisor(scale: Array) -> Float32:
    """The scales in float32, with infinity in place of 0: w / inf = 0 is the code of weight 0."""
    found: Float32 = scale.astype(np.float32)
    found[found == 0] = np.inf
    return found


def _check_range(weight: Array, dtype: str, name: str) -> None:
    """Raises InputError unless every value is finite and stays finite in `dtype`."""
    if weight.size == 0:
        return
    # Without its sign bit a float orders like an unsigned integer, with infinity and NaN on top.
    unsigned = np.dtype(f"u{weight.itemsize}")
    magnitude = np.bitwise_and(weight.view(unsigned), np.iinfo(unsigned).max >> 1)
    peak = float(magnitude.max(keepdims=True).view(weight.dtype).reshape(())[()])
    if peak < OVERFLOW[dtype]:  # False for NaN as well
        return
    if not math.isfinite(peak):
        raise InputError(
            f"tensor '{name}' holds a value that is not finite ({peak})",
            hint="the checkpoint is damaged or its training diverged; use another one",
        )
    raise InputError(
        f"tensor '{name}' holds a value of magnitude {peak:.6g}, which overflows {dtype}",
        hint="choose a scheme with a wider model dtype, such as q4f32_1 or q0f32",
    )


def _narrow_to_float32(weight: Array, dtype: str, name: str) -> Float32:
    """`narrow`, with the result in float32 (it may be `weight` itself)."""
    target = numpy_dtype(dtype)
    if weight.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
        return narrow(weight, dtype, name=name).astype(np.float32)  # float64: round once, not twice
    exact = weight.dtype == target or target == np.float32
    x: Float32 = weight.astype(np.float32, copy=False)
    _check_range(x, dtype, name)
    if exact:
        return x
    if target != np.float16:
        return x.astype(target).astype(np.float32)
    # float32 -> float16 -> float32 without numpy's conversion, which takes eight times as long.
    rounded = x.copy()
    round_fraction(rounded, dtype)
    # Below 2**-14 the grid is even, 2**-24: the spacing of float32 around 0.75.
    np.copyto(rounded, (x + np.float32(0.75)) - np.float32(0.75), where=np.abs(x) < 2.0**-14)
    return rounded


def round_fraction(x: Float32, dtype: str) -> None:
    """Rounds `x` in place to the significant bits of `dtype`, half to even.

    Equals a conversion to `dtype` and back for finite values in its normal range. Quotients and
    sums below that range are rounded more finely, which cannot change q: next to M they vanish.
    """
    dropped = {"e4m3": 20, "float16": 13, "bfloat16": 16, "float32": 0}[dtype]
    if not dropped:
        return
    bits = x.view(np.uint32)
    odd = bits >> np.uint32(dropped)
    odd &= np.uint32(1)
    bits += odd
    bits += np.uint32((1 << (dropped - 1)) - 1)
    bits &= np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
