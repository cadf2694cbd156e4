"""What the emulated devices share: the host's C++ compiler, a cache of what it makes, and functions
for C++; switch.h has the switch between fibres."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from mlc_compile.errors import EnvironmentLacksError, InputError

INCLUDE = Path(__file__).resolve().parent
"""Where switch.h is."""


class CompileError(InputError):
    """The compiler refuses a unit; the message is the compiler's, whole."""


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
            hint="emulated devices compile kernels with one; Debian: apt-get install g++",
        )
    return found


@cache
def flags() -> tuple[str, ...]:
    """For every unit."""
    chosen = ["-std=c++20", "-fPIC", "-w"]
    try:
        features = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        features = set()
    if platform.machine() == "x86_64":  # else each half goes through a function
        chosen += [f"-m{name}" for name in ("f16c", "fma", "avx2") if name in features]
    elif platform.machine() == "aarch64" and {"fphp", "asimdhp"} <= features:
        chosen.append("-march=armv8.2-a+fp16")
    return tuple(chosen)


def run(arguments: Sequence[str]) -> str:
    """What the compiler prints, in English and ASCII.

    Raises:
        CompileError: it fails.
    """
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        [compiler(), *arguments], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise CompileError(done.stderr.strip() or f"exit status {done.returncode}")
    return done.stdout + done.stderr


@cache
def _version() -> str:
    return run(["-dumpfullversion"])


class Cache:
    """Shared libraries by a hash of all they follow from, in a folder of the cache."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def root(self) -> Path:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Path(os.environ.get("MLC_COMPILE_CACHE") or root / "mlc-compile") / self._name

    def key(self, *parts: str) -> str:
        digest = hashlib.sha256()
        for part in (*parts, compiler(), _version(), *flags()):
            digest.update(part.encode() + b"\0")
        return digest.hexdigest()[:32]

    def find(self, key: str) -> Path | None:
        path = self.root / f"{key}.so"
        if not path.exists():
            return None
        os.utime(path)  # for `prune`
        return path

    def shared(self, key: str, arguments: Sequence[str]) -> Path:
        """`arguments` compiled and linked as the library `key`, if it is not there.

        Raises:
            CompileError: the compiler fails.
        """
        found = self.find(key)
        if found is not None:
            return found
        library = self.root / f"{key}.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        # TVM's symbols and the core's are found when the library is loaded.
        link = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / "made.so"
            run([*flags(), *link, *arguments, "-o", str(made)])
            made.replace(library)  # whole or not at all, also beside another process
        return library

    def prune(self) -> None:
        """Forget what no run has asked for in 30 days."""
        limit = time.time() - 30 * 24 * 3600
        for path in self.root.glob("*.so"):
            with suppress(OSError):  # another process was quicker
                if path.stat().st_mtime < limit:
                    path.unlink()


def immortal(function: Callable[..., Any]) -> Any:
    """A function for C++ that is never freed: what C++ still holds when the process exits, it
    releases after Python has gone."""
    import tvm_ffi

    converted = tvm_ffi.convert(function)
    library = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    library.TVMFFIObjectIncRef(ctypes.c_void_p(converted.__chandle__()))
    return converted
