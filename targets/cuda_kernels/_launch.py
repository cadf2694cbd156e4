"""TIR around CUDA C++: launches whose body is one call of a device function of `cuh/`.

The library's one CUDA source includes the headers by name (targets/nvidia gives nvcc their
folder); a header is guarded, so that any number of kernels may name it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm.backend.cuda.op import cuda_func_call
from tvm.tirx.buffer import BufferType
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.gpu_kernels._emit import Expr, i32

HEADERS = Path(__file__).parent / "cuh"
"""What nvcc needs as an include folder."""


def device_call(
    header: str,
    function: str,
    arguments: Sequence[Any],
    *,
    threads: int,
    grid: Sequence[Expr | int],
    shared_bytes: int = 0,
    min_blocks: int = 0,
) -> None:
    """Launch `function` (of namespace mlc, template arguments included) of `cuh/<header>`.

    arguments: buffers (passed as pointers to their element type: a float16 one as `half*`) and
    scalars. grid: one to three extents. shared_bytes: dynamic shared memory, whose address is then
    the function's last argument (`unsigned char*`, 128-byte aligned). min_blocks: how many blocks
    the registers of a multiprocessor must suffice for; 0 leaves that to the compiler.
    """
    operands = [a.data if isinstance(getattr(a, "ty", None), BufferType) else a for a in arguments]
    with contextlib.ExitStack() as stack:
        for axis, extent in zip("xyz", grid, strict=False):
            extent = i32(extent) if isinstance(extent, int) else extent
            stack.enter_context(T.launch_thread(f"blockIdx.{axis}", extent))
        stack.enter_context(T.launch_thread("threadIdx.x", i32(threads)))
        if shared_bytes:
            memory = T.alloc_buffer([i32(shared_bytes)], "uint8", scope="shared.dyn", layout=None)
            operands.append(memory.data)
        if min_blocks:
            bound = "tirx.launch_bounds_min_blocks_per_sm"
            stack.enter_context(T.attr(i32(0), bound, i32(min_blocks)))
        source = f'#include "{header}"\n'
        T.evaluate(cuda_func_call(f"mlc::{function}", *operands, source_code=source))
