"""What the options of `models/options.py` compute, as plain numpy in float32.

The second opinion on our graphs: written from each option's own description, and sharing no code
with nn/ or the kernels. Slow where that is simpler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Int64: TypeAlias = NDArray[np.int64]
Activation: TypeAlias = Callable[[Float32], Float32]

# ---------------------------------------------------------------------------------------------
# Norms, over the last axis


def rms_norm(x: Float32, weight: Float32 | None, bias: Float32 | None, eps: float) -> Float32:
    """x / sqrt(mean(x^2) + eps) * weight + bias (Zhang & Sennrich, 2019); either may be None."""
    mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
    y = x * (1 / np.sqrt(mean + np.float32(eps))).astype(np.float32)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def layer_norm(x: Float32, weight: Float32 | None, bias: Float32 | None, eps: float) -> Float32:
    """The RMS norm of x - mean(x), whose mean square is the variance (Ba et al., 2016)."""
    centred: Float32 = x - np.mean(x, axis=-1, keepdims=True, dtype=np.float32)
    return rms_norm(centred, weight, bias, eps)


# ---------------------------------------------------------------------------------------------
# Activations


def sigmoid(x: Float32) -> Float32:
    """1 / (1 + exp(-x)); exp(80) is still finite."""
    y: Float32 = np.reciprocal(np.float32(1) + np.exp(-np.clip(x, -80, None)))
    return y


def silu(x: Float32) -> Float32:
    """x sigmoid(x)."""
    return x * sigmoid(x)


def gelu(x: Float32) -> Float32:
    """x times the chance that a normal variable is below x: x/2 erfc(-x / sqrt(2))."""
    erfc = np.frompyfunc(math.erfc, 1, 1)
    doubled: Float32 = erfc(x * np.float32(-math.sqrt(0.5))).astype(np.float32)
    return x * np.float32(0.5) * doubled


def gelu_tanh(x: Float32) -> Float32:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) (Hendrycks & Gimpel, 2016)."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return x * sigmoid(2 * inner)  # 1 + tanh(u) is 2 sigmoid(2 u), without cancellation


def relu(x: Float32) -> Float32:
    """max(x, 0)."""
    return np.maximum(x, np.float32(0))


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": silu,
    "swish": silu,
    "gelu": gelu,
    "gelu_new": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": lambda x: x * sigmoid(np.float32(1.702) * x),
    "relu": relu,
    "relu2": lambda x: np.square(relu(x)),
}
"""By the names of config.json."""


def soft_cap(x: Float32, cap: float | None) -> Float32:
    """cap tanh(x / cap); x without a cap."""
    return x if cap is None else np.float32(cap) * np.tanh(x / np.float32(cap))


# ---------------------------------------------------------------------------------------------
# Positions


def rotate(x: Float32, positions: Int64, inv_freq: Float32, factor: float) -> Float32:
    """x [n, heads, d]: of a head's first 2 len(inv_freq) dimensions, i turns with
    i + len(inv_freq) by position * inv_freq[i] and grows by `factor`; the others stay."""
    angle = positions.astype(np.float32)[:, None, None] * inv_freq
    cos, sin = (turn(angle) * np.float32(factor) for turn in (np.cos, np.sin))
    half = len(inv_freq)
    a, b, rest = np.split(x, [half, 2 * half], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def alibi_slopes(heads: int) -> Float32:
    """[heads]: a geometric series from 2^(-8/n) to 2^-8 where heads = n is a power of two.

    Else that of the power of two below, then each other number of the series for the one above
    (Press et al., 2021).
    """

    def series(n: int) -> list[float]:
        return [2 ** (-8 * i / n) for i in range(1, n + 1)]

    below = 1 << (heads.bit_length() - 1)
    found = series(below) + series(2 * below)[0::2]
    return np.array(found[:heads], np.float32)


def alibi(slopes: Float32, queries: Int64, keys: Int64) -> Float32:
    """[heads, queries, keys]: slope * (key - query), what scores gain."""
    back = (keys[None, :] - queries[:, None]).astype(np.float32)
    return slopes[:, None, None] * back


def rounded_alibi(slopes: Float32, keys: Int64, scale: float) -> Float32:
    """[heads, 1, keys]: scale * slope * key, slope, key and their product in bfloat16 (Falcon)."""
    narrow = ml_dtypes.bfloat16
    product = slopes.astype(narrow)[:, None] * keys.astype(np.float32).astype(narrow)[None, :]
    penalty: Float32 = product.astype(np.float32)[:, None, :]
    return penalty * np.float32(scale)


# ---------------------------------------------------------------------------------------------
# Experts


def choose(
    logits: Float32, k: int, *, score: str, renormalize: bool, scale: float
) -> tuple[Int64, Float32]:
    """(experts, weights), each [n, k], of a router's logits [n, experts].

    The k likeliest, of equal ones the lower index first; probabilities are a softmax or sigmoids
    over all experts, divided by the sum of the chosen ones where `renormalize`.
    """
    if score == "sigmoid":
        likely = sigmoid(logits)
    else:
        powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
        likely = powers / powers.sum(axis=-1, keepdims=True)
    experts = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    weights = np.take_along_axis(likely, experts, axis=-1)
    if renormalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return experts, weights * np.float32(scale)
