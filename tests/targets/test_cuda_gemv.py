"""The one-row products of cuh/gemv.cuh: which exist, that nvcc compiles them, and what they compute
on the emulated device, against numpy in float64."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import tvm
from linear_reference import TOLERANCE, LinearCase, linear_spec

from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.runtime import cuda_emulator
from mlc_compile.targets.cuda_kernels import gemv
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels._launch import HEADERS
from mlc_compile.targets.gpu_kernels._emit import build_kernel
from mlc_compile.targets.kernels import LinearSpec
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.export import dependent_kernels, source_modules
from mlc_compile.targets.nvidia.toolchain import find_nvcc

EVERY = CudaArchs((75, 80, 90))
HOPPER = CudaArchs((90,))
ROW_MAJOR = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.layout == "NK" and scheme.kind in ("plain", "symmetric")
]
FUSED: list[dict[str, Any]] = [
    {},
    {"norm_eps": 1e-5, "has_bias": True},
    {"residual": True},
    {"norm_eps": 1e-6, "activation": "silu"},
]
# (N, K): Llama-3.1-8B, Llama-3.2-1B, SmolLM2-135M.
SHAPES = [
    (6144, 4096),
    (4096, 4096),
    (28672, 4096),
    (4096, 14336),
    (128256, 4096),
    (3072, 2048),
    (16384, 2048),
    (2048, 8192),
    (960, 576),
    (576, 1536),
    (49152, 576),
    (1, 64),
]


def kernel(spec: LinearSpec, archs: CudaArchs) -> Any:
    arguments = spec.arguments(1)

    def body(*buffers: Any) -> None:
        named = {argument[0]: b for argument, b in zip(arguments, buffers, strict=True)}
        gemv.emit_gemv(spec, named, archs)

    return build_kernel("linear", arguments, body, private=False)


def build(spec: LinearSpec, archs: CudaArchs) -> Any:
    """TVM's module of the kernel: its imported one holds CUDA C++."""
    target = {"kind": "cuda", "arch": f"sm_{archs.minimum}", "host": {"kind": "llvm"}}
    module = tvm.IRModule({"linear": kernel(spec, archs)})
    with source_modules():
        return tvm.tirx.build(module, target=tvm.target.Target(target))


def source(spec: LinearSpec, archs: CudaArchs) -> str:
    text: str = build(spec, archs).imports[0].inspect_source()
    return text


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_of_contiguous_rows_has_a_kernel(name: str) -> None:
    for options in FUSED:
        spec = linear_spec(name, 64, 320, rows=1, **options)
        assert gemv.supports(spec, CudaArchs((80, 90))) == (name in ROW_MAJOR)
        old = SCHEMES[name].model_dtype == "bfloat16"
        assert gemv.supports(spec, EVERY) == (name in ROW_MAJOR and not old)
        assert gemv.supports(spec) == gemv.supports(spec, EVERY)


def test_what_has_no_kernel() -> None:
    spec = linear_spec("q4f16_1", 64, 320, rows=1)
    assert not gemv.supports(dataclasses.replace(spec, x_dtype="float32"))
    other = dataclasses.replace(SCHEMES["q4f16_1"], group_size=128)
    assert not gemv.supports(dataclasses.replace(spec, scheme=other))
    # Rows that begin anywhere.
    assert not gemv.supports(linear_spec("q0f16", 64, 321, rows=1))
    # x alone is more than a block may have.
    long = linear_spec("q4f32_1", 64, 30 << 10, rows=1)
    assert not gemv.supports(long, EVERY)
    assert gemv.supports(long, HOPPER)


@pytest.mark.parametrize("archs", [EVERY, HOPPER])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q8f16_1", "q4f32_1", "q0f16"])
def test_plans_fit(name: str, n: int, k: int, archs: CudaArchs) -> None:
    for options in FUSED:
        spec = linear_spec(name, n + n % 2, k, rows=1, **options)
        plan = gemv.choose(spec, archs)
        form = gemv.find_format(spec)
        assert form is not None
        assert plan.warps % plan.team == 0
        assert 1 <= plan.blocks <= gemv.tiles(spec)
        fits = plan.shared_bytes(spec, form) <= (64 << 10 if archs is EVERY else 227 << 10)
        assert gemv.supports(spec, archs) == fits
        # No model has a norm before its long rows.
        assert fits or (k > 8000 and (name == "q4f32_1" or spec.norm_eps is not None))


@pytest.mark.parametrize("archs", [EVERY, HOPPER], ids=["every", "hopper"])
def test_launch(archs: CudaArchs) -> None:
    text = source(linear_spec("q4f16_1", 64, 320, rows=1, **FUSED[3]), archs)
    assert '#include "gemv.cuh"' in text
    assert "mlc::gemv_format::packed4" in text
    assert bool(dependent_kernels(text)) == archs.dependent_launch
    assert (HEADERS / "gemv.cuh").is_file()


@pytest.mark.parametrize("archs", [CudaArchs((75,)), HOPPER], ids=["sm_75", "sm_90"])
@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q8f16_1", "q4f32_1", "q0f16"])
def test_compiles(name: str, archs: CudaArchs) -> None:
    text = source(linear_spec(name, 96, 640, rows=1, **FUSED[1]), archs)
    report = compile_cuda(text, archs.archs, find_nvcc(), report=True).report
    spilled = re.findall(r"(\d+) bytes spill stores", report)
    assert spilled and all(int(size) <= 64 for size in spilled)


# --- what they compute


def check(spec: LinearSpec, arch: int = 80, seed: int = 0) -> None:
    """Run the kernel for a device of `arch` and compare it with numpy."""
    built = build(spec, CudaArchs((arch,)))
    case = LinearCase.random(spec, seed)
    arguments = case.inputs(1)
    with cuda_emulator.options(arch=arch, races=True, seed=seed):
        run = cuda_emulator.load(built)["linear"]
        device = tvm.device("cuda", 0)
        out = tvm.runtime.tensor(case.poisoned(1), device)
        run(*(tvm.runtime.tensor(a, device) for a in arguments), out)
    error = case.error(arguments[0], out.numpy())
    rounded = 0.0  # the normalised x is, to the type in which it is multiplied
    if spec.norm_eps is not None:
        rounded = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6}[spec.x_dtype]
    if spec.scheme and (spec.scheme.bits, spec.x_dtype) == (4, "float16"):
        rounded += 2e-5  # what its codes have too much is taken off the sums: see gemv.cuh
    # NaN compares false.
    assert error < TOLERANCE[spec.out_dtype] + rounded, (spec, arch, error)


@pytest.mark.parametrize("options", FUSED, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("name", ROW_MAJOR)
def test_products(name: str, options: dict[str, Any]) -> None:
    # N that no tile divides, and K that is no whole number of steps or (packed) of groups.
    k = 328 if SCHEMES[name].is_plain else 331
    check(linear_spec(name, 42, k, rows=1, out_dtype="float32", **options))


@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q8f16_1", "q4f32_1", "q8f32_1", "q0f16"])
def test_scales_that_vectors_divide(name: str) -> None:
    check(linear_spec(name, 24, 1280, rows=1, **FUSED[2]))


@pytest.mark.parametrize("arch", [75, 90])
@pytest.mark.parametrize("options", FUSED[1:], ids=lambda o: "-".join(o))
def test_other_devices(options: dict[str, Any], arch: int) -> None:
    check(linear_spec("q4f16_1", 40, 544, rows=1, **options), arch, seed=arch)


@pytest.mark.parametrize(
    ("name", "n", "k"),
    [
        ("q4f16_1", 1, 1),
        ("q4f16_1", 3, 7),
        ("q3f16_1", 9, 1),
        ("q8f16_1", 5, 1000),
        ("q0f32", 3, 4),
        ("q4f32_1", 192, 576),
    ],
)
def test_odd_shapes(name: str, n: int, k: int) -> None:
    check(linear_spec(name, n, k, rows=1))


@pytest.mark.parametrize("bias_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("out_dtype", ["float32", "float16", "bfloat16"])
def test_other_dtypes(out_dtype: str, bias_dtype: str) -> None:
    dtypes = {"out_dtype": out_dtype, "bias_dtype": bias_dtype}
    check(linear_spec("q4f16_1", 20, 96, rows=1, has_bias=True, residual=True, **dtypes))


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(40, 14336), (600, 2048)])
@pytest.mark.parametrize("arch", [75, 80, 90])
def test_long_rows(n: int, k: int, arch: int) -> None:
    for seed, options in enumerate(FUSED):
        spec = linear_spec("q4f16_1", n, k, rows=1, out_dtype="float32", **options)
        if gemv.supports(spec, CudaArchs((arch,))):
            check(spec, arch, seed)
