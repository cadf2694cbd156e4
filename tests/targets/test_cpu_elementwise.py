"""The CPU's row kernels, through a built and loaded library, against numpy in float64."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from elementwise_reference import (
    ACTIVATION_REFERENCES,
    DTYPES,
    EPS,
    LAYER_NORMS,
    assert_close,
    layer_norm_case,
    random,
    reference_norm,
    wide,
)
from tvm import relax, tirx

from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels import elementwise

HQ, HKV, HEAD_DIM = 3, 2, 64
# 256 fills the vectors, 36 and 7 do not (narrower vectors follow).
WIDTHS = (256, 36, 7)
TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})


def tensor_type(shape: Sequence[Any], dtype: str) -> relax.TensorType:
    return relax.TensorType(list(shape), dtype)


def add_function(
    builder: relax.BlockBuilder,
    name: str,
    kernel: tirx.PrimFunc,
    inputs: Sequence[tuple[Sequence[Any], str]],
    outputs: Sequence[tuple[Sequence[Any], str]],
) -> None:
    arguments = [relax.Var(f"x{i}", tensor_type(*spec)) for i, spec in enumerate(inputs)]
    out_types = [tensor_type(*spec) for spec in outputs]
    with builder.function(name, arguments):
        with builder.dataflow():
            result = builder.emit_output(
                relax.call_tir(
                    builder.add_func(kernel, f"kernel_{name}"),
                    arguments,
                    out_ty=out_types if len(out_types) > 1 else out_types[0],
                )
            )
        builder.emit_func_output(result)


def load(module: tvm.IRModule, path: Path) -> relax.VirtualMachine:
    relax.build(module, TARGET).export_library(str(path))
    return relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], relax.VirtualMachine]:
    """dtype -> a VM with every kernel, each width symbolic in n; `_1` is the one-row form."""

    @functools.cache
    def build(dtype: str) -> relax.VirtualMachine:
        bb = relax.BlockBuilder()

        def n(name: str = "n") -> tirx.Var:
            return tirx.Var(name, "int64")

        for h in WIDTHS:
            for rows, suffix in ((None, ""), (1, "_1")):
                if rows is not None and h != WIDTHS[0]:
                    continue
                r = rows or n()
                x, w = ((r, h), dtype), ((h,), dtype)
                kernel = elementwise.rms_norm(h, dtype, EPS, rows)
                add_function(bb, f"rms_norm_{h}{suffix}", kernel, [x, w], [x])
                r = rows or n()
                x = ((r, h), dtype)
                kernel = elementwise.add_rms_norm(h, dtype, EPS, rows)
                add_function(bb, f"add_rms_norm_{h}{suffix}", kernel, [x, x, w], [x, x])
            r = n()
            x = ((r, h), dtype)
            add_function(bb, f"add_{h}", elementwise.add(h, dtype), [x, x], [x])
            for activation in elementwise.ACTIVATIONS if h == WIDTHS[0] else ("silu",):
                r = n()
                kernel = elementwise.gated_activation(activation, h, dtype)
                spec = [((r, 2 * h), dtype)], [((r, h), dtype)]
                add_function(bb, f"{activation}_{h}", kernel, *spec)
        r = n()
        x, w = ((r, HQ + 2 * HKV, HEAD_DIM), dtype), ((HEAD_DIM,), dtype)
        kernel = elementwise.qk_norm(HQ, HKV, HEAD_DIM, dtype, EPS)
        add_function(bb, "qk_norm", kernel, [x, w, w], [x])
        for name, spec in LAYER_NORMS.items():
            for rows, suffix in ((None, ""), (1, "_1")):
                spec = dataclasses.replace(spec, dtype=dtype)
                kernel = elementwise.layer_norm(spec, rows)
                types = [(shape, of) for _, shape, of in spec.arguments(rows or n())]
                results = 2 if spec.added else 1
                label = f"layer norm {name}{suffix}".replace(" ", "_")
                add_function(bb, label, kernel, types[:-results], types[-results:])
        return load(bb.get(), tmp_path_factory.mktemp("lib") / f"{dtype}.so")

    return build


def call(vm: relax.VirtualMachine, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
    result = vm[name](*(tvm.runtime.tensor(a) for a in arrays))
    return [result.numpy()] if hasattr(result, "numpy") else [r.numpy() for r in result]


# 0 rows: an empty batch is legal. 300 rows of 256 take the parallel branch.
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(library: Any, dtype: str, width: int, rows: int) -> None:
    x, w = random(dtype, rows, width, scale=3), random(dtype, width, seed=1)
    assert_close(*call(library(dtype), f"rms_norm_{width}", x, w), reference_norm(x, w), dtype)


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_equals_add_then_norm(library: Any, dtype: str, width: int, rows: int) -> None:
    x, y = random(dtype, rows, width, scale=3), random(dtype, rows, width, seed=2)
    w = random(dtype, width, seed=1)
    normed, total = call(library(dtype), f"add_rms_norm_{width}", x, y, w)
    expected = (wide(x) + wide(y)).astype(np.float32).astype(DTYPES[dtype][0])
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(*call(library(dtype), f"add_{width}", x, y), expected)
    np.testing.assert_array_equal(normed, *call(library(dtype), f"rms_norm_{width}", expected, w))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row_forms_equal_symbolic_ones(library: Any, dtype: str) -> None:
    h = WIDTHS[0]
    x, y, w = random(dtype, 1, h), random(dtype, 1, h, seed=2), random(dtype, h, seed=1)
    for name, arguments in ((f"rms_norm_{h}", (x, w)), (f"add_rms_norm_{h}", (x, y, w))):
        symbolic = call(library(dtype), name, *arguments)
        fixed = call(library(dtype), f"{name}_1", *arguments)
        for a, b in zip(symbolic, fixed, strict=True):
            np.testing.assert_array_equal(a, b)
    two_rows = random(dtype, 2, h)
    with pytest.raises(Exception, match=r"rms_norm_256_1"):
        call(library(dtype), f"rms_norm_{h}_1", two_rows, w)


@pytest.mark.parametrize("rows", [0, 1, 5, 300])
@pytest.mark.parametrize("name", LAYER_NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(library: Any, dtype: str, name: str, rows: int) -> None:
    inputs, expected, slack = layer_norm_case(name, dtype, rows)
    for suffix in ("", "_1") if rows == 1 else ("",):
        label = f"layer norm {name}{suffix}".replace(" ", "_")
        found = call(library(dtype), label, *inputs)
        for result, exact in zip(found, expected, strict=True):
            assert_close(result, exact, dtype, slack=slack)


def test_rms_norm_epsilon_keeps_a_zero_row_finite(library: Any) -> None:
    x, w = np.zeros((2, 256), np.float32), np.ones(256, np.float32)
    np.testing.assert_array_equal(*call(library("float32"), "rms_norm_256", x, w), x)


def test_float16_squares_do_not_overflow(library: Any) -> None:
    x, w = np.full((1, 256), 3000, np.float16), np.ones(256, np.float16)
    (out,) = call(library("float16"), "rms_norm_256", x, w)
    np.testing.assert_array_equal(out, np.ones_like(x))


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm(library: Any, dtype: str, rows: int) -> None:
    x = random(dtype, rows, HQ + 2 * HKV, HEAD_DIM, scale=2)
    q_weight, k_weight = random(dtype, HEAD_DIM, seed=1), random(dtype, HEAD_DIM, seed=2)
    (out,) = call(library(dtype), "qk_norm", x, q_weight, k_weight)
    assert_close(out[:, :HQ], reference_norm(x[:, :HQ], q_weight), dtype)
    keys = slice(HQ, HQ + HKV)
    assert_close(out[:, keys], reference_norm(x[:, keys], k_weight), dtype)
    np.testing.assert_array_equal(out[:, HQ + HKV :], x[:, HQ + HKV :])


@pytest.mark.parametrize("activation", elementwise.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_activation(library: Any, dtype: str, activation: str) -> None:
    width = WIDTHS[0]
    for rows in (1, 80):
        x = random(dtype, rows, 2 * width, scale=3)
        expected = ACTIVATION_REFERENCES[activation](wide(x[:, :width])) * wide(x[:, width:])
        assert_close(*call(library(dtype), f"{activation}_{width}", x), expected, dtype)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_gated_activation_of_odd_widths(library: Any, width: int) -> None:
    x = random("float32", 3, 2 * width)
    expected = ACTIVATION_REFERENCES["silu"](wide(x[:, :width])) * wide(x[:, width:])
    assert_close(*call(library("float32"), f"silu_{width}", x), expected, "float32")


@pytest.mark.parametrize("activation", elementwise.ACTIVATIONS)
def test_activations_at_extremes(library: Any, activation: str) -> None:
    """Large inputs saturate without NaN; a NaN comes through."""
    width = WIDTHS[0]
    x = np.ones((1, 2 * width), np.float32)
    x[0, :4] = [1e4, -1e4, 90, np.nan]
    (out,) = call(library("float32"), f"{activation}_{width}", x)
    np.testing.assert_array_equal(out[0, :3], np.float32([1e4, 0, 90]))
    assert np.isnan(out[0, 3])
    assert np.isfinite(out[0, 4:]).all()


@pytest.mark.parametrize("vector_bits", [0, 128, 512])
def test_other_vector_widths(tmp_path: Path, vector_bits: int) -> None:
    """No vectors at all, NEON's width, AVX-512's (which LLVM splits where the CPU lacks it)."""
    width, bb = 100, relax.BlockBuilder()
    x, w = ((elementwise.symbol("n"), width), "float32"), ((width,), "float32")
    kernel = elementwise.rms_norm(width, "float32", EPS, vector_bits=vector_bits)
    add_function(bb, "rms_norm", kernel, [x, w], [x])
    n = elementwise.symbol("n")
    kernel = elementwise.gated_activation("gelu", width, "float32", vector_bits=vector_bits)
    add_function(bb, "gelu", kernel, [((n, 2 * width), "float32")], [((n, width), "float32")])
    vm = load(bb.get(), tmp_path / "lib.so")
    values, weight = random("float32", 3, 2 * width), random("float32", width, seed=1)
    head = np.ascontiguousarray(values[:, :width])
    assert_close(*call(vm, "rms_norm", head, weight), reference_norm(head, weight), "float32")
    expected = ACTIVATION_REFERENCES["gelu"](wide(head)) * wide(values[:, width:])
    assert_close(*call(vm, "gelu", values), expected, "float32")


def test_kernels_chain_inside_a_dataflow_block(tmp_path: Path) -> None:
    """Results that stay inside the block pass relax's reshape analysis, which wants TIR blocks."""
    bb, n = relax.BlockBuilder(), elementwise.symbol("n")
    x = relax.Var("x", tensor_type((n, 64), "float32"))
    with bb.function("main", [x]):
        with bb.dataflow():
            doubled = bb.emit(
                relax.call_tir(
                    bb.add_func(elementwise.add(64, "float32"), "add"), [x, x], out_ty=x.ty
                )
            )
            again = bb.add_func(elementwise.add(64, "float32"), "add")
            result = bb.emit_output(relax.call_tir(again, [doubled, doubled], out_ty=x.ty))
        bb.emit_func_output(result)
    values = random("float32", 5, 64)
    vm = load(bb.get(), tmp_path / "lib.so")
    np.testing.assert_array_equal(*call(vm, "main", values), 4 * values)


def test_unknown_activation_has_no_kernel() -> None:
    assert elementwise.gated_activation("mish", 64, "float32") is None


@pytest.fixture(scope="module")
def own_exp(tmp_path_factory: pytest.TempPathFactory) -> Callable[[np.ndarray], np.ndarray]:
    lanes, blocks = 16, elementwise.symbol("blocks")

    def body(x: Any, out: Any) -> None:
        with vec.serial(blocks) as i:
            vec.store(out, [i, 0], elementwise.exp(vec.load(x, [i, 0], lanes), lanes), lanes)

    arguments = [(name, (blocks, lanes), "float32") for name in ("x", "out")]
    exp_kernel = elementwise.build_kernel("exp", arguments, body)
    bb, n = relax.BlockBuilder(), tirx.Var("n", "int64")
    spec = ((n, lanes), "float32")
    add_function(bb, "exp", exp_kernel, [spec], [spec])
    vm = load(bb.get(), tmp_path_factory.mktemp("lib") / "exp.so")
    return lambda x: call(vm, "exp", x.reshape(-1, lanes))[0].reshape(-1)


def test_exp_is_within_one_and_a_half_ulp(own_exp: Any) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            rng.uniform(-104, 88.72, 1 << 18),
            rng.uniform(-1, 1, 1 << 17),
            np.linspace(-9, 9, 1 << 17),
        ]
    ).astype(np.float32)
    exact = np.exp(wide(x))
    ulp = np.spacing(np.maximum(exact, np.finfo(np.float32).tiny).astype(np.float32))
    assert (np.abs(own_exp(x) - exact) / ulp).max() < 1.5


def test_exp_special_values(own_exp: Any) -> None:
    x = np.zeros(16, np.float32)
    x[:8] = [0, -0.0, np.inf, -np.inf, np.nan, 88.8, -104.5, 3e38]
    out = own_exp(x)
    np.testing.assert_array_equal(out[:8], [1, 1, np.inf, 0, np.nan, np.inf, 0, np.inf])
    np.testing.assert_array_equal(out[8:], 1)
