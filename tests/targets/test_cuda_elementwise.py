"""The CUDA row kernels: that nvcc compiles them, and what they compute on the emulated device."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import gpu_library
import numpy as np
import pytest
import tvm
from elementwise_reference import (
    ACTIVATION_REFERENCES,
    DTYPES,
    EPS,
    assert_close,
    random,
    reference_norm,
    wide,
)

from mlc_compile.quantization.scheme import numpy_dtype
from mlc_compile.runtime import cuda_emulator
from mlc_compile.targets.cuda_kernels import elementwise
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.gpu_kernels import elementwise as portable
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.export import source_modules
from mlc_compile.targets.nvidia.toolchain import find_nvcc

OLD = CudaArchs((75, 80))
NEW = CudaArchs((80,))
NEWEST = CudaArchs((90,))
HQ, HKV = 3, 2
HEAD_DIMS = (64, 128, 80, 42)
# 576 leaves threads without work; 1000, 1002 and 7 are multiples of less and less.
WIDTHS = (256, 576, 1000, 1002, 7)
on_every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def crossed(name: str, values: tuple[int, ...], always: int) -> Any:
    """Every dtype with every value; slow unless it is float16 or the value `always`."""
    cases = [
        pytest.param(d, v, marks=[pytest.mark.slow] if d != "float16" and v != always else [])
        for d in DTYPES
        for v in values
    ]
    return pytest.mark.parametrize(("dtype", name), cases)


def kernels(dtype: str, archs: CudaArchs) -> dict[str, Any]:
    """Every kernel, symbolic in n; `_1` is the one-row form."""
    made: dict[str, Any] = {}
    for rows, suffix in ((None, ""), (1, "_1")):
        for h in WIDTHS:
            made[f"rms_norm_{h}{suffix}"] = elementwise.rms_norm(h, dtype, EPS, rows, archs=archs)
            kernel = elementwise.add_rms_norm(h, dtype, EPS, rows, archs=archs)
            made[f"add_rms_norm_{h}{suffix}"] = kernel
            kernel = elementwise.gated_activation("silu", h, dtype, rows, archs=archs)
            made[f"silu_{h}{suffix}"] = kernel
        for d in HEAD_DIMS:
            kernel = elementwise.qk_norm(HQ, HKV, d, dtype, EPS, rows, archs=archs)
            made[f"qk_norm_{d}{suffix}"] = kernel
    for activation in elementwise.ACTIVATIONS:
        kernel = elementwise.gated_activation(activation, WIDTHS[0], dtype, archs=archs)
        made[f"{activation}_{WIDTHS[0]}"] = kernel
    return made


def archs_of(dtype: str) -> CudaArchs:
    return NEW if dtype == "bfloat16" else OLD


def device_of(archs: CudaArchs) -> gpu_library.Device:
    """The emulated device, compiled for as the oldest of them: bfloat16 begins with sm_80."""
    description = {"kind": "cuda", "arch": f"sm_{archs.minimum}", "host": {"kind": "llvm"}}
    return replace(gpu_library.DEVICES["cuda"], target=tvm.target.Target(description))


@functools.cache
def library(dtype: str, archs: CudaArchs | None = None) -> Any:
    archs = archs or archs_of(dtype)
    cuda_emulator.install()
    return gpu_library.loaded(gpu_library.build(device_of(archs), kernels(dtype, archs)))


def call(
    function: Any, outputs: list[tuple[tuple[int, ...], str]], *inputs: np.ndarray, arch: int = 80
) -> list[np.ndarray]:
    """The outputs, poisoned before."""
    device = gpu_library.DEVICES["cuda"]
    poisoned = [np.full(shape, 7e3, numpy_dtype(dtype)) for shape, dtype in outputs]
    tensors = [device.tensor(a) for a in (*inputs, *poisoned)]
    with cuda_emulator.options(arch=arch, races=True):
        function(*tensors)
    return [t.numpy() for t in tensors[len(inputs) :]]


@pytest.mark.parametrize(
    ("dtype", "archs"),
    [
        ("float16", CudaArchs((75, 90))),
        pytest.param("float32", CudaArchs((75, 80, 90)), marks=pytest.mark.slow),
        pytest.param("bfloat16", CudaArchs((80, 90)), marks=pytest.mark.slow),
        pytest.param("float16", NEWEST, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_nvcc_compiles_them(dtype: str, archs: CudaArchs) -> None:
    made = kernels(dtype, archs)
    with source_modules():
        built = gpu_library.build(device_of(archs), made)
    code = built.imports[0].inspect_source()
    assert ("_dependent<" in code) == archs.dependent_launch
    report = compile_cuda(code, archs.archs, find_nvcc(), report=True).report
    assert report.count("Compiling entry function") == len(archs.archs) * len(made)


def test_what_the_portable_kernels_serve() -> None:
    assert elementwise.ACTIVATIONS.keys() == portable.ACTIVATIONS.keys()
    assert elementwise.gated_activation("mish", 64, "float32", archs=OLD) is None
    assert all(kernel is None for kernel in kernels("bfloat16", OLD).values())
    # A row that one block cannot hold.
    assert elementwise.rms_norm(1 << 16, "float32", EPS, archs=OLD) is None
    assert elementwise.rms_norm(8192, "float32", EPS, archs=OLD) is not None
    assert elementwise.rms_norm(16384, "float16", EPS, 1, archs=OLD) is not None


@pytest.mark.parametrize("rows", [1, 5])
@crossed("width", WIDTHS, always=1000)
def test_rms_norm(dtype: str, width: int, rows: int) -> None:
    x, w = random(dtype, rows, width, scale=3), random(dtype, width, seed=1)
    for suffix in ("", "_1") if rows == 1 else ("",):
        function = library(dtype)[f"rms_norm_{width}{suffix}"]
        assert_close(*call(function, [(x.shape, dtype)], x, w), reference_norm(x, w), dtype)


@pytest.mark.parametrize("rows", [1, 5])
@crossed("width", WIDTHS, always=1000)
def test_add_rms_norm(dtype: str, width: int, rows: int) -> None:
    x, y = random(dtype, rows, width, scale=3), random(dtype, rows, width, seed=2)
    w = random(dtype, width, seed=1)
    for suffix in ("", "_1") if rows == 1 else ("",):
        function = library(dtype)[f"add_rms_norm_{width}{suffix}"]
        normed, total = call(function, [(x.shape, dtype)] * 2, x, y, w)
        assert_close(total, wide(x) + wide(y), dtype)
        # The norm is of the rounded sum.
        assert_close(normed, reference_norm(total, w), dtype)


def test_an_old_device_and_dependent_launches() -> None:
    x, w = random("float16", 3, 1000, scale=3), random("float16", 1000, seed=1)
    for arch, archs in ((75, OLD), (90, NEWEST)):
        function = library("float16", archs)["rms_norm_1000"]
        (out,) = call(function, [(x.shape, "float16")], x, w, arch=arch)
        assert_close(out, reference_norm(x, w), "float16")


def test_a_zero_row_stays_finite_and_squares_do_not_overflow() -> None:
    x = np.zeros((2, 256), np.float16)
    x[1] = 3000
    (out,) = call(
        library("float16")["rms_norm_256"], [(x.shape, "float16")], x, np.ones(256, np.float16)
    )
    np.testing.assert_array_equal(out, np.where(x == 0, 0, 1))


@pytest.mark.parametrize("rows", [1, 9])
@crossed("head_dim", HEAD_DIMS, always=80)
def test_qk_norm(dtype: str, head_dim: int, rows: int) -> None:
    x = random(dtype, rows, HQ + 2 * HKV, head_dim, scale=2)
    q_weight, k_weight = random(dtype, head_dim, seed=1), random(dtype, head_dim, seed=2)
    for suffix in ("", "_1") if rows == 1 else ("",):
        function = library(dtype)[f"qk_norm_{head_dim}{suffix}"]
        (out,) = call(function, [(x.shape, dtype)], x, q_weight, k_weight)
        assert_close(out[:, :HQ], reference_norm(x[:, :HQ], q_weight), dtype)
        keys = slice(HQ, HQ + HKV)
        assert_close(out[:, keys], reference_norm(x[:, keys], k_weight), dtype)
        np.testing.assert_array_equal(out[:, HQ + HKV :], x[:, HQ + HKV :])


def check_gated(function: Any, activation: str, x: np.ndarray, dtype: str) -> None:
    half = x.shape[1] // 2
    expected = ACTIVATION_REFERENCES[activation](wide(x[:, :half])) * wide(x[:, half:])
    (out,) = call(function, [((len(x), half), dtype)], x)
    tolerance = 1e-5 if dtype == "float32" else DTYPES[dtype][1]
    assert_close(out, expected, dtype, tolerance)


@pytest.mark.parametrize("activation", elementwise.ACTIVATIONS)
@on_every_dtype
def test_gated_activation(dtype: str, activation: str) -> None:
    x = random(dtype, 20, 2 * WIDTHS[0], scale=3)
    check_gated(library(dtype)[f"{activation}_{WIDTHS[0]}"], activation, x, dtype)


@crossed("width", WIDTHS, always=1000)
def test_gated_activation_of_other_widths(dtype: str, width: int) -> None:
    for rows, suffix in ((3, ""), (1, ""), (1, "_1")):
        x = random(dtype, rows, 2 * width)
        check_gated(library(dtype)[f"silu_{width}{suffix}"], "silu", x, dtype)


@pytest.mark.parametrize("activation", elementwise.ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_activations_at_extremes(dtype: str, activation: str) -> None:
    """Large inputs saturate."""
    x = np.ones((1, 512), dtype)
    x[0, :4] = [1e4, -1e4, 90, -90]
    (out,) = call(library(dtype)[f"{activation}_256"], [((1, 256), dtype)], x)
    np.testing.assert_allclose(out[0, :4], [1e4, 0, 90, 0], rtol=1e-6, atol=1e-30)
    assert np.isfinite(out).all()
