"""The webgpu target: WGSL kernels and a WebAssembly host in one .wasm that web-llm loads.

A library whose name ends in .so has the same kernels with a host for this machine:
`runtime.webgpu_device` runs it, so that `verify` reaches what a browser will run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax, tirx
from tvm.ir import IRModule
from tvm.target import Target

from mlc_compile.errors import InputError
from mlc_compile.targets.cpu import export_shared, linker
from mlc_compile.targets.gpu_kernels import attention, sampling
from mlc_compile.targets.gpu_kernels.device import WEBGPU
from mlc_compile.targets.gpu_kernels.fallback import schedule_loops
from mlc_compile.targets.gpu_kernels.kernels import GPUKernels
from mlc_compile.targets.profile import ExportRequest

_WASM_HOST = {
    "kind": "llvm",
    "mtriple": "wasm32-unknown-unknown-wasm",
    "vector-width": 128,
}
_NATIVE_HOST = {"kind": "llvm"}


class WebGPUBackend:
    """`targets.profile.Backend` of the webgpu target."""

    def tvm_target(self, variant: str | None, suffix: str) -> Target:
        if variant is not None:
            # Sums by subgroupAdd were slower than through group memory in 44 of 50 cases on an
            # H200 (benchmarks/NOTES.md), so that nothing here asks an adapter for subgroups.
            raise InputError(
                f"--target webgpu:{variant}: no such variant", hint="write --target webgpu"
            )
        host = _WASM_HOST if suffix == ".wasm" else _NATIVE_HOST
        return Target({"kind": "webgpu", "host": host})

    def kernels(self, target: Target) -> GPUKernels:
        return GPUKernels(WEBGPU)

    def kv_cache_kernels(self, target: Target) -> Any:
        return partial(attention.gpu_kv_cache_kernels, device=WEBGPU)

    def sampling_kernels(self, target: Target) -> Any:
        return partial(sampling.kernel, device=WEBGPU)

    def schedule(self, mod: IRModule) -> IRModule:
        # WGSL has no 64-bit integers
        return tirx.transform.ForceNarrowIndexToInt32()(schedule_loops(mod))

    def check_environment(self, suffix: str, web_toolchain: str) -> None:
        if suffix != ".wasm":
            linker()
            return
        from mlc_compile.targets.web.toolchain import get_toolchain

        get_toolchain(web_toolchain)

    def export(self, mod: IRModule, target: Target, request: ExportRequest) -> list[str]:
        wasm = request.output.suffix == ".wasm"
        executable = relax.build(mod, target, relax_pipeline=None, system_lib=wasm)
        if not wasm:
            export_shared(executable, request.output)
            return []
        from mlc_compile.targets.web.export import export_wasm

        limit = request.max_binding_bytes
        features = request.metadata["artifact"]["resources"]["required_features"]
        return export_wasm(
            executable,
            request.output,
            metadata=request.metadata,
            functions=request.functions,
            toolchain=request.web_toolchain,
            f16="shader-f16" in features,
            subgroups="subgroups" in features,
            **({} if limit is None else {"max_storage_buffer_binding_size": limit}),
            progress=request.progress,
        )


BACKEND = WebGPUBackend()
