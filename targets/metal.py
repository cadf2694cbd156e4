"""The Metal targets: kernels as Metal source text, with a host for one of Apple's platforms.

- `.tar` and `.a` are static: objects that an app links, which register themselves under a prefix.
- `.dylib` (macos) is loaded by path.
- `.so` has the same kernels with a host for this machine, for the emulated Metal device that
  `verify` runs here.

A device compiles each kernel when it is first called; no compiler of Apple's is involved here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

from tvm import relax, tirx
from tvm.ir import IRModule
from tvm.target import Target

from mlc_compile.errors import InputError
from mlc_compile.targets.apple.platforms import (
    IPHONE,
    IPHONE_SIMULATOR,
    MACABI,
    MACOS,
    ApplePlatform,
)
from mlc_compile.targets.cpu import export_shared, linker
from mlc_compile.targets.gpu_kernels import attention, sampling
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.gpu_kernels.fallback import schedule_loops
from mlc_compile.targets.gpu_kernels.kernels import GPUKernels
from mlc_compile.targets.profile import ExportRequest

METAL = GPUDevice(max_threads=256, shared_bytes=32 << 10, max_buffers=31)
"""What an A12 has and later ones keep (Metal feature set tables: threadgroup memory, entries of
the buffer argument table). They allow more threads, but not to a kernel of many registers."""

METAL_APPLE7 = replace(METAL, simdgroup_matrix=True)
"""Family Apple7 and later: A14, M1."""

APPLE7 = "apple7"
"""The variant, and the `model` of its TVM target."""


class MetalBackend:
    """`targets.profile.Backend` of one Apple platform.

    family: of the oldest GPU, where it is Apple7. variants: a variant that asks for a newer family,
    and the processor that comes with it.
    """

    def __init__(
        self,
        platform: ApplePlatform,
        family: str | None = None,
        variants: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.platform = platform
        self.family = family
        self.variants = variants

    def tvm_target(self, variant: str | None, suffix: str) -> Target:
        name = self.platform.name
        if variant is not None and variant not in self.variants:
            known = " or ".join(
                f"--target {n}" for n in (name, *(f"{name}:{v}" for v in self.variants))
            )
            raise InputError(f"--target {name}:{variant}: no such variant", hint=f"write {known}")
        family, cpu = self.family, self.platform.cpu
        if variant is not None:
            family, cpu = variant, self.variants[variant]
        host = {"kind": "llvm"}
        if suffix != ".so":
            host |= {"mtriple": self.platform.triple, "mcpu": cpu}
        return Target(
            {
                "kind": "metal",
                # TVM passes `model` on and asks for nothing in it (`keys` and `device` choose its
                # generic functions); a host for this machine couldn't say which GPU is meant.
                **({} if family is None else {"model": family}),
                "max_threads_per_block": METAL.max_threads,
                "max_num_threads": METAL.max_threads,
                "max_shared_memory_per_block": METAL.shared_bytes,
                # With 32, TVM's reductions shuffle between lanes that needn't run in lock-step.
                "thread_warp_size": 1,
                "host": host,
            }
        )

    def kernels(self, target: Target) -> GPUKernels:
        return GPUKernels(METAL_APPLE7 if target.attrs.get("model") == APPLE7 else METAL)

    def kv_cache_kernels(self, target: Target) -> Any:
        return partial(attention.gpu_kv_cache_kernels, device=METAL)

    def sampling_kernels(self, target: Target) -> Any:
        return partial(sampling.kernel, device=METAL)

    def schedule(self, mod: IRModule) -> IRModule:
        # No tensor of ours has 2^31 elements, and 64-bit integers are slow on these GPUs.
        return tirx.transform.ForceNarrowIndexToInt32()(schedule_loops(mod))

    def check_environment(self, suffix: str, web_toolchain: str) -> None:
        from mlc_compile.targets.apple.tools import require_zig

        if suffix == ".so":
            linker()
        elif suffix != ".tar":
            require_zig(f"a {suffix} library for {self.platform.title}")

    def export(self, mod: IRModule, target: Target, request: ExportRequest) -> list[str]:
        suffix = request.output.suffix
        static = suffix in (".tar", ".a")
        executable = relax.build(mod, target, relax_pipeline=None, system_lib=static)
        if suffix == ".so":
            export_shared(executable, request.output)
            return []
        from mlc_compile.targets.apple.export import export_library

        export_library(executable, self.platform, request)
        return []


IPHONE_BACKEND = MetalBackend(IPHONE, variants=MappingProxyType({APPLE7: "apple-a14"}))
# The simulator doesn't promise the families of the Mac that runs it.
IPHONE_SIMULATOR_BACKEND = MetalBackend(IPHONE_SIMULATOR)
MACABI_BACKEND = MetalBackend(MACABI, APPLE7)
MACOS_BACKEND = MetalBackend(MACOS, APPLE7)
