"""Hand-written MSL as a module of the emulated device, and targets for TVM's own Metal code."""

from __future__ import annotations

import ctypes
import re
import struct
from typing import Any

import numpy as np
import tvm
import tvm_ffi

from mlc_compile.runtime import metal_emulator
from mlc_compile.targets.gpu_kernels.device import GPUDevice

METAL = GPUDevice(max_buffers=31)
TARGET = tvm.target.Target(
    {
        "kind": "metal",
        "max_threads_per_block": 256,
        "max_num_threads": 256,
        "max_shared_memory_per_block": 32768,
        "thread_warp_size": 1,
        "host": {"kind": "llvm"},
    }
)
DTYPES = {"int32": (0, 32), "uint32": (1, 32), "float32": (2, 32), "handle": (3, 64)}


def msl(body: str, arguments: str = "device float* x [[ buffer(0) ]]", head: str = "") -> str:
    """A kernel `k` around `body`, with one-dimensional positions `group` and `i`."""
    return f"""#include <metal_stdlib>
using namespace metal;
{head}
kernel void k({arguments},
  uint group [[threadgroup_position_in_grid]],
  uint i [[thread_position_in_threadgroup]]
) {{
{body}
}}
"""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def payload(kernels: dict[str, tuple[str, list[str], list[str]]]) -> bytes:
    """What TVM serialises: source, argument types and launch parameters of each kernel."""
    out = text("metal") + struct.pack("<Q", len(kernels))
    for name, (_, types, tags) in kernels.items():
        out += text(name) * 2 + struct.pack("<Q", len(types))
        out += b"".join(struct.pack("<BBH", *DTYPES[t], 0 if t == "handle" else 1) for t in types)
        out += struct.pack("<Q", len(tags)) + b"".join(map(text, tags))
        out += struct.pack("<Q", len(types)) + bytes(4 * len(types))
    out += struct.pack("<Q", len(kernels))
    return out + b"".join(text(name) + text(source) for name, (source, _, _) in kernels.items())


def embedded(module: bytes) -> bytes:
    """A module as it stands in a library."""
    return text("metal") + struct.pack("<Q", len(module)) + module


def device() -> Any:
    metal_emulator.install()
    return tvm.device("metal", 0)


def on_device(array: np.ndarray) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array), device())


def launch(source: str, *arrays: Any, groups: int = 1, threads: int = 32, scalars: Any = ()) -> Any:
    """Run the kernel on arrays (copied to the device, unless they are there) and scalars; the
    arrays afterwards."""
    metal_emulator.install()
    scalars = list(scalars)
    types = ["handle"] * len(arrays)
    types += ["float32" if isinstance(s, float) else "int32" for s in scalars]
    (name,) = re.findall(r"kernel void (\w+)", source)
    tags = ["blockIdx.x", "threadIdx.x"]
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.metal")
    module = load(payload({name: (source, types, tags)}))
    tensors = [on_device(a) if isinstance(a, np.ndarray) else a for a in arrays]
    pointers = [a if isinstance(a, ctypes.c_void_p) else pointer(a) for a in tensors]
    module[name](*pointers, *scalars, groups, threads)
    return [t.numpy() for t in tensors if not isinstance(t, ctypes.c_void_p)]


def pointer(tensor: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())
