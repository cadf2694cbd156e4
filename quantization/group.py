"""Symmetric group quantisation in numpy: the reference of every faster path, bit for bit.

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
from mlc_compile.quantization.packing import pack, unpack
from mlc_compile.quantization.scheme import Layout, QuantScheme, numpy_dtype

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

# Elements worked on at once: some temporaries of this size stay in a core's second-level cache.
_CHUNK = 48 * 1024

# |x| at or above this rounds to infinity: the largest finite value plus half of its last digit.
_OVERFLOW = {
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


def quantize(
    weight: Array, scheme: QuantScheme, *, layout: Layout | None = None, name: str = "weight"
) -> tuple[npt.NDArray[np.uint32], Array]:
    """Packs a weight [N, K] of any floating dtype.

    layout: the scheme's by default; pass "NK" for an embedding.
    Returns (q_weight uint32 [N, words], q_scale model_dtype [N, groups]), both transposed in
    layout "KN".
    Raises InputError naming the tensor `name` for a value that is not finite or that overflows.
    """
    if scheme.is_plain or weight.ndim != 2:
        raise ValueError(f"cannot pack a tensor of {weight.ndim} axes with {scheme.name}")
    n, k = weight.shape
    q_weight = np.empty((n, scheme.num_words(k)), np.uint32)
    q_scale = np.empty((n, scheme.num_groups(k)), numpy_dtype(scheme.model_dtype))
    for rows in _row_chunks(n, scheme.num_groups(k) * scheme.group_size):
        q_weight[rows], q_scale[rows] = _quantize_rows(weight[rows], scheme, name)
    if (layout or scheme.layout) == "KN":
        return np.ascontiguousarray(q_weight.T), np.ascontiguousarray(q_scale.T)
    return q_weight, q_scale


def dequantize(
    q_weight: npt.NDArray[np.uint32],
    q_scale: Array,
    scheme: QuantScheme,
    k: int,
    *,
    layout: Layout | None = None,
) -> Array:
    """The weight [N, k] in the model dtype, from what `quantize` returns for the same `layout`."""
    if (layout or scheme.layout) == "KN":
        q_weight, q_scale = q_weight.T, q_scale.T
    n, groups = q_scale.shape
    result = np.empty((n, k), numpy_dtype(scheme.model_dtype))
    for rows in _row_chunks(n, groups * scheme.group_size):
        fields = unpack(q_weight[rows], scheme.bits).astype(np.float32)
        fields -= np.float32(scheme.max_int)
        grouped = fields.reshape(-1, groups, scheme.group_size)
        grouped *= q_scale[rows].astype(np.float32)[..., None]
        result[rows] = grouped.reshape(fields.shape)[:, :k]
    return result


def _row_chunks(n: int, row_length: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(1, row_length))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def _quantize_rows(
    weight: Array, scheme: QuantScheme, name: str
) -> tuple[npt.NDArray[np.uint32], Array]:
    """`quantize` for a few rows, layout "NK"."""
    rows, k = weight.shape
    groups, size, top = scheme.num_groups(k), scheme.group_size, np.float32(scheme.max_int)
    narrowed = _narrow_to_float32(weight, scheme.model_dtype, name)
    if groups * size != k:
        narrowed = np.pad(narrowed, ((0, 0), (0, groups * size - k)))
    # Element-major [size, rows * groups]: maxima, scaling and packing run along contiguous rows.
    x = np.ascontiguousarray(narrowed.reshape(rows * groups, size).T)
    max_abs = np.abs(np.maximum(x.max(axis=0), -x.min(axis=0)))  # abs: -0.0 must not be stored
    scale = (max_abs / top).astype(numpy_dtype(scheme.model_dtype))
    divisor = scale.astype(np.float32)
    divisor[divisor == 0] = np.inf  # w / inf = 0, so that q = M
    x /= divisor
    _round_fraction(x, scheme.model_dtype)
    x += top
    _round_fraction(x, scheme.model_dtype)
    np.rint(x, out=x)
    np.clip(x, 0, 2 * top, out=x)
    words = pack(x.astype(np.int32).view(np.uint32), scheme.bits, axis=0)
    return words.T.reshape(rows, groups * scheme.words_per_group), scale.reshape(rows, groups)


def _check_range(weight: Array, dtype: str, name: str) -> None:
    """Raises InputError unless every value is finite and stays finite in `dtype`."""
    if weight.size == 0:
        return
    # Without its sign bit a float orders like an unsigned integer, with infinity and NaN on top.
    unsigned = np.dtype(f"u{weight.itemsize}")
    magnitude = np.bitwise_and(weight.view(unsigned), np.iinfo(unsigned).max >> 1)
    peak = float(magnitude.max(keepdims=True).view(weight.dtype).reshape(())[()])
    if peak < _OVERFLOW[dtype]:  # False for NaN as well
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
    _round_fraction(rounded, dtype)
    # Below 2**-14 the grid is even, 2**-24: the spacing of float32 around 0.75.
    np.copyto(rounded, (x + np.float32(0.75)) - np.float32(0.75), where=np.abs(x) < 2.0**-14)
    return rounded


def _round_fraction(x: Float32, dtype: str) -> None:
    """Rounds `x` in place to the significant bits of `dtype`, half to even.

    Equals a conversion to `dtype` and back for finite values in its normal range. Quotients and
    sums below that range are rounded more finely, which cannot change q: next to M they vanish.
    """
    dropped = {"float16": 13, "bfloat16": 16, "float32": 0}[dtype]
    if not dropped:
        return
    bits = x.view(np.uint32)
    odd = bits >> np.uint32(dropped)
    odd &= np.uint32(1)
    bits += odd
    bits += np.uint32((1 << (dropped - 1)) - 1)
    bits &= np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
