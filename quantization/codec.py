"""Weights to stored tensors and back, for every scheme that packs: the numpy reference.

    scheme's codes   tensors of a weight [N, K], in the order of policy.stored_params
    symmetric, e4m3  q_weight uint32 [N, words], q_scale model dtype [N, groups]
    affine           the same, and q_zero uint32 [N, ceil(groups / elems_per_word)]

In layout "KN" all are transposed. What the codes stand for: levels.py. Scales: "absmax" is MLC's
rule, bit for bit; "signed" uses all codes (group.py) where codes are symmetric and is "absmax"
elsewhere; "mse" is the search of search.py; "auto" is one of the first two (`rule`). All give the
same format. A decoded weight is level * scale, both exact, rounded once to the model dtype.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlc_compile.quantization.group import Array, Float32, element_major, row_chunks
from mlc_compile.quantization.levels import Codes, levels_of
from mlc_compile.quantization.packing import pack, unpack
from mlc_compile.quantization.scheme import Layout, QuantScheme, numpy_dtype
from mlc_compile.quantization.search import search

Scales = Literal["auto", "absmax", "signed", "mse"]
Rule = Literal["absmax", "signed", "mse"]
# Columns that a search works on at least: its sums are loops over a group's elements.
_SEARCH_COLUMNS = 128


def rule(scales: Scales, scheme: QuantScheme) -> Rule:
    """What "auto" is for a scheme; others are themselves.

    "signed" for symmetric codes of up to 4 bits, whose error it lowers by a tenth and more.
    "absmax" for all others: 8 bits gain nothing measurable, and stay what MLC writes.
    """
    if scales != "auto":
        return scales
    return "signed" if scheme.codes == "symmetric" and scheme.bits <= 4 else "absmax"


def encode(
    weight: Array,
    scheme: QuantScheme,
    *,
    layout: Layout | None = None,
    name: str = "weight",
    scales: Scales = "absmax",
    importance: npt.NDArray[np.float32] | None = None,
) -> tuple[Array, ...]:
    """The stored tensors of a weight [N, K] of any floating dtype, which is not changed.

    Rows are independent: encoding blocks of them gives the same bytes.

    layout: the scheme's by default; pass "NK" for an embedding and for experts.
    importance: [K], finite and at least 0: what the squared error of each column counts ("mse").

    Raises:
        InputError: names the tensor `name` for a value that is not finite or that overflows.
    """
    if scheme.is_plain or weight.ndim != 2:
        raise ValueError(f"cannot pack a tensor of {weight.ndim} axes with {scheme.name}")
    n, k = weight.shape
    size, groups, kind = scheme.group_of(k), scheme.num_groups(k), levels_of(scheme)
    scales = rule(scales, scheme)
    columns = None if importance is None else _columns(importance, k, size, groups)
    q_weight = np.empty((n, scheme.num_words(k)), np.uint32)
    q_scale = np.empty((n, groups), numpy_dtype(scheme.model_dtype))
    zeros = np.empty((n, groups), np.uint32) if scheme.has_zeros else None
    for rows in _row_chunks(n, groups, size, scales):
        x = element_major(weight[rows], scheme, name)
        if scales == "absmax":
            levels, scale, zero = kind.absmax(x)
        elif scales == "signed":
            levels, scale, zero = kind.signed(x)
        else:
            repeated = None if columns is None else np.tile(columns, (1, x.shape[1] // groups))
            levels, scale, zero = search(x, repeated, scheme, kind)
        words = pack(kind.codes(levels, zero), scheme.bits, axis=0)
        q_weight[rows] = words.T.reshape(-1, q_weight.shape[1])
        q_scale[rows] = scale.reshape(-1, groups)
        if zeros is not None and zero is not None:
            zeros[rows] = zero.reshape(-1, groups)
    found: tuple[Array, ...] = (q_weight, q_scale)
    if zeros is not None:
        found = (*found, pack_zeros(zeros, scheme))
    if (layout or scheme.layout) == "KN":
        return tuple(np.ascontiguousarray(tensor.T) for tensor in found)
    return found


def decode(
    arrays: tuple[Array, ...],
    scheme: QuantScheme,
    k: int,
    *,
    layout: Layout | None = None,
) -> Array:
    """The weight [N, k] in the model dtype, from what `encode` returns for the same `layout`."""
    if (layout or scheme.layout) == "KN":
        arrays = tuple(tensor.T for tensor in arrays)
    q_weight, q_scale = arrays[:2]
    n, groups = q_scale.shape
    size, kind = scheme.group_of(k), levels_of(scheme)
    result = np.empty((n, k), numpy_dtype(scheme.model_dtype))
    for rows in row_chunks(n, groups * size):
        fields = unpack(q_weight[rows], scheme.bits).reshape(-1, groups, size)
        zero = None
        if scheme.has_zeros:
            zero = unpack_zeros(arrays[2][rows], scheme, groups).astype(np.float32)[..., None]
        levels = kind.read(fields, zero)
        levels *= q_scale[rows].astype(np.float32)[..., None]
        result[rows] = levels.reshape(-1, groups * size)[:, :k]
    return result


def nearest(
    weight: Array,
    arrays: tuple[Array, ...],
    scheme: QuantScheme,
    *,
    layout: Layout | None = None,
) -> Array:
    """The weight [N, k] in the model dtype that the stored scales (and zero points) of `arrays`
    allow at best: `decode` of what `encode` with those scales would have stored.

    Raises InputError as `encode` does.
    """
    if (layout or scheme.layout) == "KN":
        arrays = tuple(tensor.T for tensor in arrays)
    n, k = weight.shape
    q_scale = arrays[1]
    groups, size, kind = scheme.num_groups(k), scheme.group_of(k), levels_of(scheme)
    result = np.empty((n, k), numpy_dtype(scheme.model_dtype))
    for rows in row_chunks(n, groups * size):
        x = element_major(weight[rows], scheme, "weight")
        scale, zero = q_scale[rows].reshape(-1), None
        if scheme.has_zeros:
            zero = unpack_zeros(arrays[2][rows], scheme, groups).astype(np.float32).reshape(-1)
        levels = kind.nearest(x, scale, zero)
        levels *= scale.astype(np.float32)
        result[rows] = levels.T.reshape(-1, groups * size)[:, :k]
    return result


def pack_zeros(zeros: npt.NDArray[np.uint32], scheme: QuantScheme) -> Codes:
    """Zero points uint32 [N, groups] -> words [N, ceil(groups / elems_per_word)]."""
    missing = -zeros.shape[1] % scheme.elems_per_word
    return pack(np.pad(zeros, ((0, 0), (0, missing))), scheme.bits)


def unpack_zeros(words: Array, scheme: QuantScheme, groups: int) -> Codes:
    """Undoes `pack_zeros`."""
    return unpack(words, scheme.bits)[:, :groups]


def _row_chunks(n: int, groups: int, size: int, scales: Rule) -> itertools.chain[slice]:
    if scales != "mse":
        return itertools.chain(row_chunks(n, groups * size))
    step = max(-(-_SEARCH_COLUMNS // groups), 48 * 1024 // (groups * size), 1)
    return itertools.chain(slice(start, min(n, start + step)) for start in range(0, n, step))


def _columns(importance: Float32, k: int, size: int, groups: int) -> Float32:
    """[K] as [size, groups]; padding, whose error is always 0, counts 0."""
    if importance.shape != (k,) or not np.isfinite(importance).all() or importance.min() < 0:
        raise ValueError(f"importance must be {k} finite numbers of 0 and more")
    padded = np.zeros(groups * size, np.float32)
    padded[:k] = importance
    return padded.reshape(groups, size).T
