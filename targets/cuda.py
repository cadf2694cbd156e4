"""The cuda target: machine code for NVIDIA GPUs in a shared library, with a host for this machine.

`--target cuda` compiles for a list of architectures, `cuda:sm_80,sm_90` for those named,
`cuda:auto` for this machine's GPU. Neither a GPU nor a driver is needed to compile.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax, tirx
from tvm.ir import IRModule
from tvm.target import Target

from mlc_compile.errors import InputError
from mlc_compile.targets.cpu import linker
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels.attention import cuda_kv_cache_kernels
from mlc_compile.targets.cuda_kernels.kernels import CUDA, CudaKernels
from mlc_compile.targets.gpu_kernels import attention, sampling
from mlc_compile.targets.gpu_kernels.fallback import schedule_loops
from mlc_compile.targets.gpu_kernels.kernels import GPUKernels
from mlc_compile.targets.kernels import Kernels
from mlc_compile.targets.kv_cache import KVCacheKernels, KVCacheSpec
from mlc_compile.targets.nvidia import archs as names
from mlc_compile.targets.nvidia.toolchain import find_nvcc
from mlc_compile.targets.profile import ExportRequest

TENSOR_CORES = 75
"""Architectures below are served by the portable kernels alone."""


def architectures(target: Target) -> tuple[int, ...]:
    """The architectures of a target that `CudaBackend.tvm_target` made, ascending."""
    return names.parse_archs(str(target.attrs["model"]))


class CudaBackend:
    """`targets.profile.Backend` of the cuda target."""

    def tvm_target(self, variant: str | None, suffix: str) -> Target:
        if variant is None:
            archs: tuple[int, ...] = names.DEFAULT
        elif variant == names.AUTO:
            from mlc_compile.targets.nvidia.driver import this_gpu

            archs = (names.closest(this_gpu().arch),)
        else:
            archs = names.parse_archs(variant)
        find_nvcc().require(archs)
        return Target(
            {
                "kind": "cuda",
                # What TVM's rules may use: the least of all.
                "arch": names.sm(archs[0]),
                # TVM passes `model` on and asks for nothing in it.
                "model": ",".join(map(names.sm, archs)),
                "max_threads_per_block": 1024,
                "max_shared_memory_per_block": 48 << 10,
                "thread_warp_size": 32,
                "host": {"kind": "llvm"},
            }
        )

    def kernels(self, target: Target) -> Kernels:
        archs = CudaArchs(architectures(target))
        return CudaKernels(archs) if archs.minimum >= TENSOR_CORES else GPUKernels(CUDA)

    def kv_cache_kernels(self, target: Target) -> Any:
        archs = CudaArchs(architectures(target))
        oldest = archs.minimum

        def factory(spec: KVCacheSpec) -> KVCacheKernels:
            # get_target knows it of architectures that were named; auto may be any.
            if spec.dtype == "bfloat16" and oldest < names.BFLOAT16:
                raise InputError(
                    f"{names.sm(oldest)} has no bfloat16, which this quantization computes in",
                    hint="take one of float16, such as q4f16_1, or --target cuda:"
                    + ",".join(map(names.sm, (a for a in names.DEFAULT if a >= names.BFLOAT16))),
                )
            if oldest < TENSOR_CORES:
                return attention.gpu_kv_cache_kernels(spec, device=CUDA)
            return cuda_kv_cache_kernels(spec, archs=archs, device=CUDA)

        return factory

    def sampling_kernels(self, target: Target) -> Any:
        return partial(sampling.kernel, device=CUDA)

    def schedule(self, mod: IRModule) -> IRModule:
        # No tensor of ours has 2^31 elements, and 64-bit integers take two instructions.
        return tirx.transform.ForceNarrowIndexToInt32()(schedule_loops(mod))

    def check_environment(self, suffix: str, web_toolchain: str) -> None:
        linker()
        find_nvcc()

    def export(self, mod: IRModule, target: Target, request: ExportRequest) -> list[str]:
        from mlc_compile.targets.nvidia.export import export_library, source_modules

        archs, nvcc = architectures(target), find_nvcc()
        with source_modules():
            executable = relax.build(mod, target, relax_pipeline=None)
        if request.progress is not None:
            request.progress(f"nvcc, {names.names(archs)}", 0, 1)
        export_library(executable, request.output, archs, nvcc, request.debug_dump)
        old = [arch for arch in archs if arch in names.CUDA12_ONLY]
        return [
            *nvcc.notes,
            *(
                f"{names.sm(arch)}: the CUDA runtime of TVM's wheel does not run there; load the "
                "library with a TVM built for CUDA 12"
                for arch in old
            ),
        ]


BACKEND = CudaBackend()
