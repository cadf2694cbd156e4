"""The matmul in Metal's simdgroup matrices against numpy, on the emulated device, without races."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from every_scheme import covering
from linear_reference import LinearCase, linear_spec

from mlc_compile.errors import InputError
from mlc_compile.runtime import metal_emulator
from mlc_compile.runtime.metal_emulator import Limits, Mode, check_kernels, options, read_kernels
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.gpu_kernels.linear import FEW_ROWS, linear_kernel
from mlc_compile.targets.kernels import LinearSpec
from mlc_compile.targets.metal import METAL, METAL_APPLE7
from mlc_compile.targets.profile import get_target

TARGET = get_target("macos")[0].backend().tvm_target(None, ".so")
# A part of a tile, more than one of its halves, and more than one tile; none whole.
ROWS = (FEW_ROWS + 1, 33, 70)
MULTIPLY = "simdgroup_multiply_accumulate"


@pytest.fixture(autouse=True)
def races() -> Iterator[None]:
    metal_emulator.install()
    with options(mode=Mode.RACES):
        yield


def build(folder: Path, spec: LinearSpec, device: GPUDevice) -> tuple[Any, dict[str, str]]:
    """(the kernel of `spec`, the MSL of each of its launches), within the limits of `device`."""
    kernel = linear_kernel(spec, device=device).with_attr("global_symbol", "linear")
    path = folder / "library.so"
    tvm.tirx.build(tvm.IRModule({"linear": kernel}), target=TARGET).export_library(str(path))
    (kernels,) = read_kernels(path)
    allowed = Limits(
        group_bytes=device.shared_bytes,
        buffers=device.max_buffers,
        simdgroup_matrices=device.simdgroup_matrix,
    )
    assert [p for v in check_kernels(kernels, allowed, types=False) for p in v.problems] == []
    return metal_emulator.load_library(path)["linear"], {k.name: k.source for k in kernels}


def expected(spec: LinearSpec) -> LinearCase:
    """Operands, and the weight that matrices multiply with (GEMV kernels round none)."""
    case = LinearCase.random(spec)
    halves = spec.scheme is not None and spec.scheme.model_dtype == spec.x_dtype == "float16"
    if halves:  # dequantised to float16
        return dataclasses.replace(case, exact=case.exact.astype(np.float16).astype(np.float64))
    return case


def check(
    folder: Path, spec: LinearSpec, counts: Sequence[int], device: GPUDevice = METAL_APPLE7
) -> dict[str, str]:
    """Compare the kernel of `spec` with numpy for each number of rows; its MSL."""
    run, codes = build(folder, spec, device)
    case = expected(spec)
    gpu = tvm.device("metal", 0)
    for count in counts:
        inputs = case.inputs(count)
        out = tvm.runtime.tensor(case.poisoned(count), gpu)
        with options(mode=Mode.RACES, max_threads=device.max_threads):
            run(*(tvm.runtime.tensor(a, gpu) for a in inputs), out)
        case.check(inputs[0], out.numpy(), count)
    return codes


@pytest.mark.parametrize(
    ("name", "n", "k"),
    [
        ("q4f16_1", 75, 202),  # nothing divides these
        ("q4f16_0", 75, 202),
        ("q3f16_1", 70, 205),
        ("q8f32_1", 33, 71),
        ("q0f16", 49, 150),
        ("q0f32", 3, 7),
        ("q4f16_1", 128, 96),  # everything divides these
        ("q3f16_0", 64, 80),
    ],
)
def test_product(tmp_path: Path, name: str, n: int, k: int) -> None:
    # A float32 output shows what a rounding to float16 would hide.
    codes = check(tmp_path, linear_spec(name, n, k, out_dtype="float32", has_bias=True), ROWS)
    assert sum(MULTIPLY in code for code in codes.values()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("n", "k"), [(1, 1), (130, 33), (75, 320), (192, 256)])
@pytest.mark.parametrize("name", covering("q4f16_1", dtypes=("float16", "float32")))
def test_every_kind_of_scheme(tmp_path: Path, name: str, n: int, k: int) -> None:
    more = {"out_dtype": "float32", "has_bias": True} if n % 2 else {}
    check(tmp_path, linear_spec(name, n, k, **more), (*ROWS, 64, 129))


@pytest.mark.parametrize(
    ("x_dtype", "out_dtype", "tiles"),
    [("float16", "float16", "half"), ("float32",) * 2 + ("float",)],
)
def test_operands_are_as_wide_as_needed(
    tmp_path: Path, x_dtype: str, out_dtype: str, tiles: str
) -> None:
    spec = linear_spec("q4f16_1", 36, 64, x_dtype=x_dtype, out_dtype=out_dtype)
    (code,) = (c for c in check(tmp_path, spec, (9,)).values() if MULTIPLY in c)
    kinds = dict(re.findall(r"simdgroup_(half|float)8x8 (\w+)\[16\]", code))
    assert list(kinds) == ["float"]  # the sums
    operands = re.findall(r"simdgroup_(half|float)8x8 \w+\[4\]", code)
    assert operands == [tiles, tiles]


def test_threads_in_another_order(tmp_path: Path) -> None:
    spec = linear_spec("q4f16_1", 75, 202, out_dtype="float32", has_bias=True)
    with options(order="descending"), metal_emulator.record() as launches:
        check(tmp_path, spec, (70,))
    (launch,) = launches
    assert launch.threads == 128
    assert launch.grid == (2, 2, 1)


def smaller(**limits: int) -> GPUDevice:
    return dataclasses.replace(METAL_APPLE7, **limits)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (METAL, "q4f16_1"),
        (smaller(max_threads=64), "q4f16_1"),
        (smaller(shared_bytes=(14 << 10) - 1), "q4f16_1"),
        (smaller(shared_bytes=20 << 10), "q4f32_1"),
    ],
    ids=["no matrices", "threads", "memory", "memory for float32"],
)
def test_the_generic_kernel_where_it_does_not_fit(
    tmp_path: Path, device: GPUDevice, name: str
) -> None:
    spec = linear_spec(name, 20, 40, out_dtype="float32")
    _, codes = build(tmp_path, spec, device)
    assert not any("simdgroup" in code for code in codes.values())


def test_one_row_stays_without_matrices(tmp_path: Path) -> None:
    _, codes = build(tmp_path, linear_spec("q4f16_1", 36, 64, rows=1), METAL_APPLE7)
    assert not any("simdgroup" in code for code in codes.values())


@pytest.mark.parametrize("name", ["q4f16_1", "q4f16_0", "q3f16_1", "q0f32"])
def test_shapes_of_models(tmp_path: Path, name: str) -> None:
    _, codes = build(tmp_path, linear_spec(name, 2048, 2048, has_bias=True), METAL_APPLE7)
    assert sum(MULTIPLY in code for code in codes.values()) == 1


# --- which target has it


@pytest.mark.parametrize("suffix", [".so", ".tar"])
@pytest.mark.parametrize(
    ("name", "matrices"),
    [
        ("iphone", False),
        ("iphone:apple7", True),
        ("iphone-simulator", False),
        ("macabi", True),
        ("macos", True),
    ],
)
def test_targets(name: str, suffix: str, matrices: bool) -> None:
    profile, variant = get_target(name)
    backend = profile.backend()
    target = backend.tvm_target(variant, suffix)
    kernel = backend.kernels(target).linear(linear_spec("q4f16_1", 64, 64))
    assert (MULTIPLY in kernel.script()) == matrices
    # The target survives what passes do to it.
    again = tvm.target.Target(dict(target.export()))
    kernel = backend.kernels(again).linear(linear_spec("q4f16_1", 64, 64))
    assert (MULTIPLY in kernel.script()) == matrices


def test_the_variant_is_of_a_newer_phone() -> None:
    profile, variant = get_target("iphone:apple7")
    assert profile.backend().tvm_target(None, ".tar").host.attrs["mcpu"] == "apple-a12"
    assert profile.backend().tvm_target(variant, ".tar").host.attrs["mcpu"] == "apple-a14"
    assert profile.required_features("float16", variant) == ["apple7"]
    assert profile.required_features("float16", None) == []


@pytest.mark.parametrize("name", ["iphone:apple6", "iphone-simulator:apple7", "macos:apple7"])
def test_other_variants_are_refused(name: str) -> None:
    profile, variant = get_target(name)
    with pytest.raises(InputError, match=f"{name}: no such variant") as error:
        profile.backend().tvm_target(variant, ".tar")
    assert ("iphone:apple7" in (error.value.hint or "")) == (profile.name == "iphone")
