"""The emulator's core and translated kernels compiled for this machine, cached by their content."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mlc_compile.errors import EnvironmentLacksError, InputError

_SHIM = Path(__file__).resolve().parent / "shim"
_FRAME = 192 << 10  # bytes; a fibre has 256 KiB (shim/fibre.cc)


class TypeCheckError(InputError):
    """The compiler refuses a kernel; the message is the compiler's, whole."""


@cache
def compiler() -> str:
    """A C++20 compiler for this machine: $CXX, c++, g++ or clang++.

    Raises:
        EnvironmentLacksError: there is none.
    """
    names = [os.environ.get("CXX") or "c++", "c++", "g++", "clang++"]
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        raise EnvironmentLacksError(
            "no C++ compiler on the PATH (c++, g++ or clang++)",
            hint="the Metal emulator compiles kernels with one; Debian: apt-get install g++",
        )
    return found


@cache
def _flags() -> tuple[str, ...]:
    flags = ["-std=c++20", "-fPIC", "-O2", "-w"]
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        features = set()
    if platform.machine() == "x86_64":  # else each half goes through a function
        flags += [f"-m{name}" for name in ("f16c", "fma", "avx2") if name in features]
    elif platform.machine() == "aarch64" and {"fphp", "asimdhp"} <= features:
        flags.append("-march=armv8.2-a+fp16")
    return tuple(flags)


@cache
def core_library() -> Path:
    """The shared library with the device, its modules and the fibres (20 s the first time).

    Raises:
        EnvironmentLacksError: no compiler, or it cannot compile TVM's headers.
    """
    import tvm
    import tvm_ffi

    sources = [_SHIM / "device.cc", _SHIM / "fibre.cc"]
    key = _key("core", version("apache-tvm"), version("apache-tvm-ffi"), *_shim_texts())
    include = [_SHIM, *(Path(p.__file__).parent / "include" for p in (tvm, tvm_ffi))]
    _prune()
    try:
        return _cached(key, [*(f"-I{i}" for i in include), *map(str, sources), "-pthread"])
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
    path = _root() / f"{_key('kernel', optimise, cpp, *_kernel_texts())}.so"
    if path.exists():
        os.utime(path)  # for _prune
        return path
    with tempfile.TemporaryDirectory(prefix="mlc_compile_msl_") as folder:
        unit = Path(folder) / "kernel.cc"
        unit.write_text(cpp)
        frame = f"-Werror=frame-larger-than={_FRAME}"
        return _cached(path.stem, [optimise, frame, f"-I{_SHIM}", str(unit)])


def type_check(cpp: str) -> str:
    """What the compiler has against a translation unit; "" when it has nothing."""
    with tempfile.TemporaryDirectory(prefix="mlc_compile_msl_") as folder:
        unit = Path(folder) / "kernel.cc"
        unit.write_text(cpp)
        command = [compiler(), *_flags(), "-fsyntax-only", f"-I{_SHIM}", str(unit)]
        run = _run(command)
    return run.stderr.strip() or f"exit status {run.returncode}" if run.returncode else ""


@cache
def _shim_texts() -> tuple[str, ...]:
    return tuple(p.read_text() for p in sorted(_SHIM.iterdir()) if p.is_file())


@cache
def _kernel_texts() -> tuple[str, ...]:
    return tuple((_SHIM / name).read_text() for name in ("msl_core.h", "metal_stdlib.h"))


def _key(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in (*parts, compiler(), _compiler_version(), *_flags()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:32]


@cache
def _compiler_version() -> str:
    run = _run([compiler(), "-dumpfullversion"])
    return run.stdout + run.stderr


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Messages in English and ASCII."""
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def _root() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MLC_COMPILE_CACHE") or root / "mlc-compile") / "metal-emulator"


def _prune() -> None:
    """Forget kernels that no run has asked for in 30 days."""
    limit = time.time() - 30 * 24 * 3600
    for path in _root().glob("*.so"):
        with suppress(OSError):  # another process was quicker
            if path.stat().st_mtime < limit:
                path.unlink()


def _cached(key: str, arguments: list[str]) -> Path:
    """`arguments` compiled and linked as the cache's library `key`."""
    library = _root() / f"{key}.so"
    if library.exists():
        os.utime(library)
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    # TVM's symbols and the core's are found when the library is loaded.
    link = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / "made.so"
        command = [compiler(), *_flags(), *link, *arguments, "-o", str(made)]
        run = _run(command)
        if run.returncode:
            raise TypeCheckError(run.stderr.strip() or f"exit status {run.returncode}")
        made.replace(library)  # whole or not at all, also beside another process
    return library
