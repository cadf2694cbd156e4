"""A `cuda` device without CUDA: CUDA C++ kernels run on this machine's CPU.

A library that was exported with its source (`emulated`, or TVM's own export) runs here: each kernel
is compiled with the host's compiler when first launched, and run with one fibre for each thread
of a block. It proves what the kernels compute. It does not prove that nvcc accepts them (the
exporter's tests do), and says nothing about speed.

- Plain CUDA C++ stays as it is: `include/` defines what nvcc defines, and has its own ptx.cuh.
- Device memory is the host's, filled with NaN (-1 in integers); so is shared memory.
- A launch stops with a RuntimeError that names the kernel, block, thread and source line at
  barriers that not all threads reach, warp operations whose lanes don't come, accesses outside of
  every buffer or misaligned, and too much shared memory.
- `options(races=True)` finds accesses of two threads to the same bytes that nothing orders, reads
  of shared memory that nobody wrote, and of what an asynchronous copy has yet to bring.
- It also finds what a dependent launch touches before its grid_dependency_wait that an earlier
  launch may not be done with, and threads that end without waiting.
- Threads run in a shuffled order (`options(order=…, seed=…)`): nothing runs in lock-step.
- `options(arch=75)` is another device: __CUDA_ARCH__ and what the library asks at run time.
"""

from __future__ import annotations

import ctypes
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlc_compile.errors import InputError
from mlc_compile.runtime.cuda_emulator.native import core_library, kernel_library
from mlc_compile.runtime.cuda_emulator.translate import Unit, split
from mlc_compile.runtime.emulation import CompileError, immortal

__all__ = [
    "ARCHS",
    "ORDERS",
    "Launch",
    "Options",
    "emulated",
    "install",
    "load",
    "options",
    "peak_bytes",
    "record",
    "set_options",
    "split",
]

ARCHS = (75, 80, 90)
ORDERS = ("ascending", "descending", "shuffled")
"""In which threads run on when they may."""
_DTYPES = {0: "int", 1: "uint", 2: "float", 3: "handle", 4: "bfloat", 6: "bool"}


@dataclass(frozen=True)
class Options:
    """How launches run.

    arch: one of ARCHS. checked: bounds, alignment and races need it; without it a kernel runs
    several times faster. order: one of ORDERS; `seed` chooses among shuffled ones. max_threads and
    max_shared (bytes, static and dynamic) of a block; 0: what the arch has.
    """

    arch: int = 80
    checked: bool = True
    races: bool = False
    order: str = "shuffled"
    seed: int = 0
    max_threads: int = 1024
    max_shared: int = 0


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_SHARED = {75: 64 << 10, 80: 163 << 10, 90: 227 << 10}


@dataclass(frozen=True)
class Launch:
    """A launch that ran: its extents in x, y, z, and what the emulation took.

    replayed: by a graph. dependent: it might begin before those before it had ended.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    replayed: bool
    dependent: bool
    seconds: float

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]


class _State:
    """The core, once it is loaded, and the modules that TVM has loaded."""

    core: ctypes.CDLL | None = None
    options = Options()

    def __init__(self) -> None:
        self.modules: list[dict[str, Unit]] = []
        self.libraries: list[ctypes.CDLL] = []  # never unloaded


_state = _State()
_numbers = itertools.count()


def install() -> str:
    """Register the device and the loader of its modules; the device's description. A second call
    changes nothing.

    Raises:
        EnvironmentLacksError: no C++ compiler.
    """
    if _state.core is None:
        import tvm_ffi

        core = ctypes.CDLL(str(core_library()), ctypes.RTLD_GLOBAL)
        core.emu_peak_bytes.restype = ctypes.c_size_t
        core.emu_record_count.restype = ctypes.c_size_t
        core.emu_record_at.restype = ctypes.c_char_p
        core.emu_record_at.argtypes = [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        core.emu_register_device()
        functions: dict[str, Callable[..., Any]] = {
            "ffi.Module.load_from_bytes.cuda": _load_module,
            "mlc_compile.cuda_emulator.compile": _compile,
        }
        for name, function in functions.items():
            tvm_ffi.register_global_func(name, immortal(function), override=True)
        _state.core = core
        set_options(Options())
    return "emulated CUDA (CPU)"


def load(executable: Any) -> Any:
    """A runnable module of what `relax.build` or `tirx.build` made for cuda with a native host.

    TVM's compiler keeps CUDA C++ in a module that only exports, so it goes through a file.
    """
    from tvm.runtime import load_module

    install()
    with tempfile.TemporaryDirectory(prefix="mlc_compile_cuda_") as folder:
        path = Path(folder) / f"kernels_{next(_numbers)}.so"  # TVM caches libraries by their path
        executable.export_library(str(path))
        return load_module(str(path))


def set_options(chosen: Options) -> None:
    """For the launches that follow.

    Raises:
        InputError: no such order or arch.
    """
    if chosen.order not in ORDERS:
        raise InputError(f"order {chosen.order!r} is not one of {', '.join(ORDERS)}")
    if chosen.arch not in ARCHS:
        raise InputError(f"arch {chosen.arch} is not one of {', '.join(map(str, ARCHS))}")
    install()
    assert _state.core is not None
    _state.core.emu_options(
        ORDERS.index(chosen.order),
        chosen.seed,
        int(chosen.races),
        chosen.max_threads,
        chosen.max_shared or _SHARED[chosen.arch],
    )
    _state.core.emu_device_options(chosen.arch, 2 * chosen.arch + chosen.checked)
    _state.options = chosen


@contextmanager
def options(**changes: Any) -> Iterator[Options]:
    """The present options with some fields changed, for a while."""
    install()
    before = _state.options
    set_options(replace(before, **changes))
    try:
        yield _state.options
    finally:
        set_options(before)


@contextmanager
def emulated(**changes: Any) -> Iterator[None]:
    """`options`, and within it the `cuda` target exports source instead of machine code, and the
    runtime's `cuda` device is this one."""
    from mlc_compile.runtime import cuda_device
    from mlc_compile.targets import cuda
    from mlc_compile.targets.nvidia import export
    from mlc_compile.targets.nvidia.driver import GPU

    def emulated_gpu() -> GPU:
        install()
        return GPU("an emulated device", _state.options.arch, (13, 0))

    with ExitStack() as stack:
        for owner, name, value in (
            (cuda, "find_nvcc", _NoCompiler),
            (export, "export_library", _export_source),
            (cuda_device, "install", emulated_gpu),
            (cuda_device, "check_code", lambda path, gpu: None),
        ):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        stack.enter_context(options(**changes))
        yield


class _NoCompiler:
    """What stands for nvcc where none is needed."""

    notes: tuple[str, ...] = ()

    def require(self, archs: Any) -> None:
        """Every arch is fine."""


def _export_source(executable: Any, output: Path, *_: Any) -> None:
    from mlc_compile.targets.cpu import link

    executable.export_library(str(output), fcompile=link)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """A list that holds the launches of the block after it has ended."""
    install()
    core = _state.core
    assert core is not None
    launches: list[Launch] = []
    core.emu_record(1)
    try:
        yield launches
    finally:
        core.emu_record(0)
        numbers, seconds = (ctypes.c_uint * 9)(), ctypes.c_double()
        for i in range(core.emu_record_count()):
            name = core.emu_record_at(i, ctypes.byref(numbers), ctypes.byref(seconds))
            n = tuple(numbers)
            launches.append(
                Launch(name.decode(), n[:3], n[3:6], n[6], bool(n[7]), bool(n[8]), seconds.value)
            )


def peak_bytes() -> int:
    """The most bytes that the device's buffers took at once."""
    return 0 if _state.core is None else int(_state.core.emu_peak_bytes())


def _load_module(payload: Any) -> Any:
    """TVM's loader of an embedded CUDA module."""
    import tvm_ffi

    from mlc_compile.targets.nvidia.export import dependent_kernels
    from mlc_compile.targets.nvidia.packing import load_module

    data = bytes(payload)
    module = load_module(data)
    if module.format != "cuda":
        raise InputError(
            f"a CUDA module of format {module.format!r}: the emulated device runs source",
            hint="compile within mlc_compile.runtime.cuda_emulator.emulated()",
        )
    source = module.code.decode()
    units = split(source)
    number = len(_state.modules)
    _state.modules.append(units)
    words = []
    dependent = dependent_kernels(source)
    for function in module.functions:
        if function.name in dependent:
            function = function.dependent()
        types = ["handle" if c == 3 else f"{_DTYPES[c]}{bits}" for c, bits, _ in function.arguments]
        if function.name not in units or len(units[function.name].parameters) != len(types):
            raise InputError(f"the CUDA module's source has no kernel {function.name} of its form")
        words += [function.name, " ".join(types), " ".join(function.tags)]
    make = tvm_ffi.get_global_func("mlc_compile.cuda_emulator.module")
    return make(number, data, source, words)


def _compile(number: int, name: str) -> int:
    """The address of a kernel's entry, compiled for the present options."""
    from mlc_compile.targets.cuda_kernels._launch import HEADERS

    unit = _state.modules[number][str(name)]
    chosen = _state.options
    try:
        path = kernel_library(unit.cpp(), [HEADERS], chosen.arch, checked=chosen.checked)
    except CompileError as error:
        lines = error.message.splitlines()
        first = next((line for line in lines if " error: " in line), lines[0])
        # The last line is what a summary shows.
        raise InputError(f"{error.message}\nkernel {name} does not compile: {first}") from error
    library = ctypes.CDLL(str(path))
    _state.libraries.append(library)
    return ctypes.cast(library.emu_entry, ctypes.c_void_p).value or 0
