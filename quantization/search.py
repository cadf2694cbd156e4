"""The scale of a group by search ("mse"): least squared error in place of a plain rule.

For each group, in this order, a later one counting only where its error is smaller (so that the
first of equals stays, and what comes out is never worse than the plain rules):

1. The scales that `Levels.candidates` gives, each with its nearest levels; the best one goes on.
2. The least-squares scale of its levels, sum(m w l) / sum(m l l), rounded to the model dtype, with
   the nearest levels anew.
3. Of "absmax", "signed" (symmetric codes only), 1 and 2 the one with the least error.

The error of 1 is sum(m e e) with e = w - l s; in 3, l s is rounded to the model dtype as every
runtime decodes it. w are weights narrowed to the model dtype, m the importance of their column
(1 where none is given), l levels and s scales. Everything is float32, an operation a rounding, in
the order ((e e) m), ((w l) m), ((l l) m); sums run over the group's elements from the first to the
last, one after the other. So a compiled version can give the same bits.
"""

from __future__ import annotations

import numpy as np

from mlc_compile.quantization.group import Array, Float32
from mlc_compile.quantization.levels import Levels
from mlc_compile.quantization.scheme import QuantScheme, numpy_dtype


def search(
    x: Float32, importance: Float32 | None, scheme: QuantScheme, kind: Levels
) -> tuple[Float32, Array, Float32 | None]:
    """(levels [size, columns], scales [columns] in the model dtype, zero points [columns] or None)
    of groups [size, columns] that `group.element_major` made.

    importance: [size, columns], at least 0; None is 1 everywhere.
    """
    # Weights near the largest float32 have errors whose square is infinite; such never count.
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        return _search(x, importance, scheme, kind)


def _search(
    x: Float32, importance: Float32 | None, scheme: QuantScheme, kind: Levels
) -> tuple[Float32, Array, Float32 | None]:
    tried = kind.candidates(x)
    scale, zero = next(tried)
    best = _error(x, kind.nearest(x, scale, zero), scale, importance)
    for other, other_zero in tried:
        error = _error(x, kind.nearest(x, other, other_zero), other, importance)
        better = error < best
        np.copyto(best, error, where=better)
        np.copyto(scale, other, where=better)
        if zero is not None and other_zero is not None:
            np.copyto(zero, other_zero, where=better)
    found = kind.nearest(x, scale, zero)
    refined = _least_squares(x, found, scale, importance)
    results = [(found, scale, zero), (kind.nearest(x, refined, zero), refined, zero)]
    if scheme.codes == "symmetric":
        results.insert(0, kind.signed(x.copy()))
    levels, chosen, chosen_zero = kind.absmax(x.copy())
    best = _error(x, levels, chosen, importance, scheme.model_dtype)
    for other_levels, other, other_zero in results:
        error = _error(x, other_levels, other, importance, scheme.model_dtype)
        better = error < best
        np.copyto(best, error, where=better)
        np.copyto(levels, other_levels, where=better)
        np.copyto(chosen, other, where=better)
        if chosen_zero is not None and other_zero is not None:
            np.copyto(chosen_zero, other_zero, where=better)
    return levels, chosen, chosen_zero


def _error(
    x: Float32,
    levels: Float32,
    scale: Array,
    importance: Float32 | None,
    round_to: str | None = None,
) -> Float32:
    """sum(m e e) of each column, e = w - l s, l s rounded to the dtype `round_to` if given."""
    e = levels * scale.astype(np.float32)
    if round_to is not None:
        e = e.astype(numpy_dtype(round_to)).astype(np.float32)
    np.subtract(x, e, out=e)
    e *= e
    if importance is not None:
        e *= importance
    return _sum(e)


def _least_squares(x: Float32, levels: Float32, scale: Array, importance: Float32 | None) -> Array:
    """The scale in the model dtype with the least error for these levels; `scale` where there is
    none."""
    product, square = x * levels, levels * levels
    if importance is not None:
        product *= importance
        square *= importance
    above, below = _sum(product), _sum(square)
    below[below == 0] = np.inf
    found = (above / below).astype(scale.dtype)
    wide = found.astype(np.float32)
    return np.where(np.isfinite(wide) & (wide != 0), found, scale)


def _sum(x: Float32) -> Float32:
    """Sum over axis 0 in order: numpy's own may go in pairs."""
    total: Float32 = x[0].copy()
    for row in x[1:]:
        total += row
    return total
