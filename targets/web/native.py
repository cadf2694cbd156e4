"""The runtime's WebGPU half compiled for this machine: the same C++ that a wasm library holds.

`mlc_compile.runtime.webgpu_device` gives it what JavaScript gives it in a browser.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

import tvm
import tvm_ffi

from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.targets.web.runtime import cache_folder

_OWN = Path(__file__).resolve().parent / "runtime"


def device_library() -> Path:
    """The shared library that registers `device_api.webgpu`, compiled the first time it is asked
    for (about 10 s) and cached.

    Raises:
        EnvironmentLacksError: no C++ compiler with TVM's own standard library (g++, clang++), or
            the cache folder cannot be written.
    """
    package = Path(tvm.__file__).parent
    sources = [package / "web" / "emcc" / "webgpu_runtime.cc", _OWN / "native" / "guard.cc"]
    compiler = next((p for p in map(shutil.which, ("c++", "g++", "clang++")) if p), None)
    if compiler is None:
        raise EnvironmentLacksError(
            "no C++ compiler on the PATH (c++, g++ or clang++)",
            hint="a native webgpu device needs one; Debian: apt-get install g++",
        )
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC"]
    digest = hashlib.sha256()
    for part in (version("apache-tvm"), version("apache-tvm-ffi"), compiler, *flags):
        digest.update(part.encode() + b"\0")
    for path in [*sources, *sorted(_OWN.rglob("*.h"))]:
        digest.update(path.read_bytes())
    folder = cache_folder() / "web-device"
    library = folder / f"{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    include = [
        package,  # "web/emcc/webgpu_runtime.cc"
        _OWN / "src" / "pack",  # "../../src/support/bytes_io.h"
        _OWN / "src" / "include",
        package / "include",
        Path(tvm_ffi.__file__).parent / "include",
    ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "device.so"
            command = [compiler, *flags, *(f"-I{i}" for i in include), str(sources[1])]
            run = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, check=False
            )
            if run.returncode:
                raise EnvironmentLacksError(
                    f"compiling TVM's webgpu_runtime.cc failed: {run.stderr.strip()}"
                )
            made.replace(library)  # whole or not at all, also beside another process
    except OSError as error:
        raise EnvironmentLacksError(
            f"the cache folder {folder} cannot be written: {error.strerror}"
        ) from error
    return library
