"""C++ compilers that make WebAssembly: zig from PyPI (the default) and Emscripten (on request)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Protocol

from mlc_compile.errors import EnvironmentLacksError, InputError

TOOLCHAINS = ("zig", "emscripten")

# The entry points that @mlc-ai/web-runtime 0.28 calls, read from its sources (every
# `exports.NAME` and every name in `checkExports`; tvm/web/src in the tvm wheel is the same code).
# `_initialize` and `memory` come from linking a reactor.
EXPORTS = (
    "TVMFFIAnyViewToOwnedAny",
    "TVMFFIBytesFromByteArray",
    "TVMFFIDataTypeFromString",
    "TVMFFIDataTypeToString",
    "TVMFFIErrorMoveFromRaised",
    "TVMFFIErrorSetRaisedFromCStr",
    "TVMFFIFunctionCall",
    "TVMFFIFunctionCreate",
    "TVMFFIFunctionGetGlobal",
    "TVMFFIFunctionSetGlobal",
    "TVMFFIGetTypeInfo",
    "TVMFFIObjectDecRef",
    "TVMFFIObjectIncRef",
    "TVMFFIStringFromByteArray",
    "TVMFFITypeKeyToIndex",
    "TVMFFIWasmFunctionCreate",
    "TVMFFIWasmGetLastError",
    "TVMWasmAllocSpace",
    "TVMWasmFreeSpace",
    "free",
    "malloc",
)

# -Oz against -O2, a library with 58 kernels: 3.46 MB (0.52 MB gzipped) against 3.94 MB (0.59 MB).
# Its code only sets up what the GPU does.
_COMPILE = ("-Oz", "-g0", "-Wno-macro-redefined")


class Toolchain(Protocol):
    """A compiler and linker. Commands run with `run`, in an environment that `variables` extends.

    `name` is the value of `--web-toolchain`; `version` is part of the cache's key.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def units(self, sources: Path) -> list[Path]:
        """The translation units below `sources` (runtime/src), those that take longest first."""
        ...

    def compile_flags(self, sources: Path, language: str) -> list[str]:
        """Flags for a unit in `language`, "c" or "c++"; include folders are the caller's."""
        ...

    def compiler(self, language: str) -> list[str]: ...

    def link_flags(self, exports: Sequence[str]) -> list[str]:
        """Flags that make a reactor module with these entry points."""
        ...

    def variables(self, cache: Path, scratch: Path) -> Mapping[str, str]:
        """Environment variables. `cache` outlives the command, `scratch` does not."""
        ...


# Longest first, so that two workers end at about the same time.
_UNITS = ("kv_cache", "ffi", "vm", "vm_builtin", "device", "webgpu", "js_api", "platform")


def _pack(sources: Path) -> list[Path]:
    return [sources / "pack" / f"{name}.cc" for name in _UNITS]


@dataclass(frozen=True)
class Zig:
    """clang, LLD, wasi-libc and libc++ from the PyPI package `ziglang`.

    Raises:
        EnvironmentLacksError: on construction, when the package is missing.
    """

    version: str = field(init=False)
    name: str = field(default="zig", init=False)

    def __post_init__(self) -> None:
        try:
            version = metadata.version("ziglang")
        except metadata.PackageNotFoundError:
            raise EnvironmentLacksError(
                "a WebGPU library is linked with zig, and the package ziglang is not installed",
                hint="pip install 'mlc-compile[webgpu]'",
            ) from None
        object.__setattr__(self, "version", version)

    def compiler(self, language: str) -> list[str]:
        return [
            *(sys.executable, "-m", "ziglang", "c++" if language == "c++" else "cc"),
            *("-target", "wasm32-wasi"),
        ]

    def units(self, sources: Path) -> list[Path]:
        wasi = [sources / "wasi" / name for name in ("throw.cc", "host_calls.c")]
        return [*_pack(sources), *wasi]

    def compile_flags(self, sources: Path, language: str) -> list[str]:
        if language == "c":
            return [*_COMPILE]
        return [
            *_COMPILE,
            "-std=c++17",
            # -fwasm-exceptions crashes zig 0.17's back end. `throw` stays and calls __cxa_throw,
            # which is ours (wasi/throw.cc).
            "-fignore-exceptions",
            # The module lives as long as its page: nothing is torn down.
            "-fno-c++-static-destructors",
            *("-include", str(sources / "wasi" / "single_thread.h")),
        ]

    def link_flags(self, exports: Sequence[str]) -> list[str]:
        # Undefined symbols are errors: the only imports are those that the sources declare.
        # zig builds its C and C++ libraries for the -O of the link.
        flags = ["-Oz", "-g0", "-s", "-mexec-model=reactor", "-Wl,--gc-sections"]
        # 1 MiB of stack in place of 16. zig puts it below the data: running out of it traps.
        flags.append("-Wl,-z,stack-size=1048576")
        return [*flags, *(f"-Wl,--export={name}" for name in exports)]

    def variables(self, cache: Path, scratch: Path) -> Mapping[str, str]:
        # zig keeps its build of libc++ in the global cache, and a copy of all that it compiles and
        # links in the local one.
        return {
            "ZIG_GLOBAL_CACHE_DIR": os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(cache / "zig")),
            "ZIG_LOCAL_CACHE_DIR": str(scratch / "zig"),
        }


@dataclass(frozen=True)
class Emscripten:
    """`emcc` on the PATH, for who has it anyway.

    Written from Emscripten's documentation and the flags of tvm/web/Makefile in the wheel; there
    was no emsdk where this was written, so it has not been run. The result passes the same checks
    as zig's before it is written.

    Raises:
        EnvironmentLacksError: on construction, when emcc or em++ is not on the PATH.
    """

    name: str = field(default="emscripten", init=False)

    def __post_init__(self) -> None:
        missing = [tool for tool in ("emcc", "em++") if shutil.which(tool) is None]
        if missing:
            raise EnvironmentLacksError(
                f"--web-toolchain emscripten: {' and '.join(missing)} not found on the PATH",
                hint="activate an emsdk, or leave the option out to use zig",
            )

    @cached_property
    def version(self) -> str:
        return run([*self.compiler("c"), "--version"], {}).splitlines()[0]

    def compiler(self, language: str) -> list[str]:
        return [str(shutil.which("em++" if language == "c++" else "emcc"))]

    def units(self, sources: Path) -> list[Path]:
        # Emscripten's own libc calls the JavaScript side and renews its views.
        return [*_pack(sources), sources / "wasi" / "throw.cc"]

    def compile_flags(self, sources: Path, language: str) -> list[str]:
        return [*_COMPILE, "-std=c++17", "-fignore-exceptions", "-fno-c++-static-destructors"]

    def link_flags(self, exports: Sequence[str]) -> list[str]:
        names = ",".join(f"_{name}" for name in exports)
        return [
            *("-Oz", "--no-entry", "-sSTANDALONE_WASM=1", "-sWASM_BIGINT=1"),
            *("-sALLOW_MEMORY_GROWTH=1", "-sMAXIMUM_MEMORY=4GB"),
            # The two functions that js_api.cc imports are not in Emscripten's JavaScript library.
            *("-sERROR_ON_UNDEFINED_SYMBOLS=0", f"-sEXPORTED_FUNCTIONS={names}"),
        ]

    def variables(self, cache: Path, scratch: Path) -> Mapping[str, str]:
        return {}


def get_toolchain(name: str) -> Toolchain:
    """The toolchain called `name`, one of `TOOLCHAINS`.

    Raises:
        InputError: there is no toolchain of that name.
        EnvironmentLacksError: it is not installed.
    """
    if name == "zig":
        return Zig()
    if name == "emscripten":
        return Emscripten()
    raise InputError(
        f"--web-toolchain {name}: no such toolchain", hint=f"choose from {', '.join(TOOLCHAINS)}"
    )


def run(command: Sequence[str], variables: Mapping[str, str], cwd: Path | None = None) -> str:
    """Run `command` and return its stdout.

    Raises:
        EnvironmentLacksError: it could not be started, or it failed; the message then holds all
            that it wrote to stderr.
    """
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **variables},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise EnvironmentLacksError(f"cannot run {command[0]}: {error.strerror}") from error
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip() or "nothing was said"
        called = " ".join([Path(command[0]).name, *command[1:4]])
        raise EnvironmentLacksError(f"{called} … failed (exit {done.returncode}):\n{said}")
    return done.stdout
