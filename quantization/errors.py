"""How far stored weights are from their source: sums of squares, the same bits on every path.

A group of a row is summed in float32, eight elements at a time: lane l takes the elements l, l + 8,
l + 16, ... one after the other, then the lanes are added in halves (4, 2, 1). A row is the float64
sum of its groups. Neither the number of rows worked on at once nor their order can be seen, and a
processor does it with vectors (encode_kernels.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlc_compile.quantization.scheme import QuantScheme

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

LANES = 8
_PLAIN_GROUP = 128  # where a row has no groups
_CHUNK = 96 * 1024  # elements worked on at once: their temporaries stay in a core's cache


def square_sums(source: Array, stored: Array | None, scheme: QuantScheme) -> Float64:
    """Of each row [N, K]: the sum of (stored - source)**2, or of source**2 without `stored`.

    scheme: whose groups are summed first. Returns float64 [N]; infinity where float32 is too small.
    """
    n, k = source.shape
    result = np.zeros(n)
    step = max(1, _CHUNK // max(1, k))
    with np.errstate(over="ignore", under="ignore"):
        for start in range(0, n if k else 0, step):
            rows = slice(start, min(n, start + step))
            x = source[rows].astype(np.float32, copy=False)
            if stored is not None:
                x = stored[rows].astype(np.float32, copy=False) - x
            sums = group_sums(np.square(x), group_elements(scheme, k))
            result[rows] = row_sums(sums)
    return result


def group_elements(scheme: QuantScheme, k: int) -> int:
    """Elements that are summed in float32: a group, in rows without groups 128."""
    return scheme.group_of(k) if scheme.bits else _PLAIN_GROUP


def group_sums(squares: Array, size: int) -> Array:
    """float32 [N, groups] of float32 [N, K]."""
    n, k = squares.shape
    groups = -(-k // size)
    lanes = -(-size // LANES)
    if groups * size != k:
        squares = np.pad(squares, ((0, 0), (0, groups * size - k)))
    squares = squares.reshape(n * groups, size)
    if lanes * LANES != size:
        squares = np.pad(squares, ((0, 0), (0, lanes * LANES - size)))
    # Element-major: sums along the first axis are sequential, and run over long rows.
    columns = np.ascontiguousarray(squares.T).reshape(lanes, LANES, n * groups)
    total = columns[0].copy()
    for column in columns[1:]:
        total += column
    for half in (4, 2, 1):
        total = total[:half] + total[half:]
    result: Array = total.reshape(n, groups)
    return result


def row_sums(sums: Array) -> Float64:
    """float64 [N] of float32 [N, groups], added by numpy's own order along a row."""
    result: Float64 = np.sum(np.ascontiguousarray(sums), axis=1, dtype=np.float64)
    return result
