"""The GPU matmul kernels against numpy in float64, run by each device of `gpu_library`."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import tvm
from gpu_library import DEVICES, Device, build, check_limits, check_wgsl, loaded, wgsl
from linear_reference import LinearCase, linear_spec
from tvm import relax

from mlc_compile.errors import InputError
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.targets.cpu import CPUKernels
from mlc_compile.targets.gpu_kernels import _gemm, _gemv
from mlc_compile.targets.gpu_kernels._gemm import GemmConfig
from mlc_compile.targets.gpu_kernels._gemv import GemvConfig
from mlc_compile.targets.gpu_kernels.device import WEBGPU, GPUDevice
from mlc_compile.targets.gpu_kernels.linear import FEW_ROWS, linear_kernel
from mlc_compile.targets.kernels import LinearSpec
from mlc_compile.targets.webgpu import BACKEND

# WGSL has no bfloat16.
NAMES = [name for name, scheme in SCHEMES.items() if scheme.model_dtype != "bfloat16"]
# Of the kinds of codes that are not symmetric groups one each, all but this one slow.
KINDS = ["q8f32_pc", "q4f16_awq", "e4m3f16_1"]
EVERY = [n for n in NAMES if SCHEMES[n].kind in ("plain", "symmetric")] + [
    n if n == "q4f16_awq" else pytest.param(n, marks=pytest.mark.slow) for n in KINDS
]
# Of q4f16_1 and its siblings one each: what a name adds otherwise is policy, not a kernel.
DISTINCT = ["q0f16", "q3f16_1", "q4f16_0", "q4f16_1", "q8f16_1"]
SMALL = GPUDevice(max_threads=64, shared_bytes=8 << 10)
# Software adapters compile a product with few sums in a thread much faster than the chosen one.
QUICK = GemmConfig(32, 32, 32, 4, 4)
# One row, few rows with each remainder of their tile, and more than one tile of a product.
ROWS = {1: (1,), None: (1, 5, FEW_ROWS, FEW_ROWS + 1, 70)}
FUSED: dict[str, dict[str, Any]] = {
    "norm": {"norm_eps": 1e-5},
    "norm_bias": {"norm_eps": 1e-5, "has_bias": True},
    "residual": {"residual": True},
    "residual_bias": {"residual": True, "has_bias": True},
    "norm_residual": {"norm_eps": 1e-2, "residual": True},
    "gated": {"activation": "silu", "has_bias": True},
    "norm_gated": {"norm_eps": 1e-6, "activation": "silu"},
}


def check(device: Device, spec: LinearSpec, counts: Sequence[int], **configs: Any) -> None:
    """Build the kernel of `spec` and compare it with numpy for each number of rows.

    configs: of `linear_kernel`; gemm=None for the product that it chooses.
    """
    kernel = linear_kernel(spec, device=device.limits, **{"gemm": QUICK, **configs})
    built = build(device, {"linear": kernel})
    check_limits(device, built)
    run = loaded(built)["linear"]
    case = LinearCase.random(spec)
    for count in counts:
        inputs = case.inputs(count)
        out = device.tensor(case.poisoned(count))
        with device.strict():
            run(*(device.tensor(a) for a in inputs), out)
        case.check(inputs[0], out.numpy(), count, configs)


@functools.cache
def code_of(spec: LinearSpec) -> dict[str, str]:
    return wgsl(build(DEVICES["webgpu"], {"linear": linear_kernel(spec, device=WEBGPU)}))


@pytest.mark.emulated(name="q4f16_1")
@pytest.mark.emulated(name="q3f16_1")
@pytest.mark.emulated(name="q4f16_0")
@pytest.mark.emulated(name="q0f16")
@pytest.mark.emulated(name="q8f32_1")
@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("name", EVERY)
def test_every_scheme(device: Device, name: str, rows: int | None) -> None:
    # N and K that no tile and no vector divides, K not a whole number of groups either.
    spec = linear_spec(name, 75, 202, out_dtype="float32", has_bias=True, rows=rows)
    check(device, spec, ROWS[rows])


@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("name", DISTINCT)
def test_shapes_that_vectors_divide(device: Device, name: str, rows: int | None) -> None:
    check(device, linear_spec(name, 128, 640, rows=rows), ROWS[rows])


@pytest.mark.emulated(name="q4f16_1")
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_0"])
def test_chosen_product_of_many_rows(device: Device, name: str) -> None:
    check(device, linear_spec(name, 136, 120, has_bias=True), (64, 65, 129, 300), gemm=None)


@pytest.mark.emulated(name="q4f16_0", k=7)
@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize(
    ("name", "n", "k"),
    [
        ("q4f16_1", 1, 64),
        ("q4f16_1", 3, 7),
        ("q4f16_1", 5, 1000),
        ("q4f16_0", 1, 7),
        ("q3f16_1", 9, 1),
        ("q4f32_1", 192, 576),
        ("q0f32", 3, 7),
        ("q0f16", 49, 150),
    ],
)
def test_odd_shapes(device: Device, name: str, n: int, k: int, rows: int | None) -> None:
    check(device, linear_spec(name, n, k, rows=rows), (1,) if rows else (1, 9))


@pytest.mark.emulated(x_dtype="float32", out_dtype="float16", bias_dtype="float32")
@pytest.mark.parametrize("out_dtype", ["float32", "float16"])
@pytest.mark.parametrize("x_dtype", ["float32", "float16"])
@pytest.mark.parametrize("bias_dtype", ["float32", "float16"])
def test_mixed_dtypes(device: Device, x_dtype: str, out_dtype: str, bias_dtype: str) -> None:
    dtypes = {"x_dtype": x_dtype, "out_dtype": out_dtype, "bias_dtype": bias_dtype}
    spec = linear_spec("q4f16_1", 20, 96, has_bias=True, **dtypes)
    check(device, spec, (3, 11))
    check(device, dataclasses.replace(spec, rows=1), (1,))


@pytest.mark.emulated
def test_plain_weight_of_another_dtype(device: Device) -> None:
    spec = LinearSpec(96, 20, None, "float32", "float32", weight_dtype="float16")
    check(device, spec, (3, 11))
    check(device, dataclasses.replace(spec, rows=1), (1,))


@pytest.mark.emulated
def test_group_of_more_words(device: Device) -> None:
    scheme = dataclasses.replace(SCHEMES["q4f16_1"], group_size=128)
    spec = LinearSpec(320, 24, scheme, "float16", "float32")
    check(device, spec, (4, 12))
    check(device, dataclasses.replace(spec, rows=1), (1,))


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_kinds_in_other_cuts(device: Device, name: str) -> None:
    """Wide loads, mantissas of float16, what is fused into one row, and the chosen product."""
    wide = GemvConfig(lanes=16, teams=2, rows=4, words=4, unroll=2, decode="halves")
    f32 = {"out_dtype": "float32"}
    gated = linear_spec(name, 46, 1408, rows=1, **FUSED["norm_gated"], **f32)
    check(device, gated, (1,), gemv=wide)
    check(device, linear_spec(name, 33, 4096, rows=1, **FUSED["residual_bias"], **f32), (1,))
    check(device, linear_spec(name, 136, 320), (4, 70), gemm=None)


@pytest.mark.emulated
def test_tied_embedding_of_a_transposed_scheme(device: Device) -> None:
    scheme = dataclasses.replace(SCHEMES["q4f16_0"], layout="NK")
    check(device, LinearSpec(96, 100, scheme, "float16", "float32", rows=1), (1,))


@pytest.mark.emulated(name="q3f16_1", words=4)
@pytest.mark.emulated(name="q4f16_1", decode="halves")
@pytest.mark.parametrize("decode", ["bytes", "halves"])
@pytest.mark.parametrize("words", [1, 4])
@pytest.mark.parametrize("name", ["q3f16_1", "q4f16_1", "q4f32_1", "q8f32_1"])
def test_gemv_loads_and_decoding(device: Device, name: str, words: int, decode: Any) -> None:
    config = GemvConfig(lanes=16, teams=2, rows=3, words=words, unroll=2, decode=decode)
    check(device, linear_spec(name, 45, 1360, rows=1), (1,), gemv=config)


@pytest.mark.emulated(config=GemvConfig(lanes=256, teams=1, rows=4))
@pytest.mark.emulated(config=GemvConfig(lanes=2, teams=3, rows=7))
@pytest.mark.parametrize(
    "config",
    [
        GemvConfig(lanes=32, teams=1, rows=1),
        GemvConfig(lanes=1, teams=8, rows=2),
        GemvConfig(lanes=64, teams=4, rows=2, unroll=4),
        GemvConfig(lanes=128, teams=2, rows=2),
        GemvConfig(lanes=256, teams=1, rows=4),
        GemvConfig(lanes=2, teams=3, rows=7),
    ],
    ids=lambda c: c.label,
)
def test_gemv_cuts(device: Device, config: GemvConfig) -> None:
    # More outputs than threads in the last, helpers in those of many lanes.
    check(device, linear_spec("q4f32_1", 45, 1056, rows=1), (1,), gemv=config)


@pytest.mark.emulated(n=70, rows=4)
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("n", [36, 70, 33])
def test_transposed_columns(device: Device, n: int, rows: int) -> None:
    config = GemvConfig(lanes=8, teams=8, rows=rows)
    check(device, linear_spec("q4f16_0", n, 360, rows=1), (1,), gemv=config)


@pytest.mark.emulated(name="q4f32_1", config=GemmConfig(128, 128, 32, 8, 8))
@pytest.mark.parametrize(
    "config",
    [
        GemmConfig(32, 32, 16, 4, 4),
        GemmConfig(128, 64, 32, 8, 4),
        GemmConfig(128, 128, 32, 8, 8),
    ],
    ids=lambda c: c.label,
)
@pytest.mark.parametrize("name", ["q3f16_1", "q4f32_1"])
def test_gemm_cuts(device: Device, name: str, config: GemmConfig) -> None:
    check(device, linear_spec(name, 75, 200), (70,), gemm=config)


@pytest.mark.emulated(name="q4f16_1")
@pytest.mark.parametrize("rows", [1, None])
@pytest.mark.parametrize("name", ["q4f16_1", "q4f16_0", "q0f32"])
def test_a_smaller_device(device: Device, name: str, rows: int | None) -> None:
    small = device.smaller(max_threads=64, shared_bytes=8 << 10)
    check(small, linear_spec(name, 75, 200, rows=rows), ROWS[rows], gemm=None)


# --- with a norm, a gated activation or a residual inside

CONTIGUOUS = ["q0f16", "q3f16_1", "q4f16_1", "q4f32_1", "q8f16_1"]  # along K


@pytest.mark.emulated(name="q4f16_1")
@pytest.mark.emulated(name="q3f16_1", fused="norm_gated")
@pytest.mark.emulated(name="q4f32_1", fused="norm_residual")
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("name", CONTIGUOUS)
def test_fused(device: Device, name: str, fused: str) -> None:
    # N that no tile divides, K that is no whole number of groups.
    spec = linear_spec(name, 74, 202, out_dtype="float32", rows=1, **FUSED[fused])
    check(device, spec, (1,))


@pytest.mark.emulated(name="q4f16_1", fused="norm_gated")
@pytest.mark.parametrize("fused", ["norm", "residual_bias", "norm_gated"])
@pytest.mark.parametrize("name", CONTIGUOUS)
def test_fused_shapes_that_vectors_divide(device: Device, name: str, fused: str) -> None:
    # The product of a gate and an up projection is beyond float16 here.
    dtype = {"out_dtype": "float32"} if "gated" in fused else {}
    check(device, linear_spec(name, 96, 2048, rows=1, **FUSED[fused], **dtype), (1,))


@pytest.mark.emulated(config=GemvConfig(lanes=8, teams=2, rows=3, words=2), fused="norm_gated")
@pytest.mark.parametrize("fused", ["norm_residual", "norm_gated"])
@pytest.mark.parametrize(
    "config",
    [
        GemvConfig(lanes=32, teams=2, rows=1),
        GemvConfig(lanes=8, teams=2, rows=3, words=2),
        GemvConfig(lanes=64, teams=2, rows=2, unroll=4, decode="halves"),
        GemvConfig(lanes=256, teams=1, rows=4, words=4),
        GemvConfig(lanes=2, teams=4, rows=8),
    ],
    ids=lambda c: c.label,
)
def test_fused_cuts(device: Device, config: GemvConfig, fused: str) -> None:
    # More results than threads in the last.
    check(device, linear_spec("q4f16_1", 46, 1056, rows=1, **FUSED[fused]), (1,), gemv=config)


@pytest.mark.emulated
def test_fused_into_a_weight_of_two_rows(device: Device) -> None:
    check(device, linear_spec("q4f16_1", 2, 64, rows=1, **FUSED["norm_gated"]), (1,))


@pytest.mark.emulated
def test_norm_of_numbers_whose_squares_float16_lacks(device: Device) -> None:
    spec = linear_spec("q4f16_1", 20, 64, rows=1, norm_eps=1e-5)
    case = LinearCase.random(spec)
    inputs = case.inputs(1)
    inputs[0] = (inputs[0] * 1000).astype(inputs[0].dtype)
    out = device.tensor(case.poisoned(1))
    run = loaded(build(device, {"linear": linear_kernel(spec, device=device.limits)}))["linear"]
    run(*(device.tensor(a) for a in inputs), out)
    case.check(inputs[0], out.numpy())


@pytest.mark.parametrize("fused", FUSED)
def test_fused_products_that_have_no_kernel(fused: str) -> None:
    spec = linear_spec("q4f16_0", 64, 64, rows=1, **FUSED[fused])
    assert linear_kernel(spec, device=WEBGPU) is None  # layout KN
    contiguous = linear_spec("q4f16_1", 64, 64, **FUSED[fused])
    assert linear_kernel(contiguous, device=WEBGPU) is None  # any number of rows
    assert linear_kernel(dataclasses.replace(contiguous, rows=1), device=WEBGPU) is not None
    # A norm is cheaper apart from a large vocabulary's product.
    head = linear_spec("q4f16_1", 128256, 4096, rows=1, **FUSED[fused])
    assert (linear_kernel(head, device=WEBGPU) is None) == ("norm" in fused)


@pytest.mark.parametrize("name", [n for n in SCHEMES if n not in NAMES])
def test_no_kernel_for_bfloat16(name: str) -> None:
    assert linear_kernel(linear_spec(name, 64, 64), device=WEBGPU) is None


def test_transposed_codes_are_symmetric() -> None:
    # Not by way of a scheme, which refuses it too.
    spec = linear_spec("q4f16_awq", 64, 256)
    assert spec.scheme is not None
    object.__setattr__(spec.scheme, "layout", "KN")
    assert linear_kernel(spec, device=WEBGPU) is None
    assert CPUKernels(256).linear(spec) is None


@pytest.mark.emulated
def test_relax_call_tir_with_symbolic_rows(device: Device) -> None:
    spec = linear_spec("q4f32_1", 12, 64)
    case = LinearCase.random(spec)
    builder = relax.BlockBuilder()
    arguments = [("x", (tvm.tirx.Var("n", "int64"), 64), "float32"), *spec.weight_shapes()]
    x, *weight = (relax.Var(n, relax.TensorType(s, d)) for n, s, d in arguments)
    kernel = builder.add_func(linear_kernel(spec, device=device.limits), "linear")
    with builder.function("main", [x, *weight]):
        out = relax.TensorType((x.ty.shape[0], 12), "float32")
        builder.emit_func_output(builder.emit(relax.call_tir(kernel, [x, *weight], out)))
    machine = relax.VirtualMachine(
        loaded(relax.build(builder.get(), device.target)), tvm.device(device.name, 0)
    )
    for count in (3, 11):
        inputs = case.inputs(count)
        tensors = [device.tensor(a) for a in inputs]
        case.check(inputs[0], machine["main"](*tensors).numpy(), count)


# --- what the code must look like

SHAPES = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (128256, 2048), (4096, 14336)]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("name", ["q4f16_1", "q4f32_1", "q4f16_0"])
def test_decode_has_few_barriers(name: str, n: int, k: int) -> None:
    # Each costs a software adapter a turn through all threads.
    (code,) = code_of(linear_spec(name, n, k, rows=1)).values()
    check_wgsl("linear", code, WEBGPU)
    loops = re.findall(r"for \([^{]*\{[^}]*workgroupBarrier", code)
    assert not loops
    assert code.count("workgroupBarrier()") <= 3


@pytest.mark.parametrize("name", ["q4f16_1", "q4f32_1", "q4f16_0", "q0f16"])
def test_weights_are_read_as_vectors_where_it_pays(name: str) -> None:
    codes = code_of(linear_spec(name, 4096, 2048))
    assert len(codes) == 2  # few rows, many rows
    for code in codes.values():
        assert re.search(r"array<vec[24]<(f16|f32|u32)>>", code)


def test_float16_only_where_the_spec_has_it() -> None:
    for rows in (1, None):
        for code in code_of(linear_spec("q4f32_1", 64, 64, rows=rows)).values():
            assert "f16" not in code


@pytest.mark.parametrize("device", [WEBGPU, SMALL, GPUDevice(max_threads=128)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (96, 64), *SHAPES])
def test_choices_fit_the_device(n: int, k: int, device: GPUDevice) -> None:
    for name in ("q4f16_1", "q4f16_0", "q3f16_1", "q0f32"):
        scheme = None if SCHEMES[name].is_plain else SCHEMES[name]
        for m in (1, 4):
            gemv = _gemv.choose(n, k, scheme, m, device)
            assert gemv.threads <= device.max_threads
        gemm = _gemm.choose(n, k, scheme, device)
        assert gemm.threads <= device.max_threads
        assert gemm.shared_bytes <= device.shared_bytes


def test_no_variant_asks_for_subgroups() -> None:
    with pytest.raises(InputError, match="webgpu:subgroups: no such variant"):
        BACKEND.tvm_target("subgroups", ".wasm")
