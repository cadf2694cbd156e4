"""The kernels that the compiler's passes ask for, on NVIDIA GPUs.

A product has up to four ways, one kernel that chooses at each call: a GEMV for one row, a product
that reads the weights once for a few rows, tensor cores through `mma` for more, and `wgmma` where
the device is a Hopper. What these don't cover, the portable kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cuda_kernels import elementwise, gemm, gemm_sm90, gemv
from mlc_compile.targets.cuda_kernels._arch import CudaArchs, compute_capability
from mlc_compile.targets.gpu_kernels import elementwise as portable
from mlc_compile.targets.gpu_kernels import embedding, experts, linear
from mlc_compile.targets.gpu_kernels._emit import Buffer, build_kernel, i32, symbol
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kernels import EmbeddingSpec, ExpertLinearSpec, LayerNormSpec, LinearSpec

CUDA = GPUDevice(max_buffers=31, bfloat16=True, merged_auxiliary=True)
"""What the portable kernels may use: far less than any of these GPUs has."""

FEW_ROWS = 16
"""Up to here the weights are read once for all rows."""
HOPPER = 90
HOPPER_ROWS = 64
"""Rows from which `wgmma` is faster than `mma` on a Hopper: benchmarks/NOTES.md."""


class CudaKernels:
    """`targets.kernels.Kernels` for devices of these architectures."""

    def __init__(self, archs: CudaArchs) -> None:
        self.archs = archs

    def linear(self, spec: LinearSpec) -> tirx.PrimFunc | None:
        if spec.rows == 1 and gemv.supports(spec, self.archs):
            return self._product(spec, lambda b, n: gemv.emit_gemv(spec, b, self.archs))
        if spec.fused:
            return None
        if spec.rows is None and gemm.supports(spec, self.archs):
            return self._product(spec, lambda b, n: self._any_rows(spec, b, n))
        return linear.linear_kernel(spec, device=CUDA)

    def _product(
        self, spec: LinearSpec, emit: Callable[[Mapping[str, Buffer], tirx.Var | int], None]
    ) -> tirx.PrimFunc:
        """A kernel of `spec`'s arguments; `emit(buffers by name, rows)` writes its launches."""
        rows = 1 if spec.rows == 1 else symbol("n")
        arguments = spec.arguments(rows)

        def body(*buffers: Buffer) -> None:
            emit({a[0]: b for a, b in zip(arguments, buffers, strict=True)}, rows)

        return build_kernel("linear", arguments, body)

    def _any_rows(
        self, spec: LinearSpec, buffers: Mapping[str, Buffer], rows: tirx.Var | int
    ) -> None:
        def many() -> None:
            if HOPPER not in self.archs.archs or not gemm_sm90.supports(spec):
                gemm.emit_gemm(spec, buffers, rows, self.archs)
                return
            hopper = compute_capability() == i32(HOPPER)
            _choose(
                tirx.all(hopper, rows >= i32(HOPPER_ROWS)),
                lambda: gemm_sm90.emit_gemm(spec, buffers, rows, self.archs),
                lambda: gemm.emit_gemm(spec, buffers, rows, self.archs),
            )

        def some() -> None:
            few = rows <= i32(FEW_ROWS)
            _choose(few, lambda: gemm.emit_rows(spec, buffers, rows, self.archs), many)

        if gemv.supports(spec, self.archs):
            _choose(rows == i32(1), lambda: gemv.emit_gemv(spec, buffers, self.archs), some)
        else:
            some()

    def expert_linear(self, spec: ExpertLinearSpec) -> tirx.PrimFunc | None:
        return experts.expert_kernel(spec, device=CUDA)

    def embedding(self, spec: EmbeddingSpec) -> tirx.PrimFunc | None:
        return embedding.embedding_kernel(spec, device=CUDA)

    def rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> tirx.PrimFunc | None:
        return elementwise.rms_norm(size, dtype, eps, rows, archs=self.archs) or portable.rms_norm(
            size, dtype, eps, rows, device=CUDA
        )

    def add_rms_norm(
        self, size: int, eps: float, dtype: str, rows: int | None
    ) -> tirx.PrimFunc | None:
        return elementwise.add_rms_norm(
            size, dtype, eps, rows, archs=self.archs
        ) or portable.add_rms_norm(size, dtype, eps, rows, device=CUDA)

    def layer_norm(self, spec: LayerNormSpec, rows: int | None) -> tirx.PrimFunc | None:
        return portable.layer_norm(spec, rows, device=CUDA)

    def qk_norm(
        self, heads: tuple[int, int, int], eps: float, dtype: str, rows: int | None
    ) -> tirx.PrimFunc | None:
        return elementwise.qk_norm(*heads, dtype, eps, rows, archs=self.archs) or portable.qk_norm(
            *heads, dtype, eps, rows, device=CUDA
        )

    def gated(
        self, activation: str, size: int, dtype: str, rows: int | None
    ) -> tirx.PrimFunc | None:
        return elementwise.gated_activation(
            activation, size, dtype, rows, archs=self.archs
        ) or portable.gated_activation(activation, size, dtype, rows, device=CUDA)


def _choose(condition: tirx.Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Host-side choice between two sets of launches."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()
