"""TVM's packed imports, read and written again with machine code in place of CUDA C++.

Without a CUDA runtime in the process, code generation leaves a module of kind "cuda" that holds its
source, and a loader would compile that. It is saved in the same format as one with machine code,
so nothing of CUDA needs to be loaded to replace one by the other: no driver, no GPU, no runtime.

The format (TVM 0.27: src/target/codegen.cc, src/backend/cuda/codegen/cuda_fallback_module.cc,
runtime/metadata.h; integers little-endian, a string or list is its u64 length and its items):

    u64 size of the rest, list of u64, list of u64 (the import tree)
    for each module: string kind, and, unless it is "_lib" (the host code), a string of bytes
    bytes of "cuda": string format, list of functions, string code
    function: string name, string name, list of {u8 code, u8 bits, u16 lanes}, list of string tags,
              list of i32
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mlc_compile.errors import CheckFailedError

DYNAMIC_SHARED_MEMORY = "tirx.use_dyn_shared_memory"
DEPENDENT_LAUNCH = "tirx.use_programtic_dependent_launch"
"""Launch tags as runtime/metadata.h spells them."""

_UNKNOWN = "TVM's packed modules are not in the format of TVM 0.27"
_HOST = b"_lib"
_CUDA = b"cuda"


@dataclass(frozen=True)
class Function:
    """One kernel: its arguments' dtypes (code, bits, lanes), the tags by which the runtime knows
    the launch parameters that follow them, and a number for each argument."""

    name: str
    arguments: tuple[tuple[int, int, int], ...]
    tags: tuple[str, ...]
    extra: tuple[int, ...]

    def dependent(self) -> Function:
        """The same, launched before its predecessor in the stream has ended."""
        if DEPENDENT_LAUNCH in self.tags:
            return self
        # The runtime insists on the tag of dynamic shared memory being the last.
        split = len(self.tags) - (self.tags[-1:] == (DYNAMIC_SHARED_MEMORY,))
        return replace(self, tags=(*self.tags[:split], DEPENDENT_LAUNCH, *self.tags[split:]))


@dataclass(frozen=True)
class CudaModule:
    """What a module of kind "cuda" saves: "cuda" is source, "fatbin" machine code."""

    format: str
    functions: tuple[Function, ...]
    code: bytes


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CheckFailedError(_UNKNOWN)
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def size(self) -> int:
        """Of a list, whose items take a byte at least."""
        size = self.number("<Q")
        if size > len(self.data) - self.at:
            raise CheckFailedError(_UNKNOWN)
        return size

    def string(self) -> bytes:
        return self.take(self.size())

    def text(self) -> str:
        return self.string().decode()


def _string(data: bytes | str) -> bytes:
    data = data.encode() if isinstance(data, str) else data
    return struct.pack("<Q", len(data)) + data


def load_module(data: bytes) -> CudaModule:
    """What a module of kind "cuda" was saved as.

    Raises:
        CheckFailedError: the bytes are not in the format above.
    """
    reader = _Reader(data)
    form = reader.text()
    functions = []
    for _ in range(reader.size()):
        reader.text()
        name = reader.text()
        dtypes = [
            (reader.number("B"), reader.number("B"), reader.number("<H"))
            for _ in range(reader.size())
        ]
        tags = tuple(reader.text() for _ in range(reader.size()))
        extra = tuple(reader.number("<i") for _ in range(reader.size()))
        functions.append(Function(name, tuple(dtypes), tags, extra))
    code = reader.string()
    return CudaModule(form, tuple(functions), code)


def save_module(module: CudaModule) -> bytes:
    """As TVM saves it; functions in the order of `module`."""
    parts = [_string(module.format), struct.pack("<Q", len(module.functions))]
    for function in module.functions:
        parts += [_string(function.name), _string(function.name)]
        parts.append(struct.pack("<Q", len(function.arguments)))
        parts += [struct.pack("<BBH", *dtype) for dtype in function.arguments]
        parts.append(struct.pack("<Q", len(function.tags)))
        parts += map(_string, function.tags)
        parts.append(struct.pack("<Q", len(function.extra)))
        parts += [struct.pack("<i", value) for value in function.extra]
    return b"".join([*parts, _string(module.code)])


def replace_cuda(
    blob: bytes, convert: Callable[[Sequence[CudaModule]], Sequence[CudaModule]]
) -> bytes:
    """Packed imports with the CUDA modules replaced by what `convert` makes of them all.

    Raises:
        CheckFailedError: the bytes are not in the format above, down to the last one.
    """
    reader = _Reader(blob)
    if reader.number("<Q") != len(blob) - 8:
        raise CheckFailedError(_UNKNOWN)
    tree = [reader.take(8 * reader.size()) for _ in range(2)]
    kinds: list[bytes] = []
    saved: list[bytes] = []  # nothing for the host code
    for _ in range(len(tree[0]) // 8 - 1):
        kinds.append(reader.string())
        saved.append(b"" if kinds[-1] == _HOST else reader.string())
    if reader.at != len(blob):
        raise CheckFailedError(_UNKNOWN)
    at = [i for i, kind in enumerate(kinds) if kind == _CUDA]
    modules = [load_module(saved[i]) for i in at]
    for i, module in zip(at, modules, strict=True):
        if save_module(module) != saved[i]:
            raise CheckFailedError(_UNKNOWN)
    for i, module in zip(at, convert(modules), strict=True):
        saved[i] = save_module(module)
    parts = [struct.pack("<Q", len(indices) // 8) + indices for indices in tree]
    for kind, data in zip(kinds, saved, strict=True):
        parts.append(_string(kind))
        if kind != _HOST:
            parts.append(_string(data))
    body = b"".join(parts)
    return struct.pack("<Q", len(body)) + body
