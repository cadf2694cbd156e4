"""The numpy reference against plain arithmetic in the model dtype, and against exact rationals."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.quantization.codec import decode, encode
from mlc_compile.quantization.group import narrow
from mlc_compile.quantization.packing import unpack
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, numpy_dtype

# Those of other codes and of whole rows: test_codec.py.
GROUP_SCHEMES = [s for s in SCHEMES.values() if s.codes == "symmetric" and s.group_size]
SOURCES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]

group_schemes = pytest.mark.parametrize("scheme", GROUP_SCHEMES, ids=lambda s: s.name)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning from any of this is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def fields_of(q_weight: np.ndarray, scheme: QuantScheme, k: int) -> np.ndarray:
    words = q_weight.T if scheme.layout == "KN" else q_weight
    return unpack(words, scheme.bits)[:, :k]


def scales_of(q_scale: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    return np.ascontiguousarray(q_scale.T) if scheme.layout == "KN" else q_scale


def naive(weight: np.ndarray, scheme: QuantScheme) -> tuple[np.ndarray, np.ndarray]:
    """Every step in the model dtype's own arithmetic: fields [N, padded K] and scales [N, g]."""
    dtype = numpy_dtype(scheme.model_dtype)
    top = dtype.type(scheme.max_int)
    n, k = weight.shape
    groups = math.ceil(k / scheme.group_size)
    w = np.zeros((n, groups * scheme.group_size), dtype)
    w[:, :k] = weight.astype(dtype)
    w = w.reshape(n, groups, scheme.group_size)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.abs(w).max(axis=-1) / top
        q = np.rint(w / scale[..., None] + top)
    assert q.dtype == scale.dtype == dtype
    q = np.where(scale[..., None] == 0, top, q).astype(np.float32)
    return np.clip(q, 0, 2 * scheme.max_int).reshape(n, -1).astype(np.uint32), scale


def assert_equals_naive(weight: np.ndarray, scheme: QuantScheme) -> None:
    k = weight.shape[1]
    q_weight, q_scale = encode(weight, scheme)
    fields, scale = naive(weight, scheme)
    np.testing.assert_array_equal(fields_of(q_weight, scheme, k), fields[:, :k])
    stored = scales_of(q_scale, scheme)
    assert stored.dtype == scale.dtype
    np.testing.assert_array_equal(stored.view(np.uint8), scale.view(np.uint8))


@group_schemes
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("k", [1, 32, 40, 100, 576])
def test_same_bits_as_plain_arithmetic(scheme: QuantScheme, source: type, k: int) -> None:
    rng = np.random.default_rng(k)
    weight = rng.standard_normal((33, k)) * 10.0 ** rng.integers(-9, 3, (33, k))
    assert_equals_naive(weight.astype(source), scheme)


@group_schemes
def test_same_bits_for_every_float16_maximum(scheme: QuantScheme) -> None:
    """Each finite float16 as a group's maximum, subnormals too, with others at all fractions."""
    maxima = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    rng = np.random.default_rng(0)
    fractions = rng.uniform(-1, 1, (maxima.size, scheme.group_size))
    # Halves of a step decide how ties round.
    ties = rng.integers(-2 * scheme.max_int, 2 * scheme.max_int + 1, fractions.shape)
    fractions = np.where(ties % 3 == 0, ties / (2 * scheme.max_int), fractions)
    fractions[:, 0] = 1
    assert_equals_naive((maxima[:, None] * fractions).astype(np.float16), scheme)


@group_schemes
def test_same_bits_near_the_smallest_numbers(scheme: QuantScheme) -> None:
    tiny = np.float64(ml_dtypes.finfo(numpy_dtype(scheme.model_dtype)).smallest_subnormal)
    steps = np.arange(-400, 400).reshape(-1, 20).repeat(2, axis=1)
    assert_equals_naive(steps * tiny, scheme)


def rounded(value: Fraction, dtype: str) -> Fraction:
    """`value` to the nearest number of `dtype`, ties to even, by exact arithmetic."""
    precision, lowest = {"float16": (11, -14), "bfloat16": (8, -126), "float32": (24, -126)}[dtype]
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value)))
    exponent += (abs(value) >= Fraction(2) ** (exponent + 1)) - (
        abs(value) < Fraction(2) ** exponent
    )
    unit = Fraction(2) ** (max(exponent, lowest) - precision + 1)
    return round(value / unit) * unit  # Python rounds half to even


@group_schemes
def test_formula_in_exact_arithmetic(scheme: QuantScheme) -> None:
    rng = np.random.default_rng(7)
    k = scheme.group_size * 3
    weight = rng.standard_normal((4, k)).astype(np.float32)
    q_weight, q_scale = encode(weight, scheme)
    got = decode((q_weight, q_scale), scheme, k)
    fields, scales = fields_of(q_weight, scheme, k), scales_of(q_scale, scheme)
    top = scheme.max_int

    def near(value: Fraction) -> Fraction:
        return rounded(value, scheme.model_dtype)

    for row in range(4):
        exact = [near(Fraction(float(x))) for x in weight[row]]
        for group in range(3):
            part = slice(group * scheme.group_size, (group + 1) * scheme.group_size)
            scale = near(max(abs(x) for x in exact[part]) / top)
            assert Fraction(float(scales[row, group])) == scale
            for column in range(part.start, part.stop):
                q = min(max(round(near(near(exact[column] / scale) + top)), 0), 2 * top)
                assert int(fields[row, column]) == q
                assert Fraction(float(got[row, column])) == near((q - top) * scale)


@group_schemes
def test_shapes_and_layout(scheme: QuantScheme) -> None:
    weight = np.random.default_rng(1).standard_normal((6, 100)).astype(np.float32)
    words, groups = scheme.num_words(100), scheme.num_groups(100)
    q_nk, s_nk = encode(weight, scheme, layout="NK")
    q_kn, s_kn = encode(weight, scheme, layout="KN")
    assert (q_nk.shape, s_nk.shape) == ((6, words), (6, groups))
    assert (q_kn.shape, s_kn.shape) == ((words, 6), (groups, 6))
    assert q_kn.flags.c_contiguous and s_kn.flags.c_contiguous
    np.testing.assert_array_equal(q_kn.T, q_nk)
    np.testing.assert_array_equal(s_kn.T, s_nk)
    np.testing.assert_array_equal(
        decode((q_nk, s_nk), scheme, 100, layout="NK"),
        decode((q_kn, s_kn), scheme, 100, layout="KN"),
    )
    assert encode(weight, scheme)[0].shape == (q_kn if scheme.layout == "KN" else q_nk).shape


@group_schemes
def test_dequantize_is_one_rounded_product(scheme: QuantScheme) -> None:
    dtype = numpy_dtype(scheme.model_dtype)
    weight = np.random.default_rng(2).standard_normal((50, 300)).astype(np.float32)
    q_weight, q_scale = encode(weight, scheme)
    fields = fields_of(q_weight, scheme, 300).astype(np.int64).astype(dtype)
    scale = np.repeat(scales_of(q_scale, scheme), scheme.group_size, axis=1)[:, :300]
    expected = (fields - dtype.type(scheme.max_int)) * scale
    got = decode((q_weight, q_scale), scheme, 300)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, expected)
    # Half a step, and the roundings of w / scale + M (up to 2M) and of the result.
    step = scale.astype(np.float64)
    slack = 4 * scheme.max_int * float(ml_dtypes.finfo(dtype).eps)
    assert (np.abs(got.astype(np.float64) - weight) <= step * (0.5 + slack)).all()


@group_schemes
def test_zero_groups_stay_zero(scheme: QuantScheme) -> None:
    weight = np.zeros((2, 3 * scheme.group_size), np.float32)
    weight[1] = -0.0
    weight[:, scheme.group_size : 2 * scheme.group_size] = 1.5
    q_weight, q_scale = encode(weight, scheme)
    scales = scales_of(q_scale, scheme)
    assert (scales[:, [0, 2]] == 0).all() and not np.signbit(scales).any()
    fields = fields_of(q_weight, scheme, weight.shape[1])
    assert (fields[weight == 0] == scheme.max_int).all()
    assert (decode((q_weight, q_scale), scheme, weight.shape[1])[weight == 0] == 0).all()


@group_schemes
def test_padding_reads_as_zero_bits_above_the_last_field(scheme: QuantScheme) -> None:
    """The padded elements of the last group are weight 0, and unused top bits are 0."""
    weight = np.ones((1, scheme.group_size + 1), np.float32)
    q_weight, _ = encode(weight, scheme, layout="NK")
    fields = unpack(q_weight, scheme.bits)[0]
    assert (fields[scheme.group_size + 1 :] == scheme.max_int).all()
    unused = 32 % scheme.bits
    assert unused == 0 or (q_weight >> np.uint32(32 - unused) == 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", SOURCES)
@group_schemes
def test_not_finite_is_refused(scheme: QuantScheme, source: type, bad: float) -> None:
    weight = np.zeros((3, 64), source)
    weight[1, 7] = bad
    with pytest.raises(InputError, match=r"'a\.weight' holds a value that is not finite"):
        encode(weight, scheme, name="a.weight")
    with pytest.raises(InputError, match="not finite"):
        narrow(weight, scheme.model_dtype, name="a.weight")


def test_a_nan_of_any_payload_is_refused() -> None:
    bits = np.zeros((1, 32), np.uint32)
    bits[0, 0] = 0x7FFFFFFF  # rounding it like a number would give -0.0
    for scheme in GROUP_SCHEMES:
        with pytest.raises(InputError, match="not finite"):
            encode(bits.view(np.float32), scheme)


@pytest.mark.parametrize(
    ("dtype", "source", "largest", "beyond"),
    [
        ("float16", np.float32, 65519.996, 65520.0),
        ("float16", np.float64, 65519.999999, 65520.0),
        ("float16", ml_dtypes.bfloat16, 65280.0, 65536.0),
        ("bfloat16", np.float32, 3.3961e38, 3.3962e38),
        ("float32", np.float64, 3.4028235e38, 3.5e38),
    ],
)
def test_overflow_is_refused_exactly_where_it_starts(
    dtype: str, source: type, largest: float, beyond: float
) -> None:
    scheme = {"float16": "q4f16_1", "bfloat16": "q4bf16_1", "float32": "q4f32_1"}[dtype]
    for sign in (1, -1):
        fits = np.full((2, 32), sign * largest, source)
        assert np.isfinite(narrow(fits, dtype).astype(np.float64)).all()
        encode(fits, SCHEMES[scheme])
        too_much = fits.copy()
        too_much[1, 3] = sign * beyond
        for act in (
            lambda w: narrow(w, dtype, name="x"),
            lambda w: encode(w, SCHEMES[scheme], name="x"),
        ):
            with pytest.raises(InputError, match=rf"'x' holds .* overflows {dtype}"):
                act(too_much)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("source", SOURCES)
def test_narrow_is_one_conversion(dtype: str, source: type) -> None:
    rng = np.random.default_rng(3)
    values = (rng.standard_normal(500) * 10.0 ** rng.integers(-7, 4, 500)).astype(source)
    got = narrow(values, dtype)
    expected = values.astype(numpy_dtype(dtype))
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


def test_only_matrices_are_packed() -> None:
    with pytest.raises(ValueError, match="1 axes"):
        encode(np.zeros(32, np.float32), SCHEMES["q4f16_1"])
    with pytest.raises(ValueError, match="q0f16"):
        encode(np.zeros((1, 32), np.float32), SCHEMES["q0f16"])


# Frozen: these bytes are what published parameter files hold.
GOLDEN = {
    "q3f16_0": "0fed8bdf443f2ad8",
    "q3f16_1": "928391608b51bb6b",
    "q4f16_0": "97f1b9b084c4f885",
    "q4f16_1": "b1efb334247634ea",
    "q4f16_2": "b1efb334247634ea",
    "q4f32_1": "0b2bf735177b7f20",
    "q4bf16_0": "16258e12af4d675b",
    "q4bf16_1": "c16cf5a83459fef1",
    "q8f16_0": "c198b62e9ed042b9",
    "q8f16_1": "f552ddfe4328c95c",
    "q8f32_1": "a001dec1b1729274",
}


@group_schemes
def test_golden_bytes(scheme: QuantScheme) -> None:
    n = np.arange(7 * 123, dtype=np.int64)
    weight = (((n * n * 2654435761) % 65521 - 32760) / 32768).astype(np.float32).reshape(7, 123)
    q_weight, q_scale = encode(weight, scheme)
    digest = hashlib.sha256(q_weight.astype("<u4").tobytes() + q_scale.tobytes()).hexdigest()
    assert digest[:16] == GOLDEN[scheme.name]
