"""A lowered model -> a shared library with machine code for NVIDIA GPUs, and its checks."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import tvm_ffi

from mlc_compile.errors import CheckFailedError
from mlc_compile.targets.cpu import link
from mlc_compile.targets.nvidia.archs import sm
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.fatbin import find_fatbins
from mlc_compile.targets.nvidia.packing import CudaModule, replace_cuda
from mlc_compile.targets.nvidia.toolchain import Nvcc

_FORCE_SOURCE = "TVM_COMPILE_FORCE_FALLBACK"
# A definition: a declaration of each comes before.
_KERNEL = re.compile(
    r'extern "C" __global__ void (?:__\w+__\s*\([^()]*\)\s*)*(\w+)\s*\([^();{]*\)\s*\{'
)
_DEPENDENT = re.compile(r"\bmlc::\w+_dependent\s*[<(]")
# What generated CUDA C++ can't do without; PTX and machine code have neither.
_SOURCE_MARKS = (b"__global__", b"#include <cuda", b"__launch_bounds__")


@contextmanager
def source_modules() -> Iterator[None]:
    """Within it TVM's code generation for CUDA keeps its source, also in a process that has loaded
    the CUDA runtime (which would compile it at once, for the GPU of this machine)."""
    before = os.environ.get(_FORCE_SOURCE)
    os.environ[_FORCE_SOURCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE_SOURCE]
        else:
            os.environ[_FORCE_SOURCE] = before


def export_library(
    executable: Any,
    output: Path,
    archs: Sequence[int],
    nvcc: Nvcc,
    dump: Path | None = None,
) -> None:
    """Write a shared library that holds machine code for each of `archs` and PTX for the newest.

    executable: what `relax.build` made within `source_modules`. dump: a folder for the generated
    source and ptxas's report.

    Raises:
        CheckFailedError: the file holds something else.
        EnvironmentLacksError: a tool is missing, or nvcc refused the source.
    """

    def pack(module: Any, system_lib: bool, prefix: str, workspace: str) -> str:
        host = next(m for m in _imports(module) if m.kind == "llvm")
        blob = bytes(tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module).numpy())
        blob = replace_cuda(blob, lambda found: _with_machine_code(found, archs, nvcc, dump))
        target = host["_get_target_string"]()
        made = tvm_ffi.get_global_func("codegen.codegen_blob")(blob, system_lib, target, prefix)
        path = Path(workspace) / "devc.o"
        made.write_to_file(str(path))
        return str(path)

    executable.export_library(str(output), fcompile=link, fpack_imports=pack)
    check_library(output.read_bytes(), archs, output.name)


def check_library(data: bytes, archs: Sequence[int], name: str) -> None:
    """Raise unless a library's bytes hold machine code for exactly `archs`, PTX for the newest,
    and no source.

    Raises:
        CheckFailedError: they hold something else.
    """
    found = find_fatbins(data)
    if not found:
        raise CheckFailedError(f"{name} holds no machine code for a GPU")
    for codes in found:
        machine = sorted(code.arch for code in codes if code.kind == "elf")
        ptx = [code.arch for code in codes if code.kind == "ptx"]
        if machine != list(archs) or ptx != [archs[-1]]:
            raise CheckFailedError(
                f"{name} holds machine code for {[*map(sm, machine)]} and PTX for "
                f"{[*map(sm, ptx)]}, asked for was {[*map(sm, archs)]}"
            )
    for mark in _SOURCE_MARKS:
        if mark in data:
            raise CheckFailedError(f"{name} holds CUDA C++ source ({mark.decode()})")


def dependent_kernels(source: str) -> set[str]:
    """The kernels in generated source that call a device function named `mlc::..._dependent`."""
    starts = list(_KERNEL.finditer(source))
    ends = [match.start() for match in starts[1:]] + [len(source)]
    return {
        match[1]
        for match, end in zip(starts, ends, strict=True)
        if _DEPENDENT.search(source, match.end(), end)
    }


def _with_machine_code(
    modules: Sequence[CudaModule], archs: Sequence[int], nvcc: Nvcc, dump: Path | None
) -> list[CudaModule]:
    """TVM makes one module for the kernels that a caller sees and one for the rest."""
    # The longest first, so that two workers end at about the same time.
    order = sorted(range(len(modules)), key=lambda i: -len(modules[i].code))
    with ThreadPoolExecutor(max_workers=2) as pool:
        work = {i: pool.submit(_convert, i, modules[i], archs, nvcc, dump) for i in order}
        return [work[i].result() for i in range(len(modules))]


def _convert(
    number: int, module: CudaModule, archs: Sequence[int], nvcc: Nvcc, dump: Path | None
) -> CudaModule:
    if module.format != "cuda":
        raise CheckFailedError(f"TVM made a CUDA module of format {module.format!r}, not source")
    source = module.code.decode()
    if dump is not None:
        (dump / f"kernels_{number}.cu").write_text(source, encoding="utf-8")
    compiled = compile_cuda(source, archs, nvcc, report=dump is not None)
    if dump is not None:
        (dump / f"kernels_{number}.ptxas.txt").write_text(compiled.report, encoding="utf-8")
    dependent = dependent_kernels(source)
    functions = tuple(
        function.dependent() if function.name in dependent else function
        for function in sorted(module.functions, key=lambda f: f.name)
    )
    if unknown := dependent - {function.name for function in functions}:
        raise CheckFailedError(f"TVM's module does not list the kernels {sorted(unknown)}")
    return replace(module, format="fatbin", functions=functions, code=compiled.fatbin)


def _imports(module: Any) -> Iterator[Any]:
    yield module
    for imported in module.imports:
        yield from _imports(imported)
