"""The kernels that the compiler's passes ask for, for one GPU device."""

from __future__ import annotations

from tvm.tirx import PrimFunc

from mlc_compile.targets.gpu_kernels import elementwise, embedding, experts, linear
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kernels import EmbeddingSpec, ExpertLinearSpec, LayerNormSpec, LinearSpec


class GPUKernels:
    """`targets.kernels.Kernels` in portable GPU code."""

    def __init__(self, device: GPUDevice) -> None:
        self.device = device

    def linear(self, spec: LinearSpec) -> PrimFunc | None:
        return linear.linear_kernel(spec, device=self.device)

    def expert_linear(self, spec: ExpertLinearSpec) -> PrimFunc | None:
        return experts.expert_kernel(spec, device=self.device)

    def embedding(self, spec: EmbeddingSpec) -> PrimFunc | None:
        return embedding.embedding_kernel(spec, device=self.device)

    def rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        return elementwise.rms_norm(size, dtype, eps, rows, device=self.device)

    def add_rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        return elementwise.add_rms_norm(size, dtype, eps, rows, device=self.device)

    def layer_norm(self, spec: LayerNormSpec, rows: int | None) -> PrimFunc | None:
        return elementwise.layer_norm(spec, rows, device=self.device)

    def qk_norm(
        self, heads: tuple[int, int, int], eps: float, dtype: str, rows: int | None
    ) -> PrimFunc | None:
        return elementwise.qk_norm(*heads, dtype, eps, rows, device=self.device)

    def gated(self, activation: str, size: int, dtype: str, rows: int | None) -> PrimFunc | None:
        return elementwise.gated_activation(activation, size, dtype, rows, device=self.device)
