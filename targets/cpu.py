"""The cpu target: LLVM code for this machine (or a named CPU) in a shared library."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tvm import relax
from tvm.ir import IRModule
from tvm.target import Target, codegen
from tvm.tirx import PrimFunc

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.cpu_kernels import (
    attention,
    elementwise,
    embedding,
    experts,
    fallback,
    linear,
    sampling,
)
from mlc_compile.targets.kernels import EmbeddingSpec, ExpertLinearSpec, LayerNormSpec, LinearSpec
from mlc_compile.targets.profile import ExportRequest

# Loops are cut for this many threads; the runtime's pool uses as many as the machine has. A
# constant, so that the library does not depend on the machine that compiled it.
PARALLEL_GRAIN = 8


def _transposed_codes(scheme: QuantScheme | None) -> bool:
    """Whether codes are in layout "KN" that only "NK" has kernels for."""
    return scheme is not None and scheme.layout == "KN" and scheme.codes != "symmetric"


class CPUKernels:
    """`targets.kernels.Kernels` written for LLVM; vectors as wide as the CPU's registers."""

    def __init__(self, vector_bits: int) -> None:
        self.vector_bits = vector_bits

    def linear(self, spec: LinearSpec) -> PrimFunc | None:
        if spec.fused or _transposed_codes(spec.scheme):
            return None
        return linear.linear_kernel(spec, vector_bits=self.vector_bits, num_cores=PARALLEL_GRAIN)

    def expert_linear(self, spec: ExpertLinearSpec) -> PrimFunc | None:
        return experts.expert_kernel(spec, vector_bits=self.vector_bits)

    def embedding(self, spec: EmbeddingSpec) -> PrimFunc | None:
        return embedding.embedding_kernel(spec, vector_bits=self.vector_bits)

    def rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        return elementwise.rms_norm(size, dtype, eps, rows, self.vector_bits)

    def add_rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        return elementwise.add_rms_norm(size, dtype, eps, rows, self.vector_bits)

    def layer_norm(self, spec: LayerNormSpec, rows: int | None) -> PrimFunc | None:
        return elementwise.layer_norm(spec, rows, self.vector_bits)

    def qk_norm(
        self, heads: tuple[int, int, int], eps: float, dtype: str, rows: int | None
    ) -> PrimFunc | None:
        return elementwise.qk_norm(*heads, dtype, eps, rows, self.vector_bits)

    def gated(self, activation: str, size: int, dtype: str, rows: int | None) -> PrimFunc | None:
        return elementwise.gated_activation(activation, size, dtype, rows, self.vector_bits)


class CPUBackend:
    """`targets.profile.Backend` of the cpu target."""

    def tvm_target(self, variant: str | None, suffix: str) -> Target:
        cpu = variant or str(codegen.llvm_get_system_cpu())
        target = Target({"kind": "llvm", "mcpu": cpu})
        if not codegen.llvm_is_valid_cpu(cpu, str(codegen.llvm_get_system_triple())):
            known = ", ".join(sorted(map(str, codegen.llvm_get_cpu_archlist(target)))[:60])
            raise InputError(
                f"--target cpu:{cpu}: LLVM knows no such CPU", hint=f"some are: {known}"
            )
        return target

    def kernels(self, target: Target) -> CPUKernels:
        return CPUKernels(int(codegen.llvm_get_vector_width(target)))

    def kv_cache_kernels(self, target: Target) -> Any:
        bits = int(codegen.llvm_get_vector_width(target))
        return partial(attention.cpu_kv_cache_kernels, vector_bits=bits)

    def sampling_kernels(self, target: Target) -> Any:
        bits = int(codegen.llvm_get_vector_width(target))
        return partial(sampling.kernel, vector_bits=bits)

    def schedule(self, mod: IRModule) -> IRModule:
        return fallback.schedule_loops(mod)

    def check_environment(self, suffix: str, web_toolchain: str) -> None:
        linker()

    def export(self, mod: IRModule, target: Target, request: ExportRequest) -> list[str]:
        executable = relax.build(mod, target, relax_pipeline=None)
        export_shared(executable, request.output)
        return []


def export_shared(executable: Any, output: Path) -> None:
    """Link what `relax.build` made for this machine into a shared library."""
    executable.export_library(str(output), cc=None, fcompile=link)


def linker() -> list[str]:
    """The command that links a shared library: a C compiler on the PATH, else PyPI's ziglang.

    Raises:
        EnvironmentLacksError: neither is there.
    """
    for name in ("cc", "gcc", "clang"):
        path = shutil.which(name)
        if path is not None:
            return [path]
    try:
        import ziglang  # noqa: F401  (its presence is all that is asked)
    except ImportError:
        raise EnvironmentLacksError(
            "no linker for shared libraries: neither cc, gcc nor clang is on the PATH",
            hint="install a C compiler, or `pip install ziglang`",
        ) from None
    return [sys.executable, "-m", "ziglang", "cc"]


def link(output: str, objects: list[str], options: Any = None, **_: Any) -> None:
    """Link objects into a shared library without build ids or paths, so that the bytes are
    reproducible."""
    import subprocess

    flags = ["-shared", "-fPIC", "-o", output]
    if sys.platform.startswith("linux"):
        flags += ["-Wl,--build-id=none", "-Wl,-s"]
    run = subprocess.run([*linker(), *flags, *objects], capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise EnvironmentLacksError(f"linking {output} failed: {run.stderr.strip()[-2000:]}")


link.output_format = "so"  # type: ignore[attr-defined]
link.object_format = "o"  # type: ignore[attr-defined]

BACKEND = CPUBackend()
