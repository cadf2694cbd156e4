"""A `metal` device without Metal: MSL kernels of a compiled library run on this machine's CPU.

The kernels' MSL text is read from the library, translated to C++, compiled with the host's
compiler when first launched, and run with one fibre for each thread of a threadgroup. It proves
what the kernels compute. It does not prove that Apple's compiler accepts them, and says nothing
about speed on a device.

- Device memory is the host's, filled with NaN (-1 in integers); so is threadgroup memory.
- A launch stops with a RuntimeError that names the kernel, threadgroup, thread and line of MSL at
  barriers that not all threads reach, shuffles from lanes that are not there, accesses outside of
  a buffer or misaligned, pointers to freed or host memory, and too many threads.
- `options(mode=Mode.RACES)` finds two threads that touch the same element without a barrier in
  between, and reads of threadgroup memory that nobody wrote.
- `options(order=…)` runs the threads of a group in another order: a kernel that assumes lock-step
  or one order gives another result.

`python -m mlc_compile.runtime.metal_emulator ARTEFACT` reports on the kernels of a library.

Environment, for commands such as `verify`: MLC_COMPILE_METAL_MODE (unchecked, checked, races) and
MLC_COMPILE_METAL_ORDER (ascending, descending, shuffled, shuffled:SEED).
"""

from __future__ import annotations

import ctypes
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlc_compile.errors import InputError
from mlc_compile.runtime.emulation import immortal
from mlc_compile.runtime.metal_emulator.artefact import KernelSource, parse_module, read_kernels
from mlc_compile.runtime.metal_emulator.limits import Limits, Verdict, check_kernels, check_limits
from mlc_compile.runtime.metal_emulator.native import TypeCheckError, core_library, kernel_library
from mlc_compile.runtime.metal_emulator.translate import Kernel, Mode, parse

__all__ = [
    "ORDERS",
    "Kernel",
    "KernelSource",
    "Launch",
    "Limits",
    "Mode",
    "Options",
    "TypeCheckError",
    "Verdict",
    "check_kernels",
    "check_limits",
    "install",
    "load",
    "load_library",
    "options",
    "parse",
    "peak_bytes",
    "read_kernels",
    "record",
    "set_options",
]

ORDERS = ("ascending", "descending", "shuffled")
"""In which the threads of a group run between two barriers."""


@dataclass(frozen=True)
class Options:
    """How launches run.

    order: one of ORDERS; `seed` chooses among shuffled ones. workers: OS threads that share the
    groups of a launch (always one in Mode.RACES). max_threads: of a threadgroup.
    """

    mode: Mode = Mode.CHECKED
    order: str = "ascending"
    seed: int = 0
    workers: int = 1
    max_threads: int = 1024


@dataclass(frozen=True)
class Launch:
    """A launch that ran: its extents in x, y, z, and what the emulation took."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    seconds: float

    @property
    def threads(self) -> int:
        """Of a threadgroup."""
        return self.block[0] * self.block[1] * self.block[2]


class _State:
    """The core, once it is loaded, and the modules that TVM has loaded."""

    core: ctypes.CDLL | None = None
    options = Options()

    def __init__(self) -> None:
        self.modules: list[dict[str, KernelSource]] = []
        self.libraries: list[ctypes.CDLL] = []  # never unloaded
        self.kept: list[Any] = []


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

        chosen = _environment_options()
        core = ctypes.CDLL(str(core_library()), ctypes.RTLD_GLOBAL)
        core.msl_peak_bytes.restype = ctypes.c_size_t
        core.msl_record_count.restype = ctypes.c_size_t
        core.msl_record_at.restype = ctypes.c_char_p
        core.msl_record_at.argtypes = [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p]
        core.msl_register()
        functions: dict[str, Callable[..., Any]] = {
            "ffi.Module.load_from_bytes.metal": _load_module,
            "mlc_compile.metal_emulator.compile": _compile,
        }
        for name, function in functions.items():
            tvm_ffi.register_global_func(name, immortal(function), override=True)
        _state.core = core
        set_options(chosen)
    return "emulated Metal (CPU)"


def load(executable: Any) -> Any:
    """A runnable module of what `relax.build` or `tirx.build` made for metal with a native host.

    TVM's compiler keeps MSL in a module that only exports, so it goes through a file.
    """
    with tempfile.TemporaryDirectory(prefix="mlc_compile_metal_") as folder:
        path = Path(folder) / f"kernels_{next(_numbers)}.so"  # TVM caches libraries by their path
        executable.export_library(str(path))
        return load_library(path)


def load_library(path: Path) -> Any:
    """A runnable module of a library for metal with a native host."""
    from tvm.runtime import load_module

    install()
    return load_module(str(path))


def set_options(chosen: Options) -> None:
    """For the launches that follow.

    Raises:
        InputError: no such order.
    """
    if chosen.order not in ORDERS:
        raise InputError(f"order {chosen.order!r} is not one of {', '.join(ORDERS)}")
    install()
    assert _state.core is not None
    _state.core.msl_mode(int(chosen.mode))
    _state.core.msl_options(
        ORDERS.index(chosen.order), chosen.seed, chosen.workers, chosen.max_threads
    )
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
def record() -> Iterator[list[Launch]]:
    """A list that holds the launches of the block after it has ended."""
    install()
    core = _state.core
    assert core is not None
    launches: list[Launch] = []
    core.msl_record(1)
    try:
        yield launches
    finally:
        core.msl_record(0)
        extents, seconds = (ctypes.c_uint * 6)(), ctypes.c_double()
        for i in range(core.msl_record_count()):
            name = core.msl_record_at(i, ctypes.byref(extents), ctypes.byref(seconds))
            n = tuple(extents)
            launches.append(Launch(name.decode(), n[:3], n[3:], seconds.value))


def peak_bytes() -> int:
    """The most bytes that the device's buffers took at once."""
    return 0 if _state.core is None else int(_state.core.msl_peak_bytes())


def _environment_options() -> Options:
    """What the environment asks for.

    Raises:
        InputError: it asks for what there is not.
    """
    mode = os.environ.get("MLC_COMPILE_METAL_MODE", "checked")
    if mode.upper() not in Mode.__members__:
        names = ", ".join(Mode.__members__).lower()
        raise InputError(f"MLC_COMPILE_METAL_MODE is {mode!r}", hint=f"one of {names}")
    asked = os.environ.get("MLC_COMPILE_METAL_ORDER", "ascending")
    order, _, seed = asked.partition(":")
    if order not in ORDERS or not (seed or "0").isdigit():
        hint = f"one of {', '.join(ORDERS)}, or shuffled:SEED"
        raise InputError(f"MLC_COMPILE_METAL_ORDER is {asked!r}", hint=hint)
    return Options(Mode[mode.upper()], order, int(seed or 0), workers=_cores())


def _cores() -> int:
    """OS threads to use: as many as TVM may, or this process may run on."""
    asked = os.environ.get("TVM_NUM_THREADS", "")
    if asked.isdigit() and int(asked):
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load_module(payload: Any) -> Any:
    """TVM's loader of an embedded Metal module."""
    import tvm_ffi

    data = bytes(payload)
    kernels = parse_module(data, "the library")
    number = len(_state.modules)
    _state.modules.append({k.name: k for k in kernels})
    words = [w for k in kernels for w in (k.name, " ".join(k.types), " ".join(k.tags))]
    text = "\n".join(f"// Function: {k.name}\n{k.source}" for k in kernels)
    make = tvm_ffi.get_global_func("mlc_compile.metal_emulator.module")
    return make(number, data, text, words)


def _compile(number: int, name: str, mode: int) -> int:
    """The address of the core's description of a kernel, compiled for `mode`."""
    kernel = parse(_state.modules[number][str(name)].source)
    problems = check_limits(kernel, Limits(language=(3, 1)))
    if problems:
        raise InputError(f"kernel {name}: {'; '.join(problems)}")
    try:
        # The race check calls the core for each access: nothing else counts there.
        path = kernel_library(kernel.cpp(Mode(mode)), fast=mode != Mode.RACES)
    except TypeCheckError as error:
        raise TypeCheckError(f"kernel {name} does not compile:\n{error.message}") from error
    library = ctypes.CDLL(str(path))
    _state.libraries.append(library)
    return ctypes.addressof(ctypes.c_char.in_dll(library, "msl_kernel"))
