"""Libraries for NVIDIA GPUs: machine code in place of source, launch tags, and that TVM's own
loader takes them."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from nvidia_library import cubin, executable, fatbin

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError, InputError
from mlc_compile.targets.nvidia.export import (
    check_library,
    dependent_kernels,
    export_library,
    source_modules,
)
from mlc_compile.targets.nvidia.fatbin import find_fatbins
from mlc_compile.targets.nvidia.packing import (
    DEPENDENT_LAUNCH,
    DYNAMIC_SHARED_MEMORY,
    CudaModule,
    Function,
    load_module,
    replace_cuda,
    save_module,
)
from mlc_compile.targets.nvidia.toolchain import find_nvcc

PLAIN, DEPENDENT = "twice_kernel", "twice_kernel_1"


def packed(made: Any) -> bytes:
    import tvm_ffi

    pack = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")
    return bytes(pack(made.mod).numpy())


def modules_of(blob: bytes) -> list[CudaModule]:
    found: list[CudaModule] = []

    def keep(modules: Sequence[CudaModule]) -> Sequence[CudaModule]:
        found.extend(modules)
        return modules

    assert replace_cuda(blob, keep) == blob
    return found


@pytest.fixture(scope="module")
def made() -> Any:
    return executable((90,))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For two architectures, both of which have dependent launches."""
    path = tmp_path_factory.mktemp("nvidia") / "twice.so"
    export_library(executable((90, 100)), path, (90, 100), find_nvcc())
    return path


def test_code_generation_leaves_source(made: Any) -> None:
    (module,) = modules_of(packed(made))
    assert module.format == "cuda"
    source = module.code.decode()
    assert "__global__" in source
    assert {function.name for function in module.functions} == {PLAIN, DEPENDENT}
    assert dependent_kernels(source) == {DEPENDENT}


def test_source_stays_source_where_the_runtime_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that ran a library, TVM would compile for this machine's GPU at once."""
    import tvm_ffi

    def create(code: bytes, form: str, functions: Any, sources: Any) -> None:
        raise AssertionError("called")

    tvm_ffi.register_global_func("ffi.Module.create.cuda", create, override=True)
    try:
        (module,) = modules_of(packed(executable((80,))))
    finally:
        tvm_ffi.registry.remove_global_func("ffi.Module.create.cuda")
    assert module.format == "cuda"
    monkeypatch.setenv("TVM_COMPILE_FORCE_FALLBACK", "0")
    with source_modules():
        assert os.environ["TVM_COMPILE_FORCE_FALLBACK"] == "1"
    assert os.environ["TVM_COMPILE_FORCE_FALLBACK"] == "0"


def test_the_tag_comes_before_that_of_shared_memory() -> None:
    function = Function("k", ((2, 32, 1),), ("blockIdx.x", "threadIdx.x"), (0,))
    assert function.dependent().tags == ("blockIdx.x", "threadIdx.x", DEPENDENT_LAUNCH)
    shared = replace(function, tags=(*function.tags, DYNAMIC_SHARED_MEMORY))
    assert shared.dependent().tags == (*function.dependent().tags, DYNAMIC_SHARED_MEMORY)
    assert shared.dependent().dependent() == shared.dependent()


def test_modules_are_saved_as_they_were_loaded(made: Any) -> None:
    (module,) = modules_of(packed(made))
    data = save_module(module)
    assert load_module(data) == module
    for length in range(0, len(data) - 1, 7):
        with pytest.raises(CheckFailedError, match=r"format of TVM 0\.27"):
            load_module(data[:length])


def test_another_format_of_packed_modules_is_noticed(made: Any) -> None:
    blob = packed(made)
    broken = [blob[:-1], blob + b"\0", blob[:40], b"", struct.pack("<Q", 4) + b"\xff" * 4]
    inner = blob.index(save_module(modules_of(blob)[0]))
    data = bytearray(blob)
    data[inner - 8] += 1  # one byte more for the module than it has
    broken.append(bytes(data))
    for wrong in broken:
        with pytest.raises(CheckFailedError, match=r"format of TVM 0\.27"):
            replace_cuda(wrong, list)


def test_a_library_holds_machine_code_and_no_source(library: Path) -> None:
    data = library.read_bytes()
    (codes,) = find_fatbins(data)
    assert sorted((c.kind, c.arch) for c in codes) == [("elf", 90), ("elf", 100), ("ptx", 100)]
    for mark in (b"__global__", b"#include", b"griddepcontrol"):
        assert mark not in data


def test_dependent_kernels_alone_are_tagged(library: Path) -> None:
    data = library.read_bytes()
    assert data.count(DEPENDENT_LAUNCH.encode()) == 1
    # The module begins with its format; functions are sorted by name.
    start = data.index(struct.pack("<Q", 6) + b"fatbin" + struct.pack("<Q", 2))
    module = load_module(data[start:])
    tags = {function.name: function.tags for function in module.functions}
    assert tags[PLAIN] == ("blockIdx.x", "threadIdx.x")
    assert tags[DEPENDENT] == (*tags[PLAIN], DEPENDENT_LAUNCH, DYNAMIC_SHARED_MEMORY)


def test_the_same_bytes_every_time(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLC_COMPILE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "out"
    folder.mkdir()
    export_library(executable((90, 100)), folder / "twice.so", (90, 100), find_nvcc())
    assert (folder / "twice.so").read_bytes() == library.read_bytes()
    assert [path.name for path in folder.iterdir()] == ["twice.so"]


def test_a_dump_has_the_source_and_the_report(made: Any, tmp_path: Path) -> None:
    export_library(made, tmp_path / "twice.so", (90,), find_nvcc(), tmp_path)
    assert "mlc::scale_dependent<4>" in (tmp_path / "kernels_0.cu").read_text()
    assert "registers" in (tmp_path / "kernels_0.ptxas.txt").read_text()


GOOD = fatbin((2, 75, cubin()), (2, 90, cubin()), (1, 90, b"//PTX"))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no machine code"),
        (GOOD[:-8], "no machine code"),
        (GOOD + fatbin((2, 90, cubin()), (1, 90, b"//PTX")), r"machine code for \['sm_90'\] and"),
        (fatbin((2, 75, cubin()), (2, 90, cubin())), r"PTX for \[\]"),
        (GOOD + b'extern "C" __global__ void k() {}', "CUDA C.. source"),
    ],
)
def test_a_file_that_is_not_what_was_asked_for_is_refused(data: bytes, says: str) -> None:
    check_library(GOOD, (75, 90), "model.so")
    with pytest.raises(CheckFailedError, match=says):
        check_library(data, (75, 90), "model.so")


def test_which_kernels_are_dependent() -> None:
    source = (
        'extern "C" __global__ void __launch_bounds__(256, 2) a(half* x, int n);\n'
        'extern "C" __global__ void __launch_bounds__(32) b(half* x);\n'
        'extern "C" __global__ void c(half* x);\n'
        "// mlc::norm_dependent(x)\n"
        'extern "C" __global__ void __launch_bounds__(256, 2) a(half* x, int n) {\n'
        "  mlc::gemv_dependent<8, mlc::Pair<1>>(x, n);\n}\n"
        'extern "C" __global__ void __launch_bounds__(32) b(half* x) {\n'
        "  mlc::gemv_dependently(x); gemv_dependent(x);\n}\n"
        'extern "C" __global__ void c(half* x) {\n  mlc::norm_dependent(x);\n}\n'
    )
    assert dependent_kernels(source) == {"a", "c"}


STUB = "cuDeviceGetName cuFuncSetAttribute cuGetErrorName cuGetErrorString cuLaunchKernelEx "
STUB += "cuModuleGetFunction cuModuleLoadData cuModuleUnload cuTensorMapEncodeTiled"

LOAD = """
import ctypes, json, sys
from pathlib import Path
from mlc_compile.runtime import cuda_device
ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)
cuda_device._load_cudart()
import tvm
ctypes.CDLL(str(cuda_device.side_car()), ctypes.RTLD_GLOBAL)
def kinds(module):
    return [str(module.kind), [kinds(m) for m in module.imports]]
module = tvm.runtime.load_module(sys.argv[2])
print(json.dumps([kinds(module), sys.modules.get("tvm.relax") is None]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TVM's side-car is for Linux")
def test_the_loader_of_tvm_takes_it(library: Path, tmp_path: Path) -> None:
    """With a driver that has the symbols alone, and TVM's runtime without its compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))
    stub = tmp_path / "libcuda.so.1"
    source = "".join(f"int {name}(void) {{ return 999; }}\n" for name in STUB.split())
    flags = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(stub)]
    subprocess.run([compiler, *flags], input=source, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(stub), str(library)],
        env={**os.environ, "TVM_USE_RUNTIME_LIB": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kinds, without_compiler = json.loads(done.stdout.splitlines()[-1])
    assert kinds == ["relax.VMExecutable", [["library", [["cuda", []]]]]]
    assert without_compiler


def test_targets_carry_their_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlc_compile.targets.cuda import BACKEND, architectures
    from mlc_compile.targets.nvidia import driver

    target = BACKEND.tvm_target(None, ".so")
    assert architectures(target) == (75, 80, 90)
    assert str(target.attrs["arch"]) == "sm_75"
    assert architectures(BACKEND.tvm_target("sm_90,sm_86", ".so")) == (86, 90)
    monkeypatch.setattr(driver, "this_gpu", lambda: driver.GPU("NVIDIA L4", 89, (13, 0)))
    assert architectures(BACKEND.tvm_target("auto", ".so")) == (89,)
    with pytest.raises(InputError, match="sm_42 is no architecture"):
        BACKEND.tvm_target("sm_42", ".so")
    if find_nvcc().version >= (13, 0):
        with pytest.raises(EnvironmentLacksError, match="CUDA 12 toolkit"):
            BACKEND.tvm_target("sm_61", ".so")


def test_bfloat16_is_refused_for_architectures_without_it() -> None:
    from mlc_compile.targets.cuda import BACKEND
    from mlc_compile.targets.kv_cache import KVCacheSpec

    spec = KVCacheSpec(1, 2, 1, 64, "bfloat16", (1.0,) * 32)
    with pytest.raises(InputError, match=r"sm_75 has no bfloat16.*--target cuda:sm_80,sm_90"):
        BACKEND.kv_cache_kernels(BACKEND.tvm_target(None, ".so"))(spec)
    assert BACKEND.kv_cache_kernels(BACKEND.tvm_target("sm_80", ".so"))(spec).decode is not None
