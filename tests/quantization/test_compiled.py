"""Compiled encoders: the bytes of the numpy reference, its errors, and its sums of squares."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mlc_compile.errors import InputError
from mlc_compile.quantization import compiled
from mlc_compile.quantization.codec import Scales
from mlc_compile.quantization.compiled import CompiledEncoder, Encoder, encoder
from mlc_compile.quantization.errors import square_sums
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, get_scheme

Array = npt.NDArray[Any]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
# Building all kernels takes half a minute: those used most are quick tests.
QUICK = ("q4f16_1", "q8f16_1", "q4f32_1", "e4m3f16_1", "q4f16_awq")
PACKED = [
    pytest.param(s, marks=() if s.name in QUICK else pytest.mark.slow, id=s.name)
    for s in SCHEMES.values()
    if not s.is_plain
]
FAST = encoder("cpu")  # one for all tests: each kernel is built once
SLOW = encoder("numpy")


def weights(rng: np.random.Generator, n: int, k: int, dtype: Any) -> Array:
    """Rows of many magnitudes, with zeros, ties, denormals and groups whose scale vanishes."""
    w = rng.standard_normal((n, k)).astype(np.float32)
    w *= np.exp2(rng.integers(-12, 3, (n, 1))).astype(np.float32)
    w[0, : k // 2] = 0
    w[1 % n] = np.arange(k, dtype=np.float32) % 15 - 7  # quotients halfway between codes
    w[2 % n, ::3] = -0.0
    w[3 % n] *= 2.0**-22
    w[4 % n] = rng.integers(0, 3, k) * 2.0**-24
    w[5 % n, ::2] = -1 - 2.0**-20  # as large as 1 once narrowed
    w[5 % n, 1::2] = 1
    return w.astype(dtype)


def assert_same(found: tuple[Array, ...], expected: tuple[Array, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("scheme", PACKED)
@pytest.mark.parametrize("scales", ["absmax", "signed"])
def test_same_bytes_as_numpy(scales: Scales, scheme: QuantScheme, dtype: Any) -> None:
    rng = np.random.default_rng(5)
    assert isinstance(FAST, CompiledEncoder)
    if scheme.codes == "symmetric":
        assert FAST.kernel(np.dtype(dtype).name, scheme, scales) is not None
    for n, k in [(9, 320), (5, 37), (1, 1), (7, 129), (21, 64)]:
        w = weights(rng, n, k, dtype)
        found = FAST.measured(w, scheme, scales=scales)
        expected = SLOW.measured(w, scheme, scales=scales)
        assert_same(found[0], expected[0])
        assert_same(found[1:], expected[1:])
        again = FAST(w, scheme, layout="NK", scales=scales)
        assert_same(again, SLOW(w, scheme, layout="NK", scales=scales))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("q4f16_1", np.float16),
        pytest.param("q3f16_0", np.float32, marks=pytest.mark.slow),
        ("q8f32_1", ml_dtypes.bfloat16),
        pytest.param("q4bf16_1", np.float32, marks=pytest.mark.slow),
    ],
)
def test_searched_scales_have_the_same_bytes(name: str, dtype: Any, weighted: bool) -> None:
    scheme, rng = get_scheme(name), np.random.default_rng(6)
    assert isinstance(FAST, CompiledEncoder)
    assert FAST.kernel(np.dtype(dtype).name, scheme, "mse") is not None
    for n, k in [(9, 320), (21, 40), (7, 77)]:
        w = weights(rng, n, k, dtype)
        importance = rng.random(k).astype(np.float32) if weighted else None
        if importance is not None:
            importance[::5] = 0
        found = FAST.measured(w, scheme, scales="mse", importance=importance)
        expected = SLOW.measured(w, scheme, scales="mse", importance=importance)
        assert_same(found[0], expected[0])
        assert_same(found[1:], expected[1:])


def test_importance_is_checked() -> None:
    scheme, w = get_scheme("q4f16_1"), np.ones((2, 32), np.float16)
    for wrong in (np.ones(31, np.float32), np.full(32, np.nan, np.float32)):
        with pytest.raises(ValueError, match="importance must be"):
            FAST(w, scheme, scales="mse", importance=wrong)


@pytest.mark.parametrize("name", ["q4f16_1", "q4bf16_1"])
def test_every_float16_is_narrowed_alike(name: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    w = np.resize(finite, (64, 32 * 32))
    scheme = get_scheme(name)
    assert_same(FAST(w, scheme), SLOW(w, scheme))


@pytest.mark.parametrize("name", ["q4f16_1", "q8f16_1"])
def test_every_quotient_of_some_scales(name: str) -> None:
    """Every float16 up to a peak, over that peak's scale: what divides by an inverse is exact."""
    rng, scheme = np.random.default_rng(7), get_scheme(name)
    for peak in (1, 3, 0x3FF, 0x400, 0x2B5D, *rng.integers(0x400, 0x7C00, 5)):  # bits of float16
        rows = -(-(int(peak) + 1) // 31)
        w = np.full((rows, 32), peak, np.uint16)
        w[:, 1:] = np.resize(np.arange(int(peak) + 1, dtype=np.uint16), (rows, 31))
        w[:, 2::2] |= 0x8000
        for scales in ("absmax", "signed"):
            assert_same(
                FAST(w.view(np.float16), scheme, scales=scales),
                SLOW(w.view(np.float16), scheme, scales=scales),
            )


def test_float32_at_the_edges_of_float16() -> None:
    scheme = get_scheme("q8f16_1")
    edges = np.array([65504, 65519.99, 2.0**-14, 2.0**-24, 2.0**-25, 1.5 * 2.0**-24, 1e-30])
    w = np.zeros((len(edges) * 3, 32), np.float32)
    for i, edge in enumerate(edges):
        w[3 * i : 3 * i + 3, 0] = edge
        w[3 * i + 1, 1:] = -edge / 3
        w[3 * i + 2, 1:] = np.nextafter(np.float32(edge / 2), np.float32(0))
    assert_same(FAST(w, scheme), SLOW(w, scheme))


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 65520.0, -1e6])
@pytest.mark.parametrize("position", [(0, 0), (4, 99)])
def test_refuses_what_the_reference_refuses(value: float, position: tuple[int, int]) -> None:
    scheme = get_scheme("q4f16_1")
    w = np.ones((5, 100), np.float32)
    w[position] = value
    messages = []
    for one in (FAST, SLOW):
        with pytest.raises(InputError, match=r"tensor 'x\.weight' holds a value") as raised:
            one(w, scheme, name="x.weight")
        messages.append(raised.value.message)
    assert messages[0] == messages[1]


def test_takes_views_of_any_alignment_that_cannot_be_written() -> None:
    scheme = get_scheme("q4f16_1")
    w = weights(np.random.default_rng(1), 6, 64, np.float16)
    raw = np.frombuffer(b"\0\0" + w.tobytes(), np.float16, offset=2).reshape(w.shape)
    assert raw.ctypes.data % 4 and not raw.flags.writeable
    assert_same(FAST(raw, scheme), SLOW(w, scheme))
    assert_same(FAST(w.T, scheme), SLOW(np.ascontiguousarray(w.T), scheme))
    wide = w.astype(np.float64)  # served by numpy
    assert_same(FAST(wide, scheme), SLOW(wide, scheme))
    empty = np.zeros((0, 64), np.float16)
    assert_same(FAST(empty, scheme), SLOW(empty, scheme))


def test_threads_share_an_encoder() -> None:
    fast = CompiledEncoder()
    scheme = get_scheme("q4f16_0")
    ws = [weights(np.random.default_rng(i), 33, 256, np.float16) for i in range(6)]
    found: dict[int, tuple[Array, ...]] = {}

    def work(i: int) -> None:
        found[i] = fast(ws[i], scheme)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(ws))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, w in enumerate(ws):
        assert_same(found[i], SLOW(w, scheme))


def test_without_float16_instructions_numpy_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "load", lambda *_: None)
    plain = CompiledEncoder()
    w = weights(np.random.default_rng(2), 5, 64, np.float16)
    scheme = get_scheme("q4f16_1")
    assert plain.kernel("float16", scheme) is None
    assert_same(plain(w, scheme), SLOW(w, scheme))


def test_unknown_device() -> None:
    with pytest.raises(InputError, match="cannot pack weights"):
        encoder("tpu")  # type: ignore[arg-type]  # as a user could


def test_square_sums_are_right_and_no_matter_of_blocks() -> None:
    rng = np.random.default_rng(3)
    scheme = get_scheme("q4f16_1")
    w = rng.standard_normal((50, 72)).astype(np.float16)
    stored = (w.astype(np.float32) * 1.01).astype(np.float16)
    wide = w.astype(np.float64)
    np.testing.assert_allclose(square_sums(w, None, scheme), np.square(wide).sum(axis=1), rtol=1e-6)
    exact = np.square(stored.astype(np.float64) - wide).sum(axis=1)
    found = square_sums(w, stored, scheme)
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    parts = [square_sums(w[i : i + 7], stored[i : i + 7], scheme) for i in range(0, 50, 7)]
    assert np.concatenate(parts).tobytes() == found.tobytes()
    assert isinstance(SLOW, Encoder)
