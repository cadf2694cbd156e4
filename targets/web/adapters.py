"""WebGPU adapters of this machine, as PyPI's `wgpu` finds them."""

from __future__ import annotations

import os
import tempfile
from typing import Any


def adapters() -> list[Any]:
    """Every adapter that `wgpu` offers but those of OpenGL, which lacks what kernels need.

    Raises:
        ImportError: no `wgpu`. Whatever a driver makes of a machine without a GPU otherwise.
    """
    import wgpu
    from wgpu.backends.wgpu_native.extras import set_instance_extras

    if not _state:
        set_instance_extras(backends=["Vulkan", "Metal", "DX12"])
        _state.append(True)
    # Vulkan's window system layer complains on stderr where no desktop session set this.
    quiet = "XDG_RUNTIME_DIR" not in os.environ
    if quiet:
        os.environ["XDG_RUNTIME_DIR"] = tempfile.gettempdir()
    try:
        found: list[Any] = wgpu.gpu.enumerate_adapters_sync()
    finally:
        if quiet:
            del os.environ["XDG_RUNTIME_DIR"]
    return found


_state: list[bool] = []  # whether the backends were chosen; wgpu has one instance in a process
