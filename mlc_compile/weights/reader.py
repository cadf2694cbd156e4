"""What every weight reader offers: named tensors, memory-mapped, read by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlc_compile.quantization.hold import Packed, PackedInfo
from mlc_compile.weights.files import Location, MappedFile

__all__ = [
    "QUANTISATION_KEYS",
    "Array",
    "MappedFile",
    "Packed",
    "PackedInfo",
    "Rows",
    "TensorInfo",
    "TensorReader",
    "Unpacked",
    "numpy_dtype",
    "row_numbers",
    "row_range",
]

Array = npt.NDArray[Any]

Rows: TypeAlias = "slice | Array | None"
"""Some rows of a matrix: a slice of step 1, their numbers in any order, or all."""

QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Of a config.json whose tensors are packed (packed_source.py)."""

_EXTENSION_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype called `name`; bfloat16 and the float8 kinds are those of ml_dtypes."""
    return _EXTENSION_DTYPES.get(name) or np.dtype(name)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as it is stored.

    `shape` is in elements, outermost first ([out, in] for a linear weight). `dtype` is a numpy or
    ml_dtypes name, or a GGML block type such as "Q4_1", which reads as float32. `nbytes` is what
    it takes in `file` (a plain file name).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str


class TensorReader(Protocol):
    """The side of a file format that the rest of the toolchain sees.

    Attributes:
        packed: those of `tensors` that can also be read as codes and scales. `read` gives their
            dequantised rows in float32, rounded as the format's own reference rounds them.
        notes: what of the source is not carried over, for the user.
    """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def files(self) -> tuple[Location, ...]: ...

    @property
    def packed(self) -> Mapping[str, PackedInfo]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def read(self, name: str, rows: slice | None = None) -> Array: ...

    def read_packed(self, name: str, rows: Rows = None) -> Packed: ...

    def release(self) -> None: ...


class Unpacked:
    """The part of `TensorReader` about packed tensors, of a format that has none."""

    packed: Mapping[str, PackedInfo] = MappingProxyType({})
    notes: tuple[str, ...] = ()

    def read_packed(self, name: str, rows: Rows = None) -> Packed:
        raise ValueError(f"{name} is not packed")


def row_range(info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    """`rows` as start and stop along axis 0, clipped as Python slices are; steps are refused."""
    if not info.shape:
        if rows is None:
            return 0, 1
        raise ValueError(f"{info.name} is a scalar and has no rows")
    if rows is None:
        return 0, info.shape[0]
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows of {info.name} are read in order, not with step {step}")
    return start, max(start, stop)


def row_numbers(info: TensorInfo, rows: Rows) -> Array:
    """`rows` of a tensor as their numbers; IndexError for a number that is out of range."""
    if rows is None or isinstance(rows, slice):
        return np.arange(*row_range(info, rows))
    if rows.size and not 0 <= int(rows.min()) <= int(rows.max()) < info.shape[0]:
        raise IndexError(f"{info.name} has {info.shape[0]} rows")
    return rows
