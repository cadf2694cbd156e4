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
        wgsl: kernels become WGSL and may call its built-in functions by name.
    """

    max_threads: int = 256
    shared_bytes: int = 32 << 10
    max_buffers: int = 10
    wgsl: bool = False


WEBGPU = GPUDevice(wgsl=True)
"""What web-llm asks an adapter for: notes/webgpu.md."""
