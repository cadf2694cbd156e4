"""The formulas of the numpy decoder, against torch's and by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mlc_compile.runtime.formulas import (
    ACTIVATIONS,
    alibi,
    alibi_slopes,
    choose,
    layer_norm,
    rms_norm,
    rotate,
    rounded_alibi,
    soft_cap,
)

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations").ACT2FN
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -200, 200, 1e4]]).astype(np.float32)
    found = ACTIVATIONS[name](x)
    wanted = activations[name](torch.from_numpy(x.astype(np.float64))).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


def test_norms() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, weight, bias = (rng.standard_normal(n).astype(np.float32) for n in ((3, 5, 24), 24, 24))
    x += 100  # where the variance is no difference of squares
    wide = [torch.from_numpy(a.astype(np.float64)) for a in (x, weight, bias)]
    wanted = torch.nn.functional.layer_norm(wide[0], (24,), wide[1], wide[2], 1e-5).numpy()
    np.testing.assert_allclose(layer_norm(x, weight, bias, 1e-5), wanted, rtol=1e-3, atol=1e-4)
    wanted = torch.nn.functional.rms_norm(wide[0], (24,), None, 0.5).numpy()
    np.testing.assert_allclose(rms_norm(x, None, None, 0.5), wanted, rtol=1e-6)
    np.testing.assert_allclose(rms_norm(x, weight, bias, 0.5), wanted * weight + bias, rtol=1e-4)


def test_rotation_of_a_part_of_the_head() -> None:
    x = np.array([[[1, 0, 0, 1, 7]]], np.float32)  # pairs (0, 2) and (1, 3); 4 stays
    turned = rotate(x, np.array([3]), np.array([0.5, 0.1], np.float32), 2.0)[0, 0]
    expected = [2 * math.cos(1.5), -2 * math.sin(0.3), 2 * math.sin(1.5), 2 * math.cos(0.3), 7]
    np.testing.assert_allclose(turned, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("heads", "exponents"),
    [
        (4, [2, 4, 6, 8]),
        (6, [2, 4, 6, 8, 1, 3]),
        (5, [2, 4, 6, 8, 1]),
        (3, [4, 8, 2]),
        (12, [*range(1, 9), 0.5, 1.5, 2.5, 3.5]),
        (1, [8]),
    ],
)
def test_slopes(heads: int, exponents: list[float]) -> None:
    np.testing.assert_allclose(alibi_slopes(heads), [2.0**-e for e in exponents], rtol=1e-6)


@pytest.mark.parametrize("heads", [6, 12, 20, 32, 71])
def test_slopes_of_the_classes(heads: int) -> None:
    """transformers' Bloom and MPT, which go about it in two ways."""
    torch = pytest.importorskip("torch")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    mpt = pytest.importorskip("transformers.models.mpt.modeling_mpt")
    one = torch.ones(1, 2, dtype=torch.int64)
    wanted = [
        bloom.build_alibi_tensor(one, heads, torch.float32)[:, 0, 1],
        -mpt.build_mpt_alibi_tensor(heads, 2)[:, 0, 0],
    ]
    for slopes in wanted:
        np.testing.assert_allclose(alibi_slopes(heads), slopes.numpy(), rtol=2e-6)


def test_penalties() -> None:
    slopes = np.array([0.5, 0.25], np.float32)
    at = np.arange(3)
    found = alibi(slopes, at, at)
    assert found.shape == (2, 3, 3)
    assert found[1].tolist() == [[0, 0.25, 0.5], [-0.25, 0, 0.25], [-0.5, -0.25, 0]]
    # 257 has nine digits, a bfloat16 eight.
    rounded = rounded_alibi(slopes, np.array([256, 257, 259]), 2.0)
    assert rounded[:, 0].tolist() == [[256, 256, 260], [128, 128, 130]]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_choice_of_experts(score: str, renormalize: bool) -> None:
    logits = np.array([[0, 2, 1, 2], [1, 1, 1, 1]], np.float32)
    experts, weights = choose(logits, 2, score=score, renormalize=renormalize, scale=3.0)
    assert experts.tolist() == [[1, 3], [0, 1]]  # of equal ones the first
    likely = np.exp(logits) / (np.exp(logits).sum(1, keepdims=True) if score == "softmax" else 1)
    likely = likely if score == "softmax" else likely / (1 + likely)
    wanted = np.take_along_axis(likely, experts, 1)
    wanted = wanted / wanted.sum(1, keepdims=True) if renormalize else wanted
    np.testing.assert_allclose(weights, 3 * wanted, rtol=1e-6)


def test_caps() -> None:
    x = np.array([-1e6, 0, 1, 1e6], np.float32)
    np.testing.assert_allclose(soft_cap(x, 30.0), [-30, 0, 30 * math.tanh(1 / 30), 30], rtol=1e-6)
    assert soft_cap(x, None) is x
