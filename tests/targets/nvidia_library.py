"""A small executable for the cuda target, and fat binaries put together by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

SOURCE = """
#ifndef SCALE
#define SCALE
#include <cuda_fp16.h>
namespace mlc {
template <bool Dependent>
__device__ __forceinline__ void scale(const float* x, float* y, int n) {
#if __CUDA_ARCH__ >= 900
  if (Dependent) asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 2.0f * x[i];
}
__device__ __forceinline__ void plain(const float* x, float* y, int n) { scale<false>(x, y, n); }
template <int N>
__device__ __forceinline__ void scale_dependent(const float* x, float* y, int n, void* memory) {
  scale<true>(x, y, n);
}
}  // namespace mlc
#endif
"""


def executable(archs: Sequence[int]) -> Any:
    """Two kernels, of which the second is launched as a dependent, with dynamic shared memory."""
    import tvm
    from tvm import relax
    from tvm.backend.cuda.op import cuda_func_call
    from tvm.tirx.script.builder import ir as T

    from mlc_compile.targets.cuda import BACKEND
    from mlc_compile.targets.gpu_kernels._emit import build_kernel, groups, i32, symbol
    from mlc_compile.targets.nvidia.archs import sm
    from mlc_compile.targets.nvidia.export import source_modules

    n = symbol("n")

    def body(x: Any, middle: Any, y: Any) -> None:
        for function, source, target in (
            ("plain", x, middle),
            ("scale_dependent<4>", middle, y),
        ):
            with (
                T.launch_thread("blockIdx.x", groups(n, 128)),
                T.launch_thread("threadIdx.x", i32(128)),
            ):
                operands = [source.data, target.data, n]
                if "dependent" in function:
                    memory = T.alloc_buffer([i32(256)], "uint8", scope="shared.dyn", layout=None)
                    operands.append(memory.data)
                T.evaluate(cuda_func_call(f"mlc::{function}", *operands, source_code=SOURCE))

    arguments = [(name, (n,), "float32") for name in ("x", "middle", "y")]
    kernel = build_kernel("twice", arguments, body, private=False)
    target = BACKEND.tvm_target(",".join(map(sm, archs)), ".so")
    mod = tvm.tirx.transform.BindTarget(target)(tvm.IRModule({"twice": kernel}))
    with source_modules():
        return relax.build(mod, target, relax_pipeline=None)


def fatbin(*codes: tuple[int, int, bytes]) -> bytes:
    """A fat binary of (kind, architecture, payload) entries, as nvcc lays them out."""
    body = b""
    for kind, arch, payload in codes:
        payload += b"\0" * (-len(payload) % 8)
        header = struct.pack("<HHIQIIII", kind, 0x101, 64, len(payload), 0, 0, 0, arch)
        body += header.ljust(64, b"\0") + payload
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def cubin(machine: int = 190) -> bytes:
    """The beginning of an ELF file for a processor; 190 is NVIDIA's."""
    return b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack("<HH", 2, machine)
