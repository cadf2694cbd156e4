"""MSL text out of a compiled artefact's bytes: .so, .dylib, .o, .a, .tar or a serialised module.

TVM embeds a device module as a byte string in little-endian words:
    "metal" size { format, {name: (name, argument types, launch parameters, …)}, {name: source} }
where strings and maps begin with their length in 64 bits. The bytes are found by the two names at
the start, so that no container format has to be read; every length is checked against the end.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path

from mlc_compile.errors import InputError

_KIND = struct.pack("<Q", 5) + b"metal"
_MAX_BYTES = 1 << 32  # of an unpacked archive
_DTYPES = {0: "int", 1: "uint", 2: "float", 4: "bfloat"}


@dataclass(frozen=True)
class KernelSource:
    """One Metal kernel as the artefact holds it.

    types: of its arguments in order, "handle" for a buffer. tags: launch parameters such as
    "threadIdx.x", whose extents follow the arguments in a launch.
    """

    name: str
    source: str
    types: tuple[str, ...]
    tags: tuple[str, ...]


def read_kernels(path: Path) -> list[list[KernelSource]]:
    """The kernels of each Metal module in a file, in the file's order.

    Raises:
        InputError: the file cannot be read, holds no Metal module, or a broken one.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as stream:
                data = stream.read(_MAX_BYTES)
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    modules = find_modules(data, str(path))
    if not modules:
        raise InputError(
            f"{path}: holds no Metal kernels",
            hint="give a library compiled for --target metal, iphone or macos",
        )
    return modules


def find_modules(data: bytes, where: str) -> list[list[KernelSource]]:
    """As `read_kernels`, in bytes."""
    found = []
    at = data.find(_KIND)
    while at >= 0:
        start = at + len(_KIND) + 8
        size = int.from_bytes(data[start - 8 : start], "little")
        # The kind, and then a payload that begins with a format of Metal.
        head = data[start + 8 : start + 16]
        if size >= 16 and (data[start : start + 13] == _KIND or head == b"metallib"):
            if start + size > len(data):
                raise InputError(f"{where}: its Metal module at byte {at} is cut off")
            found.append(parse_module(data[start : start + size], f"{where}, byte {start}"))
            at = data.find(_KIND, start + size)
        else:
            at = data.find(_KIND, at + 1)
    return found


def parse_module(payload: bytes, where: str) -> list[KernelSource]:
    """The kernels of what a Metal module serialises to.

    Raises:
        InputError: it is not one, is cut off, or was compiled by Apple's tools already.
    """
    reader = _Reader(payload, where)
    form = reader.text()
    if form != "metal":
        raise InputError(
            f"{where}: Metal kernels in the form {form!r}, not as MSL text",
            hint="do not register tvm_callback_metal_compile when compiling",
        )
    infos: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    for _ in range(reader.count(24)):
        key = reader.text()
        reader.text()  # its name once more
        types = tuple(reader.dtype() for _ in range(reader.count(4)))
        tags = tuple(reader.text() for _ in range(reader.count(8)))
        reader.skip(4 * reader.count(4))  # argument extras, which Metal has no use for
        infos[key] = (types, tags)
    kernels = []
    for _ in range(reader.count(16)):
        name, source = reader.text(), reader.text()
        if name not in infos:
            raise InputError(f"{where}: the Metal module has no launch data of kernel {name!r}")
        kernels.append(KernelSource(name, source, *infos[name]))
    if len(kernels) != len(infos):
        missing = sorted(infos.keys() - {k.name for k in kernels})
        raise InputError(f"{where}: the Metal module lacks the source of {', '.join(missing)}")
    return kernels


class _Reader:
    """Bounds-checked words and strings."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.at = data, where, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise InputError(f"{self.where}: the Metal module is cut off or broken")
        self.at += size
        return self.data[self.at - size : self.at]

    def skip(self, size: int) -> None:
        self.take(size)

    def count(self, smallest: int) -> int:
        """A number of elements that take at least `smallest` bytes each."""
        number = int.from_bytes(self.take(8), "little")
        if number * smallest > len(self.data) - self.at:
            raise InputError(f"{self.where}: the Metal module is cut off or broken")
        return number

    def text(self) -> str:
        try:
            return self.take(self.count(1)).decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.where}: the Metal module is broken: {error}") from error

    def dtype(self) -> str:
        code, bits, lanes = struct.unpack("<BBH", self.take(4))
        if code == 3:
            return "handle"
        if code not in _DTYPES or lanes != 1:
            raise InputError(f"{self.where}: an argument of unknown type {(code, bits, lanes)}")
        return f"{_DTYPES[code]}{bits}"
