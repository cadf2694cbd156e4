"""GPU kernels as a library that the `webgpu` device runs."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tvm

TARGET = tvm.target.Target({"kind": "webgpu", "host": {"kind": "llvm"}})


def loaded(executable: Any) -> Any:
    """What was built, through a file: a module fresh from the compiler has no runtime."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "library.so"
        executable.export_library(str(path))
        return tvm.runtime.load_module(str(path))


def build(kernels: Mapping[str, Any]) -> Any:
    """PrimFuncs by the names that they get."""
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    return tvm.tirx.build(tvm.IRModule(named), target=TARGET)


def on_device(array: np.ndarray) -> Any:
    device = tvm.device("webgpu", 0)
    if not array.size:  # there is nothing to copy, and WebGPU refuses to
        return tvm.runtime.empty(array.shape, str(array.dtype), device)
    return tvm.runtime.tensor(array, device)


def wgsl(built: Any) -> dict[str, str]:
    """The code of each device kernel by its name."""
    source = built.imports[0].inspect_source()
    pieces = [p for p in re.split(r"(?=// Function: )", source) if "@compute" in p]
    return {re.findall(r"fn (\w+)\(", piece)[-1]: piece for piece in pieces}


def check_limits(name: str, code: str, device: Any) -> None:
    """Threads, group memory, buffers and word sizes of one device kernel."""
    (size,) = re.findall(r"@workgroup_size\((\d+), (\d+), (\d+)\)", code)
    threads = int(size[0]) * int(size[1]) * int(size[2])
    assert threads <= device.max_threads, name
    shared = re.findall(r"var<workgroup> \w+ : array<(?:vec(\d)<)?(\w\d\d)>?, (\d+)>", code)
    assert len(shared) == code.count("var<workgroup>"), name
    taken = sum(int(lanes or 1) * int(kind[1:]) // 8 * int(n) for lanes, kind, n in shared)
    assert taken <= device.shared_bytes, name
    assert code.count("var<storage") <= device.max_buffers, name
    assert "i64" not in code and "u64" not in code, name
