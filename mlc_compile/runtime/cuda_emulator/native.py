"""The emulator's core, kernels and test programs compiled for this machine, cached by content."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.runtime.emulation import INCLUDE as SHARED
from mlc_compile.runtime.emulation import Cache, CompileError, flags, run

_HERE = Path(__file__).resolve().parent
INCLUDE = _HERE / "include"
CORE = _HERE / "core"
# Each load and store calls the core; it is told apart by its line; types are punned at will.
_CHECKED = (
    "-fsanitize=thread",
    "-g1",
    "-gdwarf-4",  # what addr2line of binutils 2.40 reads right where lines are renamed
    "-fno-tree-sra",  # else a vector becomes scalars, and its alignment is not checked
    "--param=tsan-instrument-func-entry-exit=0",
)
_KERNEL = ("-fno-strict-aliasing", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden")
_STORE = Cache("cuda-emulator")


@cache
def core_library() -> Path:
    """The shared library with the device, its modules and the fibres (25 s the first time).

    Raises:
        EnvironmentLacksError: no compiler, or it cannot compile TVM's headers.
    """
    import tvm
    import tvm_ffi

    include = [Path(p.__file__).parent / "include" for p in (tvm, tvm_ffi)]
    versions = [version("apache-tvm"), version("apache-tvm-ffi")]
    return _core("core", sorted(CORE.glob("*.cc")), include, versions)


@cache
def program_library() -> Path:
    """The same without TVM's part, for test programs.

    Raises:
        EnvironmentLacksError: no compiler.
    """
    sources = [path for path in sorted(CORE.glob("*.cc")) if path.name != "device.cc"]
    return _core("program", sources, [], [])


def _core(
    name: str, sources: Sequence[Path], include: Sequence[Path], versions: Sequence[str]
) -> Path:
    files = [*sources, CORE / "fibre.h", SHARED / "switch.h"]
    key = _STORE.key(name, *versions, *(p.read_text() for p in files))
    folders = [f"-I{folder}" for folder in (CORE, SHARED, *include)]
    _STORE.prune()
    try:
        return _STORE.shared(key, ["-O2", *folders, *map(str, sources), "-pthread"])
    except CompileError as error:
        raise EnvironmentLacksError(
            f"compiling the CUDA emulator failed:\n{error.message}",
            hint="it needs Linux, C++20 and _Float16: g++ 12 or clang++ 15",
        ) from error


def kernel_library(cpp: str, folders: Sequence[Path], arch: int, *, checked: bool) -> Path:
    """A unit of `translate` as a shared library.

    folders: of the headers that it includes. checked: with a call before each load and store.

    Raises:
        CompileError: the compiler refuses it.
    """
    options = [*_KERNEL, "-O2", f"-D__CUDA_ARCH__={arch}0", *(_CHECKED if checked else ())]
    texts = [_texts(INCLUDE, ".h")]
    if '.cuh"' in cpp:
        texts += [_texts(folder, ".cuh") for folder in (INCLUDE, *folders)]
    key = _STORE.key("kernel", *options, cpp, *texts)
    found = _STORE.find(key)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(prefix="mlc_compile_cuda_") as temporary:
        links = Path(temporary) / "include"
        links.mkdir()
        hide_replaced(folders, links)
        unit = Path(temporary) / "kernel.cc"
        unit.write_text(cpp)
        made = Path(temporary) / "kernel.o"
        compile_only([*options, f"-I{INCLUDE}", f"-I{links}", str(unit)], made)
        # Linked without -fsanitize=thread: the calls are answered by the core.
        return _STORE.shared(key, [str(made)])


def hide_replaced(folders: Sequence[Path], into: Path) -> None:
    """Links in `into` to the headers of `folders` but those that the emulator has its own of.

    A quoted inclusion looks beside the file that it stands in before it looks anywhere else.
    """
    for folder in folders:
        for path in sorted(folder.iterdir()):
            link = into / path.name
            if path.is_file() and not (INCLUDE / path.name).exists() and not link.exists():
                link.symlink_to(path.resolve())


def compile_only(arguments: Sequence[str], output: Path) -> None:
    """A unit of C++ to an object.

    Raises:
        CompileError: the compiler refuses it; the message is the compiler's, whole.
    """
    run([*flags(), *arguments, "-c", "-o", str(output)])


def build_program(
    source: Path, output: Path, *, folders: Sequence[Path], arch: int, options: Sequence[str] = ()
) -> None:
    """A test program of kernels: CUDA C++ that launches with `emulate` (include/cuda_emulator.h).

    Raises:
        InputError: the compiler refuses it; the message is the compiler's, whole.
    """
    with tempfile.TemporaryDirectory(prefix="mlc_compile_cuda_") as temporary:
        links = Path(temporary) / "include"
        links.mkdir()
        hide_replaced([source.resolve().parent, *folders], links)
        made = Path(temporary) / "program.o"
        whole = ["-O2", "-fno-strict-aliasing", *_CHECKED, f"-D__CUDA_ARCH__={arch}0"]
        whole += ["-include", "cuda_runtime.h", f"-I{INCLUDE}", f"-I{links}", *options]
        try:
            compile_only([*whole, "-x", "c++", str(links / source.name)], made)
            run([str(made), str(program_library()), "-o", str(output)])
        except CompileError as error:
            raise InputError(f"{source}: {error.message}") from error


def _texts(folder: Path, suffix: str) -> str:
    """A hash of a folder's headers, whose change makes another kernel."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(f"*{suffix}")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
