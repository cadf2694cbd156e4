"""A native `webgpu` device for TVM: the WGSL kernels of a library run on this machine's GPU.

Browsers run them through JavaScript (TVM's web runtime); here PyPI's `wgpu` does the same through
Vulkan, Metal or Direct3D 12, so that `verify`, tests and benchmarks reach the very kernels that a
browser gets, on a software adapter as well.

- The C++ side is the runtime's own `webgpu_runtime.cc` from the installed wheel, compiled once for
  this machine; it asks for two global functions, which JavaScript defines in a browser and
  `_Context` defines here.
- Commands are encoded as they come and submitted before every copy that leaves or enters the
  device, as in the browser. Buffers are bound whole: kernels take offsets as arguments.
- A grid of 65536 or more groups in x is folded into z as the web runtime folds it.

Environment: MLC_COMPILE_WGPU_ADAPTER chooses the adapter whose description contains its value.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mlc_compile.errors import EnvironmentLacksError

MAX_PENDING = 128
"""Dispatches in one submission."""

_SLOT = 256  # bytes between the arguments of two dispatches: the largest alignment a device asks
_MAX_GRID = 65535


def install() -> str:
    """Register the device; the adapter's description. A second call changes nothing.

    Raises:
        EnvironmentLacksError: `wgpu`, an adapter, or a C++ compiler is missing.
    """
    global _installed
    if _installed is None:
        context = _Context()
        _load_device_api(context)
        _installed = context
    return _installed.description


def load(executable: Any) -> Any:
    """A runnable module of what `relax.build` or `tirx.build` made for webgpu with a native host.

    TVM's compiler keeps WGSL in a module that only exports, so it goes through a file.
    """
    from tvm.runtime import load_module

    install()
    with tempfile.TemporaryDirectory(prefix="mlc_compile_webgpu_") as folder:
        path = Path(folder) / f"kernels_{next(_numbers)}.so"  # TVM caches libraries by their path
        executable.export_library(str(path))
        return load_module(str(path))


def missing_features(wanted: Iterable[str]) -> list[str]:
    """Those of `wanted` that the installed device lacks."""
    install()
    assert _installed is not None
    return sorted(set(wanted) - set(_installed.features))


def memory_bytes() -> tuple[int, int]:
    """(bytes in buffers now, the most at once since the last call)."""
    if _installed is None:
        return 0, 0
    found = _installed.allocated, _installed.peak
    _installed.peak = _installed.allocated
    return found


_installed: _Context | None = None
_numbers = itertools.count()


class _Context:
    """Buffers, pipelines and the commands not yet submitted, of one adapter."""

    def __init__(self) -> None:
        try:
            import wgpu
        except ImportError:
            raise EnvironmentLacksError(
                "running a webgpu library here needs the package wgpu",
                hint="pip install 'mlc-compile[webgpu]'",
            ) from None
        self.wgpu = wgpu
        adapter = _choose_adapter()
        info = adapter.info
        self.description = f"{info['device']} ({info['backend_type']})"
        wanted = {"shader-f16", "subgroup", "timestamp-query"}
        self.features = sorted(wanted & set(adapter.features))
        limits = {
            name: adapter.limits[name]
            for name in (
                "max-buffer-size",
                "max-storage-buffer-binding-size",
                "max-storage-buffers-per-shader-stage",
                "max-compute-workgroup-storage-size",
                "max-compute-invocations-per-workgroup",
                "max-compute-workgroup-size-x",
            )
        }
        self.device = adapter.request_device_sync(
            required_features=self.features, required_limits=limits
        )
        usage = wgpu.BufferUsage
        self._storage_usage = usage.STORAGE | usage.COPY_SRC | usage.COPY_DST
        self._buffers: dict[int, Any] = {}
        self._next = 1
        self.allocated = self.peak = 0  # bytes
        self._encoder: Any = None
        self._pass: Any = None
        self._arguments = bytearray(MAX_PENDING * _SLOT)
        self._uniforms = self.device.create_buffer(
            size=len(self._arguments), usage=usage.UNIFORM | usage.COPY_DST | usage.COPY_SRC
        )
        self._pending = 0
        self._groups: dict[tuple[int, ...], Any] = {}
        self._groups_of: dict[int, list[tuple[int, ...]]] = {}

    # ---- memory

    def deviceAllocDataSpace(self, nbytes: int) -> float:
        number = self._next
        self._next += 1
        size = max(4, (nbytes + 3) // 4 * 4)
        self._buffers[number] = self.device.create_buffer(size=size, usage=self._storage_usage)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)
        return float(number)

    def deviceFreeDataSpace(self, pointer: Any) -> None:
        number = _number(pointer)
        self.flush()
        for key in self._groups_of.pop(number, ()):
            self._groups.pop(key, None)
        buffer = self._buffers.pop(number)
        self.allocated -= buffer.size
        buffer.destroy()

    def deviceCopyToGPU(self, source: Any, target: Any, offset: int, nbytes: int) -> None:
        if nbytes == 0:
            return
        self.flush()
        data = ctypes.string_at(_number(source), nbytes)
        data += bytes(-nbytes % 4)  # whole words, zeros after the end: as the web runtime does
        self.device.queue.write_buffer(self._buffers[_number(target)], offset, data)

    def deviceCopyFromGPU(self, source: Any, offset: int, target: Any, nbytes: int) -> None:
        if nbytes == 0:
            return
        self.flush()
        start = offset // 4 * 4
        size = (offset + nbytes - start + 3) // 4 * 4
        data = self.device.queue.read_buffer(self._buffers[_number(source)], start, size)
        piece = bytes(data[offset - start : offset - start + nbytes])
        ctypes.memmove(_number(target), piece, nbytes)

    def deviceCopyWithinGPU(
        self, source: Any, source_offset: int, target: Any, target_offset: int, nbytes: int
    ) -> None:
        self._end_pass()
        self._command_encoder().copy_buffer_to_buffer(
            self._buffers[_number(source)],
            source_offset,
            self._buffers[_number(target)],
            target_offset,
            (nbytes + 3) // 4 * 4,
        )

    # ---- commands

    def _command_encoder(self) -> Any:
        if self._encoder is None:
            self._encoder = self.device.create_command_encoder()
        return self._encoder

    def _compute_pass(self) -> Any:
        if self._pass is None:
            self._pass = self._command_encoder().begin_compute_pass()
        return self._pass

    def _end_pass(self) -> None:
        if self._pass is not None:
            self._pass.end()
            self._pass = None

    def flush(self) -> None:
        """Submit what was encoded."""
        if self._encoder is None:
            return
        self._end_pass()
        if self._pending:
            used = bytes(self._arguments[: self._pending * _SLOT])
            self.device.queue.write_buffer(self._uniforms, 0, used)
        self.device.queue.submit([self._encoder.finish()])
        self._encoder = None
        self._pending = 0

    def wait(self) -> None:
        """Submit and wait for the device."""
        self.flush()
        # wgpu 0.32's on_submitted_work_done_sync hands the driver a callback of the wrong type
        self.device.queue.read_buffer(self._uniforms, 0, 4)

    def create_shader(self, info_json: str, code: str) -> Callable[..., None]:
        """The launcher of one kernel: buffers and scalars in the order of its info, then extents.

        Raises:
            RuntimeError: the driver refuses the WGSL; the message is its own.
        """
        info = json.loads(info_json)
        tags: list[str] = info["launch_param_tags"]
        writes: list[int] = []
        axes: list[int] = []
        for tag in tags:
            kind, _, rest = tag.partition("paramWriteAccess:" if ":" in tag else ".")
            if kind == "blockIdx":
                axes.append("xyz".index(rest))
            elif kind == "threadIdx":
                axes.append(-1)  # fixed in the WGSL
            else:
                writes = json.loads(rest)
        types: list[str] = info["arg_types"]
        handles = [i for i, t in enumerate(types) if t == "handle"]
        scalars = [(i, _format(t, info["name"])) for i, t in enumerate(types) if t != "handle"]
        layout_entries = [
            {
                "binding": i,
                "visibility": self.wgpu.ShaderStage.COMPUTE,
                "buffer": {"type": "storage" if writes[i] else "read-only-storage"},
            }
            for i in range(len(handles))
        ]
        layout_entries.append(
            {
                "binding": len(handles),
                "visibility": self.wgpu.ShaderStage.COMPUTE,
                "buffer": {"type": "uniform"},
            }
        )
        layout = self.device.create_bind_group_layout(entries=layout_entries)
        module = self.device.create_shader_module(code=code)
        pipeline = self.device.create_compute_pipeline(
            layout=self.device.create_pipeline_layout(bind_group_layouts=[layout]),
            compute={"module": module, "entry_point": info["name"]},
        )
        identity = id(pipeline)
        count = len(types)
        argument_bytes = 4 * (len(scalars) + 1)
        packer = struct.Struct("<" + "".join(f for _, f in scalars) + "I")

        def launch(*args: Any) -> None:
            if self._pending == MAX_PENDING:
                self.flush()
            grid = [1, 1, 1]
            for axis, extent in zip(axes, args[count:], strict=True):
                if axis >= 0:
                    grid[axis] = int(extent)
            if grid[2] != 1:
                raise RuntimeError(f"{info['name']}: blockIdx.z is the web runtime's own")
            groups_x = grid[0]
            while grid[0] > _MAX_GRID:
                grid[0] = (grid[0] + 1) // 2
                grid[2] *= 2
            slot = self._pending
            self._pending += 1
            values = [args[i] for i, _ in scalars]
            packer.pack_into(self._arguments, slot * _SLOT, *values, groups_x)
            numbers = tuple(_number(args[i]) for i in handles)
            key = (identity, slot, *numbers)
            group = self._groups.get(key)
            if group is None:
                entries = [
                    {
                        "binding": i,
                        "resource": {"buffer": buffer, "offset": 0, "size": buffer.size},
                    }
                    for i, buffer in enumerate(self._buffers[n] for n in numbers)
                ]
                entries.append(
                    {
                        "binding": len(handles),
                        "resource": {
                            "buffer": self._uniforms,
                            "offset": slot * _SLOT,
                            "size": max(argument_bytes, 16),
                        },
                    }
                )
                group = self.device.create_bind_group(layout=layout, entries=entries)
                self._groups[key] = group
                for n in numbers:
                    self._groups_of.setdefault(n, []).append(key)
            compute = self._compute_pass()
            compute.set_pipeline(pipeline)
            compute.set_bind_group(0, group)
            compute.dispatch_workgroups(*grid)

        return launch


def _number(pointer: Any) -> int:
    """The value of an opaque pointer as the FFI hands it over."""
    if isinstance(pointer, int):
        return pointer
    return int(pointer.value or 0)


def _format(dtype: str, kernel: str) -> str:
    """struct's letter of a scalar argument."""
    formats = {"int32": "i", "uint32": "I", "float32": "f"}
    if dtype not in formats:
        raise RuntimeError(f"{kernel}: a scalar argument of {dtype}, which WGSL has no word for")
    return formats[dtype]


def _choose_adapter() -> Any:
    """The adapter MLC_COMPILE_WGPU_ADAPTER asks for, else a GPU, else a software adapter."""
    from mlc_compile.targets.web.adapters import adapters

    found = adapters()
    wanted = os.environ.get("MLC_COMPILE_WGPU_ADAPTER")
    if wanted:
        found = [a for a in found if wanted.lower() in a.summary.lower()]
    if not found:
        raise EnvironmentLacksError(
            "no WebGPU adapter on this machine"
            + (f" has {wanted!r} in its description" if wanted else ""),
            hint="install a Vulkan driver (Debian: mesa-vulkan-drivers is a software one)",
        )
    ranks = {"DiscreteGPU": 0, "IntegratedGPU": 1, "VirtualGPU": 2, "CPU": 3}
    return min(found, key=lambda a: ranks.get(a.info["adapter_type"], 4))


def _load_device_api(context: _Context) -> None:
    """Compile the runtime's WebGPU half if need be, and hand it our functions."""
    import tvm_ffi

    from mlc_compile.targets.web.native import device_library

    library: Path = device_library()
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    functions: dict[str, Callable[..., Any]] = {
        "wasm.WebGPUDeviceAPI": lambda name: _immortal(getattr(context, name)),
        "wasm.WebGPUCreateShader": lambda info, code: _immortal(context.create_shader(info, code)),
        "__asyncify.WebGPUWaitForTasks": context.wait,
    }
    for name, function in functions.items():
        tvm_ffi.register_global_func(name, _immortal(function), override=True)


def _immortal(function: Callable[..., Any]) -> Any:
    """A function for C++ that is never freed and does nothing after Python has gone: C++ calls and
    releases some when the process exits."""
    import tvm_ffi

    converted = tvm_ffi.convert(function)
    library = ctypes.CDLL(tvm_ffi.libinfo.find_libtvm_ffi())
    library.TVMFFIObjectIncRef(ctypes.c_void_p(converted.__chandle__()))
    return tvm_ffi.get_global_func("mlc_compile.while_python_runs")(converted)
