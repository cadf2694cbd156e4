"""The GPU's row kernels against numpy in float64, run by each device of `gpu_library`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
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
from gpu_library import DEVICES, Device, build, check_limits, loaded
from linear_reference import random_weight

from mlc_compile.quantization.scheme import SCHEMES, numpy_dtype
from mlc_compile.targets.cpu_kernels import elementwise as cpu
from mlc_compile.targets.gpu_kernels import elementwise
from mlc_compile.targets.gpu_kernels.device import WEBGPU, GPUDevice
from mlc_compile.targets.gpu_kernels.embedding import embedding_kernel
from mlc_compile.targets.kernels import EmbeddingSpec, LayerNormSpec

HQ, HKV = 3, 2
HEAD_DIMS = (64, 128, 80)
# 576 and 1000 leave threads without work; 7 takes a small group.
WIDTHS = (256, 576, 1000, 7)
FLOATS = ("float32", "float16")
VOCAB, HIDDENS = 50, (64, 83, 600)
# WGSL's exp may be off by 3 + 2 |x| units in the last place, and exponents here go to 15.
ACTIVATION_TOLERANCE = {"float32": 1e-5, "float16": 2.0**-10}
SMALL = {"max_threads": 64, "shared_bytes": 16 << 10}


def kernels(dtype: str, device: GPUDevice) -> dict[str, Any]:
    """Every kernel, symbolic in n; `_1` is the one-row form."""
    made: dict[str, Any] = {}
    for rows, suffix in ((None, ""), (1, "_1")):
        for h in WIDTHS:
            made[f"rms_norm_{h}{suffix}"] = elementwise.rms_norm(h, dtype, EPS, rows, device=device)
            kernel = elementwise.add_rms_norm(h, dtype, EPS, rows, device=device)
            made[f"add_rms_norm_{h}{suffix}"] = kernel
            kernel = elementwise.gated_activation("silu", h, dtype, rows, device=device)
            made[f"silu_{h}{suffix}"] = kernel
        for d in HEAD_DIMS:
            kernel = elementwise.qk_norm(HQ, HKV, d, dtype, EPS, rows, device=device)
            made[f"qk_norm_{d}{suffix}"] = kernel
        for name, spec in LAYER_NORMS.items():
            spec = dataclasses.replace(spec, dtype=dtype)
            label = f"layer norm {name}{suffix}".replace(" ", "_")
            made[label] = elementwise.layer_norm(spec, rows, device=device)
    for activation in elementwise.ACTIVATIONS:
        kernel = elementwise.gated_activation(activation, WIDTHS[0], dtype, device=device)
        made[f"{activation}_{WIDTHS[0]}"] = kernel
    return made


@functools.cache
def library(device: Device, dtype: str) -> Any:
    return loaded(build(device, kernels(dtype, device.limits)))


def call(
    device: Device, function: Any, outputs: list[tuple[tuple[int, ...], str]], *inputs: np.ndarray
) -> list[np.ndarray]:
    """The outputs, poisoned before."""
    poisoned = [np.full(shape, 7e3, numpy_dtype(dtype)) for shape, dtype in outputs]
    tensors = [device.tensor(a) for a in (*inputs, *poisoned)]
    function(*tensors)
    return [t.numpy() for t in tensors[len(inputs) :]]


@pytest.mark.parametrize("small", [False, True], ids=["whole", "small"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", DEVICES.values(), ids=DEVICES)
def test_launches_keep_to_the_device(kind: Device, dtype: str, small: bool) -> None:
    kind = kind.smaller(**SMALL) if small else kind
    for code in check_limits(kind, build(kind, kernels(dtype, kind.limits))).values():
        assert any(word in code for word in ("enable f16", "half")) <= (dtype == "float16")


@pytest.mark.emulated(dtype="float16", width=1000, rows=5)
@pytest.mark.emulated(dtype="float16", width=7, rows=1)
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_rms_norm(device: Device, dtype: str, width: int, rows: int) -> None:
    x, w = random(dtype, rows, width, scale=3), random(dtype, width, seed=1)
    expected = reference_norm(x, w)
    for suffix in ("", "_1") if rows == 1 else ("",):
        function = library(device, dtype)[f"rms_norm_{width}{suffix}"]
        assert_close(*call(device, function, [(x.shape, dtype)], x, w), expected, dtype)


@pytest.mark.emulated(dtype="float16", width=1000, rows=5)
@pytest.mark.emulated(dtype="float32", width=576, rows=1)
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_add_rms_norm(device: Device, dtype: str, width: int, rows: int) -> None:
    x, y = random(dtype, rows, width, scale=3), random(dtype, rows, width, seed=2)
    w = random(dtype, width, seed=1)
    for suffix in ("", "_1") if rows == 1 else ("",):
        function = library(device, dtype)[f"add_rms_norm_{width}{suffix}"]
        normed, total = call(device, function, [(x.shape, dtype)] * 2, x, y, w)
        assert_close(total, wide(x) + wide(y), dtype)
        # The norm is of the rounded sum.
        assert_close(normed, reference_norm(total, w), dtype)


@pytest.mark.emulated(dtype="float16", name="added", rows=5)
@pytest.mark.emulated(dtype="float32", name="own", rows=5)
@pytest.mark.emulated(dtype="float16", name="shared", rows=1)
@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("name", LAYER_NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layer_norm(device: Device, dtype: str, name: str, rows: int) -> None:
    inputs, expected, slack = layer_norm_case(name, dtype, rows)
    for suffix in ("", "_1") if rows == 1 else ("",):
        function = library(device, dtype)[f"layer norm {name}{suffix}".replace(" ", "_")]
        found = call(device, function, [(exact.shape, dtype) for exact in expected], *inputs)
        for result, exact in zip(found, expected, strict=True):
            assert_close(result, exact, dtype, slack=slack)


@pytest.mark.emulated(dtype="float16")
@pytest.mark.parametrize("dtype", FLOATS)
def test_small_groups(device: Device, dtype: str) -> None:
    x, w = random(dtype, 3, 1000, scale=3), random(dtype, 1000, seed=1)
    small = device.smaller(**SMALL)
    with small.strict():
        (out,) = call(small, library(small, dtype)["rms_norm_1000"], [(x.shape, dtype)], x, w)
    assert_close(out, reference_norm(x, w), dtype)


@pytest.mark.emulated
def test_rms_norm_epsilon_keeps_a_zero_row_finite(device: Device) -> None:
    x, w = np.zeros((2, 256), np.float32), np.ones(256, np.float32)
    function = library(device, "float32")["rms_norm_256"]
    np.testing.assert_array_equal(*call(device, function, [(x.shape, "float32")], x, w), x)


@pytest.mark.emulated
def test_float16_squares_do_not_overflow(device: Device) -> None:
    x, w = np.full((1, 256), 3000, np.float16), np.ones(256, np.float16)
    (out,) = call(device, library(device, "float16")["rms_norm_256"], [(x.shape, "float16")], x, w)
    np.testing.assert_array_equal(out, np.ones_like(x))


@pytest.mark.emulated(dtype="float16", head_dim=80)
@pytest.mark.emulated(dtype="float32", head_dim=64, rows=1)
@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_qk_norm(device: Device, dtype: str, head_dim: int, rows: int) -> None:
    x = random(dtype, rows, HQ + 2 * HKV, head_dim, scale=2)
    q_weight, k_weight = random(dtype, head_dim, seed=1), random(dtype, head_dim, seed=2)
    for suffix in ("", "_1") if rows == 1 else ("",):
        function = library(device, dtype)[f"qk_norm_{head_dim}{suffix}"]
        (out,) = call(device, function, [(x.shape, dtype)], x, q_weight, k_weight)
        assert_close(out[:, :HQ], reference_norm(x[:, :HQ], q_weight), dtype)
        keys = slice(HQ, HQ + HKV)
        assert_close(out[:, keys], reference_norm(x[:, keys], k_weight), dtype)
        np.testing.assert_array_equal(out[:, HQ + HKV :], x[:, HQ + HKV :])


def check_gated(device: Device, function: Any, activation: str, x: np.ndarray, dtype: str) -> None:
    half = x.shape[1] // 2
    expected = ACTIVATION_REFERENCES[activation](wide(x[:, :half])) * wide(x[:, half:])
    (out,) = call(device, function, [((len(x), half), dtype)], x)
    assert_close(out, expected, dtype, ACTIVATION_TOLERANCE[dtype])


@pytest.mark.emulated(dtype="float16")
@pytest.mark.parametrize("activation", elementwise.ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gated_activation(device: Device, dtype: str, activation: str) -> None:
    for rows in (1, 80):
        x = random(dtype, rows, 2 * WIDTHS[0], scale=3)
        check_gated(
            device, library(device, dtype)[f"{activation}_{WIDTHS[0]}"], activation, x, dtype
        )


@pytest.mark.emulated(dtype="float16", width=1000)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_gated_activation_of_other_widths(device: Device, dtype: str, width: int) -> None:
    for rows, suffix in ((3, ""), (1, ""), (1, "_1")):
        x = random(dtype, rows, 2 * width)
        check_gated(device, library(device, dtype)[f"silu_{width}{suffix}"], "silu", x, dtype)


@pytest.mark.emulated
@pytest.mark.parametrize("activation", elementwise.ACTIVATIONS)
def test_activations_at_extremes(device: Device, activation: str) -> None:
    """Large inputs saturate."""
    x = np.ones((1, 512), np.float32)
    x[0, :4] = [1e4, -1e4, 90, -90]
    (out,) = call(
        device, library(device, "float32")[f"{activation}_256"], [((1, 256), "float32")], x
    )
    np.testing.assert_allclose(out[0, :4], [1e4, 0, 90, 0], rtol=1e-6, atol=1e-30)
    assert np.isfinite(out).all()


def test_activations_are_those_of_the_cpu() -> None:
    assert elementwise.ACTIVATIONS.keys() == cpu.ACTIVATIONS.keys()
    assert elementwise.gated_activation("mish", 64, "float32", device=WEBGPU) is None


NOT_BFLOAT16: dict[str, Callable[[], Any]] = {
    "rms_norm": lambda: elementwise.rms_norm(64, "bfloat16", EPS, device=WEBGPU),
    "add_rms_norm": lambda: elementwise.add_rms_norm(64, "bfloat16", EPS, device=WEBGPU),
    "layer_norm": lambda: elementwise.layer_norm(LayerNormSpec(64, EPS, "bfloat16"), device=WEBGPU),
    "qk_norm": lambda: elementwise.qk_norm(2, 1, 64, "bfloat16", EPS, device=WEBGPU),
    "gated": lambda: elementwise.gated_activation("silu", 64, "bfloat16", device=WEBGPU),
    "plain embedding": lambda: embedding_kernel(
        EmbeddingSpec(8, 64, None, "bfloat16"), device=WEBGPU
    ),
    "packed embedding": lambda: embedding_kernel(
        EmbeddingSpec(8, 64, SCHEMES["q4bf16_1"], "bfloat16"), device=WEBGPU
    ),
}


@pytest.mark.parametrize("name", NOT_BFLOAT16)
def test_there_is_no_bfloat16(name: str) -> None:
    assert NOT_BFLOAT16[name]() is None


# --- embedding

# Of the kinds of codes that are not symmetric groups one each.
TABLES = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.model_dtype != "bfloat16" and name not in ("q8f16_pc", "e4m3f32_1")
]


def embedding_spec(name: str, hidden: int, rows: int | None) -> EmbeddingSpec:
    scheme = dataclasses.replace(SCHEMES[name], layout="NK")
    packed = None if scheme.is_plain else scheme
    return EmbeddingSpec(VOCAB, hidden, packed, scheme.model_dtype, rows)


@functools.cache
def embeddings(device: Device) -> Any:
    return loaded(
        build(
            device,
            {
                f"{name}_{hidden}_{rows}": embedding_kernel(
                    embedding_spec(name, hidden, rows), device=device.limits
                )
                for name in TABLES
                for hidden in HIDDENS
                for rows in (1, None)
            },
        )
    )


@pytest.mark.emulated(hidden=83)
@pytest.mark.parametrize("hidden", HIDDENS)
@pytest.mark.parametrize("name", TABLES)
def test_embedding(device: Device, name: str, hidden: int) -> None:
    spec = embedding_spec(name, hidden, None)
    rng, dtype = np.random.default_rng(hidden), spec.dtype
    if spec.scheme is None:
        plain = rng.standard_normal((VOCAB, hidden)).astype(numpy_dtype(dtype))
        table, exact = [plain], plain.astype(np.float64)
    else:
        *table, exact = random_weight(VOCAB, hidden, spec.scheme, rng)
    for rows, count in ((1, 1), (None, 1), (None, 5), (None, 300)):
        ids = rng.integers(0, VOCAB, count).astype(np.int32)
        ids[-1] = VOCAB - 1
        function = embeddings(device)[f"{name}_{hidden}_{rows}"]
        (out,) = call(device, function, [((count, hidden), dtype)], ids, *table)
        # One rounding of the exact product; WGSL may round to float16 either way.
        assert_close(out, exact[ids], dtype, DTYPES[dtype][1])
        if dtype == "float32" or spec.scheme is None:
            np.testing.assert_array_equal(out, exact[ids].astype(np.float32))
