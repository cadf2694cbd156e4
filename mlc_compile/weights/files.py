"""Files that a checkpoint is made of, on this machine or elsewhere, as the readers see them.

- Only regular files are opened (a symbolic link to one is one): a FIFO or a device under a file's
  name is an error, not a wait without end.
- `open_file` gives a file's bytes by offset: mapped where it is local, fetched by ranges where it
  is not (remote.py). `source_file` is the same file as something to be hashed and to be watched.
- `locate` says where a path or a URL leads, `is_gguf` what a file's first bytes say it is.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError
from mlc_compile.weights.on_demand import on_demand

if TYPE_CHECKING:
    from mlc_compile.weights.remote import RemotePath

Array = npt.NDArray[Any]

Location: TypeAlias = "Path | RemotePath"
"""Where a file or a directory is. A RemotePath has the part of Path's interface that is used."""

GGUF_MAGIC = b"GGUF"

_locate_url: Callable[[str], Location] = on_demand("mlc_compile.weights.remote:locate_url")


class UnreadableError(InputError):
    """A file that was there could not be read on: a disk or a network failed, not the data."""


class TensorFile(Protocol):
    """A file's bytes by offset. What is asked for must lie inside `size`."""

    @property
    def path(self) -> Location: ...

    @property
    def size(self) -> int: ...

    def bytes(self, offset: int, nbytes: int) -> memoryview: ...

    def array(self, dtype: np.dtype[Any], shape: tuple[int, ...], offset: int) -> Array: ...

    def release(self) -> None: ...


class SourceFile(Protocol):
    """A file that something was made from.

    Attributes:
        name: without folders, for the manifest.
        identity: another one when the content may be another; never holds a secret.
        path: of a local file.
    """

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def identity(self) -> str: ...

    @property
    def path(self) -> Path | None: ...

    def readinto(self, offset: int, buffer: memoryview) -> int:
        """Reads from `offset` on; how many bytes came, 0 at the end. InputError on failure."""

    def check(self) -> None:
        """Raises InputError if this is no longer the file that was opened."""


def _madvise() -> Any:
    """madvise(address, length, advice); None where the C library has none."""
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # TypeError: Windows
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_MADVISE = _madvise()


def open_regular(path: Path) -> int:
    """A descriptor of a regular file, for reading. InputError for whatever else is there."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer before it can be seen to be one.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot read {path}: {reason}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise InputError(f"cannot read {path}: it is not a regular file")
    return handle


class MappedFile:
    """A whole file, mapped read-only. Raises InputError if it can't be or has no bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        handle = open_regular(path)
        try:
            self._map = mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # ValueError: an empty file can't be mapped
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read {path}: {reason}") from error
        finally:
            os.close(handle)
        self.size = len(self._map)
        self.view = memoryview(self._map)
        self._address = np.frombuffer(self._map, np.uint8).ctypes.data

    def bytes(self, offset: int, nbytes: int) -> memoryview:
        """So many bytes, as a view of the file."""
        return self.view[offset : offset + nbytes]

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
        if _MADVISE is not None:  # of the C library: mmap's own holds the GIL meanwhile
            _MADVISE(self._address, self.size, mmap.MADV_DONTNEED)
        elif hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class LocalFile:
    """A file of this machine as a SourceFile. Raises InputError if it is no regular file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        found = self._stat()
        self.size = found.st_size
        self.identity = _identity(path, found)

    def _stat(self) -> os.stat_result:
        handle = open_regular(self.path)
        try:
            return os.fstat(handle)
        finally:
            os.close(handle)

    def readinto(self, offset: int, buffer: memoryview) -> int:
        try:
            with open(open_regular(self.path), "rb", buffering=0) as file:
                file.seek(offset)
                return file.readinto(buffer)
        except OSError as error:
            raise UnreadableError(f"cannot read {self.path}: {error.strerror or error}") from error

    def check(self) -> None:
        if _identity(self.path, self._stat()) != self.identity:
            raise InputError(
                f"{self.path} was changed while it was read", hint="run the command again"
            )


def _identity(path: Path, found: os.stat_result) -> str:
    return f"{os.path.realpath(path)}:{found.st_size}:{found.st_mtime_ns}"


def locate(where: str | Path) -> Location:
    """A path of this machine, or of elsewhere for a URL such as https://host/model/.

    Raises InputError for a URL that can't be used, EnvironmentLacksError without its package.
    """
    if isinstance(where, Path) or "://" not in where:
        return Path(where)
    return _locate_url(where)


def open_file(location: Location) -> TensorFile:
    """The file's bytes by offset. Raises InputError if it can't be read or has none."""
    return MappedFile(location) if isinstance(location, Path) else location.ranged()


def is_gguf(path: Location) -> bool:
    """Whether a file starts as GGUF files do. InputError if it can't be read."""
    return bytes(open_file(path).bytes(0, len(GGUF_MAGIC))) == GGUF_MAGIC


def source_file(location: Location) -> SourceFile:
    """The file as a source. Raises InputError if it can't be read."""
    return LocalFile(location) if isinstance(location, Path) else location.source()
