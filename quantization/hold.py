"""Weights that a checkpoint holds as codes already, kept as they are where a scheme can.

A packed tensor [N, K] is codes with a scale for each run of `group_size` columns of a row:

    affine   w = (code - zero) * scale      code and zero are unsigned integers
    e4m3     w = e4m3fn(code) * scale

`holds` says from a description alone whether a scheme represents the same codes and scales;
`hold` lays them out as that scheme stores them. Nothing is measured or rounded on the way, but for
a scale that the model dtype lacks the digits of (`losses` says so).

- A symmetric scheme stands for codes -M..M+1. Codes down to -M-1, which int4 and int8 have, fit
  with the group's scale negated: (-c) * (-s).
- A source's longer groups are several groups of the scheme with equal scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError
from mlc_compile.quantization.codec import pack_zeros
from mlc_compile.quantization.group import narrow
from mlc_compile.quantization.packing import pack
from mlc_compile.quantization.scheme import SCHEMES, Layout, QuantScheme

Array = npt.NDArray[Any]

_LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2.0**-7) * 2.0**127, "float32": 2.0**127}
# Scale dtypes of checkpoints whose every value each model dtype has.
_EXACT = {
    "float16": {"float16"},
    "bfloat16": {"bfloat16", "float8_e8m0fnu"},
    "float32": {"float16", "bfloat16", "float8_e8m0fnu", "float32"},
}


@dataclass(frozen=True)
class PackedInfo:
    """What is known of a packed tensor before it is read.

    bits: width of a code; affine codes are below 2**bits.
    group_size: columns that share a scale; 0 is the whole row.
    scale_dtype: as stored in the checkpoint.
    symmetric_zero: the zero point of every group; None where each group has its own.
    """

    codes: Literal["affine", "e4m3"]
    bits: int
    group_size: int
    scale_dtype: str
    symmetric_zero: int | None = None

    @property
    def span(self) -> tuple[int, int]:
        """The least and the greatest `code - zero` of affine codes."""
        top = (1 << self.bits) - 1
        zero = self.symmetric_zero
        return (-top, top) if zero is None else (-zero, top - zero)

    def __str__(self) -> str:
        kind = "e4m3 codes" if self.codes == "e4m3" else f"{self.bits}-bit codes"
        group = f"groups of {self.group_size}" if self.group_size else "a scale a row"
        own = self.codes == "affine" and self.symmetric_zero is None
        return f"{kind}, {group}" + (", zero points" if own else "")


@dataclass(frozen=True)
class Packed:
    """Rows of a packed tensor.

    codes: uint8 [n, k]. scales: float32 [n, groups], finite or not as the file has them.
    zeros: uint8 [n, groups]; None where `PackedInfo.symmetric_zero` is every group's.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.uint8] | None = None


def values(packed: Packed, info: PackedInfo) -> npt.NDArray[np.float32]:
    """The weights [n, k]: one float32 product each, not rounded to the scales' dtype."""
    size = info.group_size or packed.codes.shape[1]
    k = packed.codes.shape[1]
    if info.codes == "e4m3":
        e4m3: Array = packed.codes.view(ml_dtypes.float8_e4m3fn)
        numbers = e4m3.astype(np.float32)
    else:
        numbers = packed.codes.astype(np.float32)
        if packed.zeros is None:
            numbers -= np.float32(_zero(info))
        else:
            numbers -= _spread(packed.zeros, size, k).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # not finite, which is refused elsewhere
        numbers *= _spread(packed.scales, size, k)
    return numbers


def holds(info: PackedInfo, scheme: QuantScheme) -> bool:
    """Whether `scheme` represents every tensor of this kind without changing a code."""
    if scheme.is_plain or scheme.codes == "e4m3" or info.codes == "e4m3":
        same = not scheme.is_plain and scheme.codes == info.codes == "e4m3"
    elif scheme.codes == "affine":
        same = info.bits <= scheme.bits
    else:
        low, high = info.span
        top = scheme.max_int
        same = (low >= -top and high <= top + 1) or (low >= -top - 1 and high <= top)
    if scheme.group_size == 0:
        return same and info.group_size == 0
    return same and info.group_size % scheme.group_size == 0


def hold(
    packed: Packed,
    info: PackedInfo,
    scheme: QuantScheme,
    *,
    layout: Layout | None = None,
    name: str = "weight",
) -> tuple[Array, ...] | None:
    """The arrays that `scheme` stores for these rows, in the order of `stored_params`.

    None where `holds` is false: dequantise and encode then.
    Raises InputError naming the tensor for a scale or a weight that is not finite in the model
    dtype.
    """
    if not holds(info, scheme):
        return None
    n, k = packed.codes.shape
    groups = scheme.num_groups(k)
    width = scheme.num_words(k) * scheme.elems_per_word  # the row with its padding
    scales = _regroup(packed.scales, info, scheme, groups)
    zeros = None if packed.zeros is None else _regroup(packed.zeros, info, scheme, groups)
    extra: tuple[Array, ...] = ()
    if scheme.codes == "symmetric":
        fields, scales = _symmetric(packed.codes, zeros, scales, info, scheme.max_int, width)
    elif scheme.codes == "affine":
        zeros = np.full((n, groups), _zero(info), np.uint8) if zeros is None else zeros
        size = width // groups
        fields = np.repeat(zeros, size, axis=1)  # padding stands for 0
        fields[:, :k] = packed.codes
        extra = (pack_zeros(zeros, scheme),)
    else:
        fields = np.pad(packed.codes, ((0, 0), (0, width - k)))
    _check_products(packed, info, scheme, name)
    stored = narrow(scales, scheme.model_dtype, name=name)
    found: tuple[Array, ...] = (pack(fields, scheme.bits), stored, *extra)
    if (layout or scheme.layout) == "KN":
        return tuple(np.ascontiguousarray(array.T) for array in found)
    return found


def _symmetric(
    codes: Array, zeros: Array | None, scales: Array, info: PackedInfo, top: int, width: int
) -> tuple[Array, Array]:
    """Fields [n, width] of a symmetric scheme and the scales, negated where that is needed."""
    (n, k), groups = codes.shape, scales.shape[1]
    signed = np.zeros((n, width), np.int16)
    signed[:, :k] = codes
    grouped = signed.reshape(n, groups, width // groups)
    if zeros is None:
        signed[:, :k] -= np.int16(_zero(info))
    else:
        grouped -= zeros.astype(np.int16)[..., None]
        signed[:, k:] = 0
    if info.span[0] < -top:
        flipped = grouped.min(axis=2) < -top
        sign = np.where(flipped, np.int16(-1), np.int16(1))
        grouped *= sign[..., None]
        scales = scales * sign.astype(np.float32)
    signed += np.int16(top)
    return signed.astype(np.uint8), scales


def _regroup(array: Array, info: PackedInfo, scheme: QuantScheme, groups: int) -> Array:
    """[n, groups of the source] -> [n, groups of the scheme]."""
    if info.group_size == scheme.group_size:
        return array
    if info.group_size == 0:
        return np.repeat(array, groups, axis=1)
    return array[:, np.arange(groups) * scheme.group_size // info.group_size]


def _spread(array: Array, size: int, k: int) -> Array:
    """[n, groups] -> [n, k], each value `size` times."""
    return np.repeat(array, size, axis=1)[:, :k]


def _zero(info: PackedInfo) -> int:
    if info.symmetric_zero is None:
        raise ValueError(f"zero points are missing from a tensor of {info}")
    return info.symmetric_zero


def _check_products(packed: Packed, info: PackedInfo, scheme: QuantScheme, name: str) -> None:
    """InputError unless every weight is finite and stays so in the model dtype."""
    if packed.codes.size == 0:
        return
    if info.codes == "e4m3" and bool(((packed.codes & 0x7F) == 0x7F).any()):
        raise InputError(
            f"tensor '{name}' holds a value that is not finite (nan)",
            hint="the checkpoint is damaged or its training diverged; use another one",
        )
    largest = 448 if info.codes == "e4m3" else max(abs(end) for end in info.span)
    peak = float(np.abs(packed.scales).max()) * largest  # nan stays nan
    if not peak <= _LARGEST[scheme.model_dtype]:
        narrow(packed.scales, scheme.model_dtype, name=name)
        narrow(values(packed, info), scheme.model_dtype, name=name)


def holding_schemes(info: PackedInfo) -> tuple[str, ...]:
    """The schemes that hold this kind of tensor, the smallest first; float16 before others."""
    order = {"float16": 0, "bfloat16": 1, "float32": 2}
    found = [scheme for scheme in SCHEMES.values() if holds(info, scheme)]
    found.sort(
        key=lambda s: (s.bits, order[s.model_dtype], s.layout != "NK", -(s.group_size or 1 << 30))
    )
    return tuple(scheme.name for scheme in found)


def losses(tensors: Iterable[tuple[PackedInfo, QuantScheme]]) -> tuple[str, ...]:
    """Warnings about packed tensors and the scheme that each will have: what is lost, and what
    would keep it. Empty when every code and scale is kept.
    """
    found = []
    for (info, scheme), count in Counter(tensors).items():
        what = f"{count} weights of {info}" if count > 1 else f"a weight of {info}"
        if scheme.is_plain:
            continue  # dequantised, which is what was asked for
        if holds(info, scheme):
            if info.scale_dtype not in _EXACT[scheme.model_dtype]:
                found.append(
                    f"{what}: the codes are kept by {scheme.name}, the {info.scale_dtype} scales "
                    f"are rounded to {scheme.model_dtype}"
                )
            continue
        better = holding_schemes(info)
        remedy = f"{better[0]} keeps them as they are" if better else "no scheme keeps them"
        found.append(
            f"{what}: dequantised and quantised again with {scheme.name}, which loses precision "
            f"a second time; {remedy}"
        )
    return tuple(found)
