"""TVM's `cuda` device: the driver, CUDA's runtime library and TVM's side-car, loaded on demand.

TVM's wheel has its CUDA runtime in a library of its own that nothing loads by itself, because most
machines lack what it is linked with.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.targets.nvidia.archs import code_runs_on, sm
from mlc_compile.targets.nvidia.driver import GPU, this_gpu
from mlc_compile.targets.nvidia.fatbin import Code, find_fatbins
from mlc_compile.targets.nvidia.toolchain import package_folder

CUDART = "libcudart.so.13"
"""What the side-car of TVM's wheel is linked with."""
MINIMUM_DRIVER = (13, 0)
OLDEST = 75
"""What CUDA 13 still runs on (its release notes)."""


@cache
def install() -> GPU:
    """Make `tvm.device("cuda")` work in this process; the GPU that it is.

    Raises:
        EnvironmentLacksError: no driver, no GPU, one or the other too old, no CUDA runtime library,
            or a TVM without its CUDA side-car; says what to do.
    """
    gpu = this_gpu()
    if gpu.driver < MINIMUM_DRIVER:
        known, needed = (".".join(map(str, v)) for v in (gpu.driver, MINIMUM_DRIVER))
        raise EnvironmentLacksError(
            f"the NVIDIA driver knows CUDA {known}, and TVM's runtime is of CUDA {needed}",
            hint="install driver 580 or later",
        )
    if gpu.arch < OLDEST:
        raise EnvironmentLacksError(
            f"{gpu.name} is {sm(gpu.arch)}, and CUDA 13, of which TVM's runtime is, begins with "
            f"{sm(OLDEST)}",
            hint="load the library with a TVM built for CUDA 12, or compile for --target cpu",
        )
    library = side_car()
    _load_cudart()
    try:
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EnvironmentLacksError(f"TVM's CUDA runtime cannot be loaded: {error}") from error
    import tvm

    if not tvm.device("cuda", 0).exist:
        raise EnvironmentLacksError(
            f"CUDA's runtime library cannot use {gpu.name}", hint="look at `nvidia-smi`"
        )
    return gpu


def side_car() -> Path:
    """TVM's CUDA runtime.

    Raises:
        EnvironmentLacksError: this TVM has none.
    """
    import tvm

    path = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    if not path.is_file():
        raise EnvironmentLacksError(
            f"this machine's TVM has no CUDA runtime ({path} is not there)",
            hint="TVM's wheels for Linux have it; run the library on such a machine",
        )
    return path


def check_code(path: Path, gpu: GPU) -> None:
    """Raise unless every fat binary in a library has code that this GPU runs.

    Raises:
        InputError: the library holds no code for a GPU.
        EnvironmentLacksError: none of it is for this one; names both.
    """
    found = find_fatbins(path.read_bytes())
    if not found:
        raise InputError(
            f"{path} holds no machine code for NVIDIA GPUs", hint="compile it with --target cuda"
        )
    for codes in found:
        if not any(_runs(code, gpu) for code in codes):
            machine = ", ".join(sm(code.arch) for code in codes if code.kind == "elf") or "nothing"
            ptx = ", ".join(sm(code.arch) for code in codes if code.kind == "ptx")
            raise EnvironmentLacksError(
                f"{path} has machine code for {machine}"
                + (f" and PTX for {ptx} and later" if ptx else "")
                + f", which {gpu.name} ({sm(gpu.arch)}) does not run",
                hint=f"compile it with --target cuda:{sm(gpu.arch)}",
            )


def _runs(code: Code, gpu: GPU) -> bool:
    return code_runs_on(code.arch, gpu.arch, ptx=code.kind == "ptx")


def _load_cudart() -> None:
    places = []
    folder = package_folder()
    if folder is not None:
        places.append(folder / "lib" / CUDART)
    for root in filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"))):
        places.append(Path(root) / "lib64" / CUDART)
    # By its name alone: the system's own search path.
    for place in [*(str(p) for p in places if p.is_file()), CUDART]:
        try:
            ctypes.CDLL(place, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return
    if not sys.platform.startswith("linux"):
        raise EnvironmentLacksError(f"{CUDART} is for Linux, and so are libraries for cuda")
    raise EnvironmentLacksError(
        f"{CUDART} is not there, CUDA's runtime library",
        hint="pip install 'nvidia-cuda-runtime==13.0.*' (the extra mlc-compile[cuda] has it)",
    )
