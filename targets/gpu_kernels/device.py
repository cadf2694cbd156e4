"""The limits and abilities that portable GPU kernels are written against."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPUDevice:
    """What a launch may use on the weakest adapter that a library promises to run on.

    Attributes:
        max_threads: threads of one group.
        shared_bytes: group memory of one launch, in bytes.
        max_buffers: storage buffers bound by one launch.
        bfloat16: whether kernels may compute in it.
        merged_auxiliary: the KV cache's runtime hands over its small index arrays as views of one
            buffer (it does on CUDA) and tree orders as [m, 2]; elsewhere each has a buffer of its
            own, and tree orders are flat.
        simdgroup_matrix: whether it has Metal's 8x8 simdgroup matrices (family Apple7: A14, M1).
        wgsl: whether kernels become WGSL, whose built-in functions they may then call by name.
    """

    max_threads: int = 256
    shared_bytes: int = 32 << 10
    max_buffers: int = 10
    bfloat16: bool = False
    merged_auxiliary: bool = False
    simdgroup_matrix: bool = False
    wgsl: bool = False


WEBGPU = GPUDevice(wgsl=True)
"""What web-llm asks an adapter for: notes/webgpu.md."""
