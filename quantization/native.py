"""Kernels as machine code: built once by TVM's LLVM, kept in the user's cache, called by ctypes.

Importing TVM and compiling takes a second or two of CPU, as long as converting a gigabyte. So the
object code of a kernel is linked here, by itself, into an image of code and constants that runs at
any address, and stored under a name that holds all it depends on: the kernel's source, TVM's
version, the CPU. Later processes map that file and never import TVM.

Kernels are leaves with the plain C calling convention; their object code refers to nothing but
itself, which is all that is linked. Where that is not possible (no x86-64 Linux, no cache) TVM's
own loader serves: same code, same results.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import platform
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.versions import version

Kernel = Callable[..., Any]

_HERE = Path(__file__).resolve().parent
_SOURCES = (
    _HERE / "encode_kernels.py",
    _HERE / "hash_kernels.py",
    _HERE / "native.py",
    _HERE / "search_kernels.py",
    _HERE.parent / "targets" / "cpu_kernels" / "_vector.py",
)
_HEADER = struct.Struct("<8s32sQ")  # magic, SHA-256 of the image, where in it the kernel starts
_MAGIC = b"mlcimg1\n"
_PC32, _PLT32 = 2, 4  # relocations: distances, of 32 bits


class _NotLinkable(Exception):
    """Object code that refers to something else."""


def load(
    name: str, variant: Sequence[object], feature: str, pointers: int, integers: int
) -> Kernel | None:
    """The kernel `name` ("encode", "search" or "hash"), which takes addresses, then int64s.

    feature: of x86 CPUs that it needs; None is returned where it is missing.
    """
    path = _path(name, variant)
    if path is not None:
        if feature and feature not in _cpu_flags():
            return None
        with suppress(OSError, _NotLinkable):  # a cache that cannot be written or run from
            found = _map(path, pointers, integers)
            if found is None:
                built = _compile(name, variant, feature, plain=True)
                _store(path, *link(_object_code(built), name))
                found = _map(path, pointers, integers)
            if found is not None:
                return found
    built = _compile(name, variant, feature, plain=False)
    if built is None:
        return None
    kernel: Kernel = built.jit()[name]
    return kernel


def link(code: bytes, symbol: str) -> tuple[bytes, int]:
    """An image of the x86-64 ELF object `code`, and where in it `symbol` starts.

    Raises _NotLinkable for a relocation that is no distance within the image.
    """
    table, entry_size, count = struct.unpack_from("<40xQ10xHH", code)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", code, table + entry_size * i) for i in range(count)
    ]
    image, places = bytearray(), {}
    for index, (_, kind, flags, _, offset, size, _, _, align, _) in enumerate(sections):
        if kind == 1 and flags & 2 and not flags & 1:  # code and constants, nothing to write to
            image += bytes(-len(image) % max(1, align))
            places[index] = len(image)
            image += code[offset : offset + size]
    symbols: list[tuple[int, int, int]] = []
    start = -1
    for _, kind, _, _, offset, size, names, _, _, _ in sections:
        if kind != 2:
            continue
        for at in range(offset, offset + size, 24):
            name, info, _, section, value, _ = struct.unpack_from("<IBBHQQ", code, at)
            symbols.append((section, value, info))
            begin = sections[names][4] + name
            if code[begin : code.index(b"\0", begin)].decode() == symbol and section in places:
                start = places[section] + value
    for _, kind, _, _, offset, size, _, target, _, _ in sections:
        if kind != 4 or target not in places:
            continue
        for at in range(offset, offset + size, 24):
            where, info, addend = struct.unpack_from("<QQq", code, at)
            section, value, _ = symbols[info >> 32]
            if info & 0xFFFFFFFF not in (_PC32, _PLT32) or section not in places:
                raise _NotLinkable
            place = places[target] + where
            struct.pack_into("<i", image, place, places[section] + value + addend - place)
    if start < 0:
        raise _NotLinkable
    return bytes(image), start


def _path(name: str, variant: Sequence[object]) -> Path | None:
    """Where the image is kept; None on machines that it cannot be linked for."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or not _cpu_flags():
        return None
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    key = hashlib.sha256()
    for part in (version("apache-tvm"), name, repr(tuple(variant)), " ".join(_cpu_flags())):
        key.update(f"{part}\n".encode())
    for source in _SOURCES:
        key.update(source.read_bytes())
    return root / "mlc-compile" / "encoders" / f"{name}-{key.hexdigest()[:32]}.bin"


def _cpu_flags() -> list[str]:
    """The model and the features of this CPU."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines())
        names = {key.strip(): value for key, value in fields.items()}
        return [names.get("model name", "").strip(), *names.get("flags", "").split()]
    return []


def _store(path: Path, image: bytes, start: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    header = _HEADER.pack(_MAGIC, hashlib.sha256(image).digest(), start)
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(header + image)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _map(path: Path, pointers: int, integers: int) -> Kernel | None:
    """The kernel of a stored image; None where there is none that is whole and this user's."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return None
            content = file.read()
    except FileNotFoundError:
        return None
    if len(content) < _HEADER.size:
        return None
    magic, digest, start = _HEADER.unpack_from(content)
    image = content[_HEADER.size :]
    if magic != _MAGIC or hashlib.sha256(image).digest() != digest:
        return None
    # Never writable and executable at once: filled first, then made executable.
    memory = mmap.mmap(-1, len(image), prot=mmap.PROT_READ | mmap.PROT_WRITE)
    memory.write(image)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(address, len(image), mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "mprotect")
    _MAPPED.append(memory)
    kinds = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
    return ctypes.CFUNCTYPE(None, *kinds)(address + start)


_MAPPED: list[mmap.mmap] = []  # code stays for as long as the process


def _compile(name: str, variant: Sequence[object], feature: str, *, plain: bool) -> Any:
    """What TVM builds; None where the CPU lacks `feature`. plain: with C's calling convention."""
    with _without_torch():
        import tvm
        from tvm.target import Target, codegen

        from mlc_compile.quantization.encode_kernels import EncodeSpec, encode_kernel
        from mlc_compile.quantization.hash_kernels import hash_kernel
        from mlc_compile.quantization.search_kernels import search_kernel
    target = Target({"kind": "llvm", "mcpu": str(codegen.llvm_get_system_cpu())})
    x86 = str(codegen.llvm_get_system_triple()).startswith(("x86", "i686"))
    if feature and x86 and not codegen.llvm_cpu_has_features(feature, target):
        return None
    if name == "hash":
        kernel = hash_kernel()
    else:
        spec = EncodeSpec(*variant)  # type: ignore[arg-type]  # a variant is a spec's fields
        kernel = search_kernel(spec) if name == "search" else encode_kernel(spec)
    if plain:  # TVM's own convention (kCPackedFunc, 1) is not wrapped around it a second time
        kernel = kernel.with_attr("calling_conv", 1).with_attr("target", target)
    return tvm.compile(tvm.IRModule({name: kernel}), target=target)


def _object_code(built: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.o"
        built.mod.write_to_file(str(path), "o")
        return path.read_bytes()


@contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch where it is installed, for a second and for nothing we use."""
    if "torch" in sys.modules or "tvm_ffi" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it now fails
    try:
        yield
    finally:
        del sys.modules["torch"]
