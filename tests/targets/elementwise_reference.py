"""Norms and activations in numpy and float64, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import erf

import ml_dtypes
import numpy as np

from mlc_compile.targets.kernels import LayerNormSpec

EPS = 1e-5
# dtype -> numpy's, and the tolerance of one rounding to it.
DTYPES = {
    "float32": (np.dtype(np.float32), 2e-6),
    "float16": (np.dtype(np.float16), 2.0**-10),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), 2.0**-7),
}
ACTIVATION_REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}
ACTIVATION_REFERENCES["gelu_pytorch_tanh"] = ACTIVATION_REFERENCES["gelu_tanh"]


def wide(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float64)


def reference_norm(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    x = wide(x)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * wide(w)


# Every way of a LayerNormSpec; each head has its own tables, or all share one.
LAYER_NORMS = {
    "plain": LayerNormSpec(256, EPS, "float32"),
    "odd": LayerNormSpec(1000, EPS, "float32", bias=False),
    "no tables": LayerNormSpec(36, EPS, "float32", weight=False, bias=False),
    "added": LayerNormSpec(576, EPS, "float32", added=True),
    "added rms": LayerNormSpec(36, EPS, "float32", bias=False, centre=False, added=True),
    "shared": LayerNormSpec(80, EPS, "float32", heads=3),
    "own": LayerNormSpec(80, EPS, "float32", heads=3, bias=False, own_tables=True),
    "own rms": LayerNormSpec(7, EPS, "float32", heads=5, bias=False, own_tables=True, centre=False),
}


def layer_norm_case(
    name: str, dtype: str, rows: int
) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """(inputs, expected results in float64, slack) of one of LAYER_NORMS.

    slack: what a float32 mean that is off by two units in the last place of the largest input
    changes in a result.
    """
    spec = replace(LAYER_NORMS[name], dtype=dtype)
    results = 2 if spec.added else 1
    shapes = [(argument, shape) for argument, shape, _ in spec.arguments(rows)][:-results]
    inputs = {
        argument: random(dtype, *shape, scale=3, seed=i)
        for i, (argument, shape) in enumerate(shapes)
    }
    # Far from 0: a difference of the means of x^2 and x would lose digits here.
    inputs["x"] += np.asarray(40, inputs["x"].dtype)
    x = wide(inputs["x"])
    if spec.added:
        total = inputs["x"].astype(np.float32) + inputs["residual"].astype(np.float32)
        x = wide(total.astype(inputs["x"].dtype))
    y = x - x.mean(-1, keepdims=True) if spec.centre else x
    deviation = np.sqrt((y * y).mean(-1, keepdims=True) + EPS)
    y, slack = y / deviation, 0.0
    tables = {
        argument: wide(table).reshape(-1, spec.size)
        for argument, table in inputs.items()
        if argument in ("weight", "bias")
    }
    y = y * tables.get("weight", 1.0) + tables.get("bias", 0.0)
    y = y.reshape(x.shape)
    if spec.centre and rows:
        largest = np.abs(tables.get("weight", np.ones(1))).max()
        slack = 2 * 2.0**-23 * float(np.abs(x).max() * largest / deviation.min())
    return list(inputs.values()), [y, x] if spec.added else [y], slack


def random(dtype: str, *shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(DTYPES[dtype][0])


def assert_close(
    actual: np.ndarray,
    expected: np.ndarray,
    dtype: str,
    tolerance: float | None = None,
    slack: float = 0.0,
) -> None:
    """Within `tolerance` of the value, and `slack`."""
    numpy_dtype, default = DTYPES[dtype]
    tolerance = tolerance or default
    assert actual.dtype == numpy_dtype
    np.testing.assert_allclose(
        wide(actual), expected, rtol=tolerance, atol=tolerance * 1e-2 + slack
    )
