"""The product of many rows of cuh/gemm_sm90.cuh: which exist, that nvcc compiles them for Hopper
and leaves other devices nothing, and what they compute on the emulated device, against numpy."""

from __future__ import annotations

import dataclasses
from typing import Any

import gpu_library
import numpy as np
import pytest
import tvm
from linear_reference import TOLERANCE, LinearCase, linear_spec

from mlc_compile.quantization.scheme import SCHEMES, numpy_dtype
from mlc_compile.runtime import cuda_emulator
from mlc_compile.targets.cuda_kernels import gemm_sm90
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.gpu_kernels._emit import build_kernel, symbol
from mlc_compile.targets.kernels import LinearSpec
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.export import source_modules
from mlc_compile.targets.nvidia.toolchain import find_nvcc

HOPPER = CudaArchs((90,))
SUPPORTED = ["q0f16", "q0bf16", "q4f16_1", "q4f16_2", "q8f16_1", "q4bf16_1"]


def kernel(spec: LinearSpec) -> Any:
    rows = symbol("n")
    arguments = spec.arguments(rows)

    def body(*buffers: Any) -> None:
        named = {argument[0]: b for argument, b in zip(arguments, buffers, strict=True)}
        gemm_sm90.emit_gemm(spec, named, rows, HOPPER)

    return build_kernel("linear", arguments, body, private=False)


def source(spec: LinearSpec) -> str:
    """The CUDA C++ that TVM generates."""
    target = {"kind": "cuda", "arch": "sm_90", "host": {"kind": "llvm"}}
    with source_modules():
        built = tvm.tirx.build(
            tvm.IRModule({"linear": kernel(spec)}), target=tvm.target.Target(target)
        )
    text: str = built.imports[0].inspect_source()
    return text


@pytest.mark.parametrize("name", SCHEMES)
def test_which_schemes_have_a_kernel(name: str) -> None:
    assert gemm_sm90.supports(linear_spec(name, 100, 320)) == (name in SUPPORTED)


def test_what_has_no_kernel() -> None:
    spec = linear_spec("q4f16_1", 64, 320)
    for change in (
        {"in_features": 328},
        {"x_dtype": "float32"},
        {"out_dtype": "bfloat16"},
        {"norm_eps": 1e-5},
        {"activation": "silu"},
        {"has_bias": True, "bias_dtype": "float32"},
        {"scheme": dataclasses.replace(SCHEMES["q4f16_1"], group_size=128)},
        {"scheme": None, "weight_dtype": "float32"},
    ):
        assert not gemm_sm90.supports(dataclasses.replace(spec, **change)), change
    for change in ({"out_dtype": "float32"}, {"residual": True}, {"has_bias": True}):
        assert gemm_sm90.supports(dataclasses.replace(spec, **change)), change


def test_plans_fit() -> None:
    # Two blocks of a multiprocessor, each with the kilobyte that CUDA keeps.
    assert 2 * (gemm_sm90.SMALL.shared_bytes + 2048) <= 228 << 10
    assert gemm_sm90.LARGE.shared_bytes + 2048 <= 228 << 10


@pytest.mark.parametrize(
    ("n", "k", "rows"), [(28672, 4096, 0), (6144, 4096, 128), (4096, 14336, 256), (64, 512, 0)]
)
def test_k_is_shared_out_where_blocks_are_few(n: int, k: int, rows: int) -> None:
    assert gemm_sm90.split_rows(linear_spec("q4f16_1", n, k)) == rows


@pytest.mark.parametrize("name", ["q4f16_1", "q8f16_1", "q0f16"])
def test_compiles(name: str) -> None:
    text = source(linear_spec(name, 320, 1024, has_bias=True))
    report = compile_cuda(text, (90,), find_nvcc(), report=True).report
    assert report.count(" 0 bytes spill stores") == report.count("bytes spill stores") >= 5
    # Of C7512 and its kin: products that wait for each other.
    assert "serialized" not in report


def test_other_devices_get_nothing() -> None:
    text = source(linear_spec("q4f16_1", 320, 1024))
    report = compile_cuda(text, (75, 80), find_nvcc(), report=True).report
    registers = [
        int(line.split("Used ")[1].split()[0]) for line in report.splitlines() if "Used" in line
    ]
    assert registers and max(registers) <= 16, report


# --- what they compute


def check(spec: LinearSpec, rows: list[int], seed: int = 0) -> None:
    """Run the kernel for each number of rows and compare it with numpy."""
    built = gpu_library.build(gpu_library.DEVICES["cuda"], {"linear": kernel(spec)})
    case = LinearCase.random(spec, seed)
    dtype, out_dtype = numpy_dtype(spec.x_dtype), numpy_dtype(spec.out_dtype)
    weight = case.exact.astype(dtype).astype(np.float64)
    with cuda_emulator.options(arch=90, races=True, seed=seed):
        run = cuda_emulator.load(built)["linear"]
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
            assert error.max() < TOLERANCE[spec.out_dtype], (spec, n, error.max())


@pytest.mark.parametrize("name", ["q4f16_1", "q8f16_1", "q0f16", "q0bf16", "q4bf16_1"])
def test_products(name: str) -> None:
    # N and K that no tile divides.
    check(linear_spec(name, 136, 288, has_bias=True), [1, 70])


def test_rows_of_an_odd_size() -> None:
    check(linear_spec("q4f16_1", 35, 160, residual=True), [33])


def test_float32_outputs() -> None:
    check(linear_spec("q4f16_1", 70, 96, out_dtype="float32", residual=True, has_bias=True), [40])


@pytest.mark.parametrize("name", ["q4f16_1", "q0f16"])
def test_parts_of_k(name: str) -> None:
    spec = linear_spec(name, 34, 1184, has_bias=True)
    assert gemm_sm90.split_rows(spec) >= 20
    check(spec, [20])


@pytest.mark.parametrize("plan", ["LARGE", "SMALL"])
def test_many_blocks(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if there were one multiprocessor.
    monkeypatch.setattr(gemm_sm90, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(gemm_sm90, "ONE_LARGE", 1 if plan == "LARGE" else 999)
    check(linear_spec("q4f16_1", 130, 288), [130, 260])
