"""GPU kernels as libraries of the devices that run here: `webgpu`, emulated `metal` and `cuda`."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from mlc_compile.runtime import cuda_emulator, metal_emulator
from mlc_compile.targets.cuda import CUDA
from mlc_compile.targets.gpu_kernels.device import WEBGPU, GPUDevice
from mlc_compile.targets.metal import MACOS_BACKEND, METAL


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of TVM by its name, what to compile for, and what kernels must keep to."""

    name: str
    target: tvm.target.Target
    limits: GPUDevice

    def tensor(self, array: np.ndarray) -> Any:
        device = tvm.device(self.name, 0)
        if not array.size:  # there is nothing to copy, and WebGPU refuses to
            return tvm.runtime.empty(array.shape, str(array.dtype), device)
        return tvm.runtime.tensor(array, device)

    def smaller(self, max_threads: int, shared_bytes: int) -> Device:
        limits = dataclasses.replace(
            self.limits, max_threads=max_threads, shared_bytes=shared_bytes
        )
        return dataclasses.replace(self, limits=limits)

    def strict(self) -> AbstractContextManager[Any]:
        """Within it, launches of more threads than the limits allow fail, where that can be."""
        limits = self.limits
        if self.name == "metal":
            return metal_emulator.options(max_threads=limits.max_threads)
        if self.name == "cuda":
            return cuda_emulator.options(
                max_threads=limits.max_threads, max_shared=limits.shared_bytes
            )
        return nullcontext()


_WGSL = tvm.target.Target({"kind": "webgpu", "host": {"kind": "llvm"}})
_CUDA = tvm.target.Target(
    {
        "kind": "cuda",
        "arch": "sm_75",
        "max_threads_per_block": 1024,
        "max_shared_memory_per_block": 48 << 10,
        "thread_warp_size": 32,
        "host": {"kind": "llvm"},
    }
)
DEVICES = {
    "webgpu": Device("webgpu", _WGSL, WEBGPU),
    "metal": Device("metal", MACOS_BACKEND.tvm_target(None, ".so"), METAL),
    "cuda": Device("cuda", _CUDA, CUDA),
}


def loaded(executable: Any) -> Any:
    """What was built, through a file: a module fresh from the compiler has no runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        executable.export_library(str(path))
        return tvm.runtime.load_module(str(path))


def build(device: Device, kernels: Mapping[str, Any]) -> Any:
    """PrimFuncs by the names that they get."""
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    return tvm.tirx.build(tvm.IRModule(named), target=device.target)


def wgsl(built: Any) -> dict[str, str]:
    """The code of each device kernel by its name."""
    source = built.imports[0].inspect_source()
    pieces = [p for p in re.split(r"(?=// Function: )", source) if "@compute" in p]
    return {re.findall(r"fn (\w+)\(", piece)[-1]: piece for piece in pieces}


def check_limits(device: Device, built: Any) -> dict[str, str]:
    """The code of each device kernel by its name; fails where one exceeds the device's limits.

    Threads of Metal's are in no code, CUDA's group memory may be dynamic: `Device.strict` checks
    them where a kernel runs.
    """
    if device.name == "metal":
        return _check_metal(device.limits, built)
    if device.name == "cuda":
        return _check_cuda(device.limits, built)
    codes = wgsl(built)
    for name, code in codes.items():
        check_wgsl(name, code, device.limits)
    return codes


def check_wgsl(name: str, code: str, limits: GPUDevice) -> None:
    """Threads, group memory, buffers and word sizes of one device kernel."""
    (size,) = re.findall(r"@workgroup_size\((\d+), (\d+), (\d+)\)", code)
    threads = int(size[0]) * int(size[1]) * int(size[2])
    assert threads <= limits.max_threads, name
    shared = re.findall(r"var<workgroup> \w+ : array<(?:vec(\d)<)?(\w\d\d)>?, (\d+)>", code)
    assert len(shared) == code.count("var<workgroup>"), name
    taken = sum(int(lanes or 1) * int(kind[1:]) // 8 * int(n) for lanes, kind, n in shared)
    assert taken <= limits.shared_bytes, name
    assert code.count("var<storage") <= limits.max_buffers, name
    assert "i64" not in code and "u64" not in code, name


def _check_metal(limits: GPUDevice, built: Any) -> dict[str, str]:
    """Group memory, buffers and arguments of every kernel, and no 64-bit words."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        built.export_library(str(path))
        (kernels,) = metal_emulator.read_kernels(path)
    allowed = metal_emulator.Limits(
        group_bytes=limits.shared_bytes, buffers=limits.max_buffers, simdgroup_matrices=False
    )
    for verdict in metal_emulator.check_kernels(kernels, allowed, types=False):
        assert verdict.ok, (verdict.name, verdict.problems)
    codes = {kernel.name: kernel.source for kernel in kernels}
    for name, code in codes.items():
        assert not re.search(r"\b(u?long|u?int64_t)\b", code), name
    return codes


def _check_cuda(limits: GPUDevice, built: Any) -> dict[str, str]:
    """Threads of every kernel, and no 64-bit words."""
    units = cuda_emulator.split(built.imports[0].inspect_source())
    for name, unit in units.items():
        threads = re.search(r"__launch_bounds__\((\d+)", unit.body)  # none: one thread
        assert int(threads[1] if threads else 1) <= limits.max_threads, name
        assert not re.search(r"\b(int64_t|uint64_t|long)\b", unit.body), name
    return {name: unit.body for name, unit in units.items()}
