"""The products of several rows of cuh/gemm_rows.cuh and gemm_mma.cuh: which exist, that nvcc
compiles them for every architecture, and what they compute on the emulated device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import gpu_library
import numpy as np
import pytest
import tvm
from linear_reference import TOLERANCE, LinearCase, linear_spec
from tvm.tirx.script.builder import ir as T

from mlc_compile.quantization.scheme import SCHEMES, numpy_dtype
from mlc_compile.runtime import cuda_emulator
from mlc_compile.targets.cuda_kernels import gemm
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.gpu_kernels._emit import build_kernel, i32, symbol
from mlc_compile.targets.kernels import LinearSpec
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.export import dependent_kernels, source_modules
from mlc_compile.targets.nvidia.toolchain import find_nvcc

EVERY = CudaArchs((75, 80, 90))
AMPERE = CudaArchs((80, 90))
HOPPER = CudaArchs((90,))
SUPPORTED = ["q0f16", "q0bf16", "q3f16_1", "q4f16_1", "q4f16_2", "q8f16_1"]
DISTINCT = ["q0f16", "q3f16_1", "q4f16_1", "q8f16_1"]
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
    """Few rows by `emit_rows`, more by `emit_gemm`."""
    rows = symbol("n")
    arguments = spec.arguments(rows)

    def body(*buffers: Any) -> None:
        named = {argument[0]: b for argument, b in zip(arguments, buffers, strict=True)}
        with T.If(rows <= i32(gemm.MAX_ROWS)):
            with T.Then():
                gemm.emit_rows(spec, named, rows, archs)
            with T.Else():
                gemm.emit_gemm(spec, named, rows, archs)

    return build_kernel("linear", arguments, body, private=False)


def source(spec: LinearSpec, archs: CudaArchs) -> str:
    """The CUDA C++ that TVM generates."""
    target = {"kind": "cuda", "arch": f"sm_{archs.minimum}", "host": {"kind": "llvm"}}
    with source_modules():
        built = tvm.tirx.build(
            tvm.IRModule({"linear": kernel(spec, archs)}), target=tvm.target.Target(target)
        )
    text: str = built.imports[0].inspect_source()
    return text


@pytest.mark.parametrize("name", SCHEMES)
def test_which_schemes_have_kernels(name: str) -> None:
    spec = linear_spec(name, 100, 320)
    assert gemm.supports(spec, AMPERE) == (name in SUPPORTED)
    old = SCHEMES[name].model_dtype == "bfloat16"
    assert gemm.supports(spec, EVERY) == gemm.supports(spec) == (name in SUPPORTED and not old)


def test_what_has_no_kernel() -> None:
    spec = linear_spec("q4f16_1", 64, 320)
    for change in (
        {"in_features": 324},
        {"x_dtype": "float32"},
        {"norm_eps": 1e-5},
        {"activation": "silu"},
        {"scheme": dataclasses.replace(SCHEMES["q4f16_1"], group_size=128)},
        {"scheme": None, "weight_dtype": "float32"},
        {"scheme": None, "weight_dtype": "bfloat16"},
    ):
        assert not gemm.supports(dataclasses.replace(spec, **change)), change
    for change in (
        {"in_features": 328},
        {"out_dtype": "float32"},
        {"out_dtype": "bfloat16"},
        {"residual": True},
        {"has_bias": True, "bias_dtype": "float32"},
    ):
        assert gemm.supports(dataclasses.replace(spec, **change)), change


@pytest.mark.parametrize("archs", [EVERY, AMPERE, HOPPER], ids=["every", "ampere", "hopper"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("name", DISTINCT)
def test_plans_fit(name: str, n: int, k: int, archs: CudaArchs) -> None:
    spec = linear_spec(name, n, k)
    form = gemm.find_format(spec)
    assert form is not None
    most = (64 if archs is EVERY else 99) << 10  # of sm_75, of sm_86
    for columns in (1, 2):
        rows_plan = gemm.choose_rows(spec, columns, dependent=archs.dependent_launch)
        assert rows_plan.columns == columns
        assert rows_plan.shared_bytes(form) <= 64 << 10
        assert rows_plan.warps <= 32
    limits = []
    for limit, plan in gemm.choose_gemm(spec, archs):
        limits.append(limit)
        assert plan.shared_bytes(form) <= most
        assert plan.threads <= 256
        assert plan.block_m % plan.warp_m == plan.block_n % plan.warp_n == 0
    assert limits[-1] is None
    assert limits[:-1] == sorted(limits[:-1])


def test_launches_depend_on_the_one_before_where_every_device_can() -> None:
    spec = linear_spec("q4f16_1", 64, 320)
    assert not dependent_kernels(source(spec, EVERY))
    found = dependent_kernels(source(spec, HOPPER))
    assert len(found) == 2  # up to 8 rows, up to 16


@pytest.mark.parametrize("name", SUPPORTED)
def test_source_of_every_scheme(name: str) -> None:
    text = source(linear_spec(name, 320, 1280), AMPERE)
    # Up to 8 and 16 rows; up to 32, 256, and any number.
    assert text.count("mlc::gemm_rows<") == 2
    assert text.count("mlc::gemm_mma<") == 3


FAST = [("q4f16_1", EVERY), ("q3f16_1", CudaArchs((75,))), ("q0f16", HOPPER)]
COMPILED = [("q0f16", EVERY), ("q3f16_1", HOPPER), ("q8f16_1", EVERY), ("q4f16_1", HOPPER)]


@pytest.mark.parametrize(
    ("name", "archs"),
    [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in COMPILED if c not in FAST)],
)
def test_nvcc_compiles_them(name: str, archs: CudaArchs) -> None:
    spec = linear_spec(name, 320, 1280, has_bias=True, residual=True)
    report = compile_cuda(source(spec, archs), archs.archs, find_nvcc(), report=True).report
    assert report.count("Compiling entry function") == 5 * len(archs.archs)
    spilled = [
        int(line.split("frame, ")[1].split()[0]) for line in report.splitlines() if "spill" in line
    ]
    assert max(spilled) <= 128, report


# --- what they compute


@cache
def built(spec: LinearSpec, archs: CudaArchs) -> Callable[..., None]:
    cuda_emulator.install()
    library = gpu_library.build(gpu_library.DEVICES["cuda"], {"linear": kernel(spec, archs)})
    run: Callable[..., None] = cuda_emulator.load(library)["linear"]
    return run


def check(
    spec: LinearSpec,
    rows: list[int],
    arch: int = 80,
    archs: CudaArchs = EVERY,
    seed: int = 0,
) -> None:
    """Run the kernel for each number of rows and compare it with numpy."""
    case = LinearCase.random(spec, seed)
    dtype, out_dtype = numpy_dtype(spec.x_dtype), numpy_dtype(spec.out_dtype)
    # What the matrix units multiply is rounded to x's dtype.
    weight = case.exact.astype(dtype).astype(np.float64)
    with cuda_emulator.options(arch=arch, races=True, seed=seed):
        run = built(spec, archs)
        device = tvm.device("cuda", 0)
        for n in rows:
            x, *others = case.inputs(n)
            wide = x.astype(np.float64)
            product, magnitude = wide @ weight.T, np.abs(wide) @ np.abs(weight.T)
            if spec.has_bias:
                product += case.bias.astype(np.float64)
                magnitude += np.abs(case.bias.astype(np.float64))
            if spec.residual:
                product += case.residual.astype(np.float64)
                magnitude += np.abs(case.residual.astype(np.float64))
            out = tvm.runtime.tensor(np.full(product.shape, 7e3, out_dtype), device)
            run(*(tvm.runtime.tensor(a, device) for a in (x, *others)), out)
            error = np.abs(out.numpy().astype(np.float64) - product) / (magnitude + 1e-6)
            # NaN compares false.
            assert error.max() < TOLERANCE[spec.out_dtype], (spec, n, arch, error.max())


FEW, SOME, MANY = [2, 8, 13], [20, 40], [257]


@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q8f16_1", "q0f16", "q0bf16"])
def test_products(name: str) -> None:
    # N and K that no tile divides; for three bits a row of an odd number of scales.
    archs = AMPERE if name == "q0bf16" else EVERY
    check(linear_spec(name, 70, 328), [*FEW, *SOME, *MANY], archs=archs)


def test_dependent_launches() -> None:
    # The emulated device watches what is read before the wait.
    check(linear_spec("q4f16_1", 70, 328, residual=True), FEW, arch=90, archs=HOPPER)


@pytest.mark.parametrize("name", ["q4f16_1", "q8f16_1"])
def test_whole_tiles(name: str) -> None:
    check(linear_spec(name, 128, 1024), [8, 16, 32])


@pytest.mark.parametrize("name", ["q4f16_1", "q3f16_1", "q0f16"])
def test_an_old_device(name: str) -> None:
    check(linear_spec(name, 36, 200), [5, 16, 20, 70], arch=75)


@pytest.mark.parametrize("out_dtype", ["float16", "float32", "bfloat16"])
def test_what_is_added(out_dtype: str) -> None:
    spec = linear_spec(
        "q4f16_1",
        46,
        136,
        has_bias=True,
        residual=True,
        out_dtype=out_dtype,
        bias_dtype="float32" if out_dtype == "float32" else None,
    )
    check(spec, [1, 3, 17])


def test_rows_of_an_odd_size() -> None:
    check(linear_spec("q4f16_1", 33, 64, has_bias=True, residual=True), [1, 5, 16, 17, 65])
