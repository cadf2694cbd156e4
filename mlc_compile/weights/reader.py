"""What every weight reader offers: named tensors, memory-mapped, read by rows."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError

Array = npt.NDArray[Any]

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
    """The side of a file format that the rest of the toolchain sees."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def files(self) -> tuple[Path, ...]: ...

    def read(self, name: str, rows: slice | None = None) -> Array: ...

    def release(self) -> None: ...


class MappedFile:
    """A whole file, mapped read-only. Raises InputError if it can't be or has no bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read {path}: {reason}") from error
        self.size = len(self._map)
        self.view = memoryview(self._map)

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array:
        """A read-only view of `shape` elements of `dtype`, `offset` bytes into the file."""
        count = int(np.prod(shape, dtype=np.int64))
        if count == 0:
            return np.empty(shape, dtype)
        return np.frombuffer(self._map, dtype, count, offset).reshape(shape)

    def release(self) -> None:
        """Let the system drop the pages read so far. Views stay valid: pages are read again.

        Without it, everything read from a large checkpoint counts as this process's memory.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


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
