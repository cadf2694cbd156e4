"""Hand-written CUDA C++ as a module of the emulated device."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import tvm
import tvm_ffi

from mlc_compile.runtime import cuda_emulator
from mlc_compile.runtime.cuda_emulator import options
from mlc_compile.targets.nvidia.packing import (
    DYNAMIC_SHARED_MEMORY,
    CudaModule,
    Function,
    save_module,
)

HANDLE, INT, FLOAT = (3, 64, 1), (0, 32, 1), (2, 32, 1)
DYNAMIC = "extern __shared__ __align__(64) uchar memory[];\n"
EXTENTS = tuple(f"{kind}Idx.{axis}" for kind in ("block", "thread") for axis in "xyz")


def kernel(body: str, arguments: str = "float* x", head: str = "") -> str:
    """A kernel `k` around `body`, in which i is threadIdx.x; a head may be of any lines."""
    return (
        f"#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n#define uchar unsigned char\n{head}\n"
        f'extern "C" __global__ void k({arguments}) {{\n'
        f"[[maybe_unused]] const int i = threadIdx.x;\n{body}\n}}\n"
    )


def module(source: str, count: int, scalars: Any = ()) -> Any:
    """A loaded module; its kernels take `count` buffers, then scalars, extents in x, y, z of the
    grid and of a block, and bytes of dynamic shared memory."""
    cuda_emulator.install()
    types = [HANDLE] * count + [FLOAT if isinstance(s, float) else INT for s in scalars]
    names = re.findall(r'extern "C" __global__ void (?:__\w+__\(.*?\) )?(\w+)\(', source)
    tags = (*EXTENTS, DYNAMIC_SHARED_MEMORY)
    functions = tuple(Function(n, tuple(types), tags, (0,) * len(types)) for n in names)
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
    return load(save_module(CudaModule("cuda", functions, source.encode())))


def on_device(array: np.ndarray) -> Any:
    cuda_emulator.install()
    return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.device("cuda", 0))


def launch(
    source: str,
    *arrays: Any,
    grid: tuple[int, ...] = (1,),
    block: tuple[int, ...] = (32,),
    shared: int = 0,
    scalars: Any = (),
    name: str = "k",
) -> list[np.ndarray]:
    """Run a kernel on arrays (copied to the device, unless they are there) and scalars; the arrays
    afterwards."""
    loaded = module(source, len(arrays), scalars)
    tensors = [on_device(a) if isinstance(a, np.ndarray) else a for a in arrays]
    extents = [*grid, 1, 1][:3] + [*block, 1, 1][:3]
    loaded[name](*(pointer(t) for t in tensors), *scalars, *extents, shared)
    return [t.numpy() for t in tensors]


def pointer(tensor: Any) -> Any:
    import ctypes

    return ctypes.c_void_p(tensor.data_ptr())


def refuses(what: str, source: str, *arrays: Any, races: bool = False, **more: Any) -> str:
    """The message of a launch that must stop, in every order; `what` is a part of it."""
    message = ""
    for order, seed in (("ascending", 0), ("descending", 0), ("shuffled", 0), ("shuffled", 5)):
        with (
            options(races=races, order=order, seed=seed),
            pytest.raises(RuntimeError, match=what) as caught,
        ):
            launch(source, *arrays, **more)
        message = str(caught.value)
        assert "k, block (" in message
    return message


def race(source: str, *arrays: Any, **more: Any) -> str:
    return refuses("race on", source, *arrays, races=True, **more)


def accepts(source: str, *arrays: Any, **more: Any) -> list[np.ndarray]:
    """What a launch leaves, which is the same in every order, with the search for races too."""
    results = []
    for races in (False, True):
        for order, seed in (("ascending", 0), ("descending", 0), ("shuffled", 1)):
            with options(races=races, order=order, seed=seed):
                results.append(launch(source, *arrays, **more))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    return results[0]
