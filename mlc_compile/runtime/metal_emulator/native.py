"""The emulator's core and translated kernels compiled for this machine, cached by their content."""

from __future__ import annotations

import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.runtime.emulation import INCLUDE, Cache, flags, run
from mlc_compile.runtime.emulation import CompileError as TypeCheckError

__all__ = ["TypeCheckError", "core_library", "kernel_library", "type_check"]

_SHIM = Path(__file__).resolve().parent / "shim"
_FRAME = 192 << 10  # bytes; a fibre has 256 KiB (shim/fibre.cc)
_STORE = Cache("metal-emulator")


@cache
def core_library() -> Path:
    """The shared library with the device, its modules and the fibres (20 s the first time).

    Raises:
        EnvironmentLacksError: no compiler, or it cannot compile TVM's headers.
    """
    import tvm
    import tvm_ffi

    sources = [_SHIM / "device.cc", _SHIM / "fibre.cc"]
    texts = [*_shim_texts(), (INCLUDE / "switch.h").read_text()]
    key = _STORE.key("core", version("apache-tvm"), version("apache-tvm-ffi"), *texts)
    include = [_SHIM, INCLUDE, *(Path(p.__file__).parent / "include" for p in (tvm, tvm_ffi))]
    _STORE.prune()
    try:
        return _STORE.shared(
            key, ["-O2", *(f"-I{i}" for i in include), *map(str, sources), "-pthread"]
        )
    except TypeCheckError as error:
        raise EnvironmentLacksError(
            f"compiling the Metal emulator failed:\n{error.message}",
            hint="it needs C++20 and _Float16: g++ 12 or clang++ 15",
        ) from error


def kernel_library(cpp: str, *, fast: bool) -> Path:
    """A translation unit of `translate` as a shared library; `fast` is -O3, which halves the time
    of matrix products with checked accesses.

    Raises:
        TypeCheckError: the compiler refuses it.
    """
    optimise = "-O3" if fast else "-O1"
    key = _STORE.key("kernel", optimise, cpp, *_kernel_texts())
    found = _STORE.find(key)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="mlc_compile_msl_") as folder:
        unit = Path(folder) / "kernel.cc"
        unit.write_text(cpp)
        frame = f"-Werror=frame-larger-than={_FRAME}"
        return _STORE.shared(key, [optimise, frame, f"-I{_SHIM}", str(unit)])


def type_check(cpp: str) -> str:
    """What the compiler has against a translation unit; "" when it has nothing."""
    with tempfile.TemporaryDirectory(prefix="mlc_compile_msl_") as folder:
        unit = Path(folder) / "kernel.cc"
        unit.write_text(cpp)
        try:
            run([*flags(), "-O2", "-fsyntax-only", f"-I{_SHIM}", str(unit)])
        except TypeCheckError as error:
            return error.message
    return ""


@cache
def _shim_texts() -> tuple[str, ...]:
    return tuple(p.read_text() for p in sorted(_SHIM.iterdir()) if p.is_file())


@cache
def _kernel_texts() -> tuple[str, ...]:
    return tuple((_SHIM / name).read_text() for name in ("msl_core.h", "metal_stdlib.h"))
