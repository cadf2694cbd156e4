"""What a linear kernel takes, with and without what is fused into it."""

from __future__ import annotations

from typing import Any

import pytest

from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.cpu import CPUKernels
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.gpu_kernels.kernels import GPUKernels
from mlc_compile.targets.kernels import LinearSpec

F16 = "float16"
FUSED: dict[str, dict[str, Any]] = {
    "norm": {"norm_eps": 1e-5},
    "residual": {"residual": True},
    "gated": {"activation": "silu"},
}


def spec(**options: Any) -> LinearSpec:
    return LinearSpec(64, 32, SCHEMES["q4f16_1"], F16, F16, rows=1, **options)


def test_arguments_come_in_the_kernels_order() -> None:
    names = [name for name, _, _ in spec(norm_eps=0.0, has_bias=True, residual=True).arguments(1)]
    assert names == ["x", "norm_weight", "q_weight", "q_scale", "bias", "residual", "out"]
    assert spec().arguments(1) == [
        ("x", (1, 64), F16),
        ("q_weight", (32, 8), "uint32"),
        ("q_scale", (32, 2), F16),
        ("out", (1, 32), F16),
    ]
    gated = LinearSpec(
        64, 32, None, F16, "float32", True, 1, F16, "float32", norm_eps=1e-6, activation="silu"
    )
    assert gated.arguments(1) == [
        ("x", (1, 64), F16),
        ("norm_weight", (64,), F16),
        ("weight", (32, 64), F16),
        ("bias", (32,), "float32"),
        ("out", (1, 16), "float32"),
    ]


@pytest.mark.parametrize("name", FUSED)
def test_who_has_fused_products(name: str) -> None:
    fused = spec(**FUSED[name])
    assert fused.fused and not spec().fused
    assert CPUKernels(256).linear(fused) is None
    assert CPUKernels(256).linear(spec()) is not None
    assert GPUKernels(GPUDevice()).linear(fused) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"norm_eps": float("nan")}, "norm_eps"),
        ({"activation": "gelu"}, "no activation 'gelu'"),
        ({"activation": "silu", "residual": True}, "no residual"),
    ],
)
def test_what_no_kernel_can_mean_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        spec(**options)
    with pytest.raises(ValueError, match="31 rows are no gate and up"):
        LinearSpec(64, 31, SCHEMES["q4f16_1"], F16, F16, rows=1, activation="silu")
