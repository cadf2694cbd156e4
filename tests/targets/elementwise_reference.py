"""Norms and activations in numpy and float64, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from math import erf

import ml_dtypes
import numpy as np

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


def random(dtype: str, *shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape) * scale
    return values.astype(DTYPES[dtype][0])


def assert_close(
    actual: np.ndarray, expected: np.ndarray, dtype: str, tolerance: float | None = None
) -> None:
    numpy_dtype, default = DTYPES[dtype]
    tolerance = tolerance or default
    assert actual.dtype == numpy_dtype
    np.testing.assert_allclose(wide(actual), expected, rtol=tolerance, atol=tolerance * 1e-2)
