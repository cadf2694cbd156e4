"""Every packing scheme against plain loops, exact arithmetic and golden bytes, by every rule."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.models.params import ParamSpec, Source
from mlc_compile.quantization.codec import (
    Scales,
    decode,
    encode,
    nearest,
    pack_zeros,
    unpack_zeros,
)
from mlc_compile.quantization.codec import (
    rule as chosen_rule,
)
from mlc_compile.quantization.group import narrow
from mlc_compile.quantization.levels import E4M3, levels_of
from mlc_compile.quantization.packing import unpack
from mlc_compile.quantization.policy import stored_params
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, numpy_dtype

PACKING = [scheme for scheme in SCHEMES.values() if not scheme.is_plain]
RULES: tuple[Scales, ...] = ("absmax", "signed", "mse")

SYMMETRIC = [scheme for scheme in PACKING if scheme.codes == "symmetric"]

packing = pytest.mark.parametrize("scheme", PACKING, ids=lambda s: s.name)
symmetric = pytest.mark.parametrize("scheme", SYMMETRIC, ids=lambda s: s.name)
rules = pytest.mark.parametrize("rule", RULES)


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A warning from any of this is a fault."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def weights(n: int, k: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, k)) * 10.0 ** rng.uniform(-3, 1, (n, 1))).astype(np.float32)


def error(weight: np.ndarray, arrays: tuple[np.ndarray, ...], scheme: QuantScheme) -> np.ndarray:
    """Squared error of each row against the weight in the model dtype."""
    exact = narrow(weight, scheme.model_dtype).astype(np.float64)
    return np.square(decode(arrays, scheme, weight.shape[1]).astype(np.float64) - exact).sum(axis=1)


@packing
@rules
@pytest.mark.parametrize("k", [1, 32, 100, 129])
def test_shapes_are_the_policys(scheme: QuantScheme, rule: Scales, k: int) -> None:
    weight = weights(6, k)
    spec = ParamSpec("model.layers.0.mlp.down_proj.weight", (6, k), "linear", (Source("s"),))
    arrays = encode(weight, scheme, scales=rule)
    stored = stored_params(spec, scheme)
    assert [(a.shape, a.dtype) for a in arrays] == [(s.shape, numpy_dtype(s.dtype)) for s in stored]
    assert all(a.flags.c_contiguous for a in arrays)
    decoded = decode(arrays, scheme, k)
    assert decoded.shape == weight.shape and decoded.dtype == numpy_dtype(scheme.model_dtype)


@packing
@rules
def test_rows_are_independent_and_layouts_equal(scheme: QuantScheme, rule: Scales) -> None:
    """Blocks of rows and the whole give the same bytes, in both layouts, whatever the chunks."""
    weight = weights(400, 160)
    kept = weight.copy()
    whole = encode(weight, scheme, layout="NK", scales=rule)
    assert np.array_equal(weight, kept)
    edges = (0, 1, 233, 400)
    parts = [
        encode(weight[a:b], scheme, layout="NK", scales=rule) for a, b in itertools.pairwise(edges)
    ]
    for tensor, blocks in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(tensor.view(np.uint8), np.concatenate(blocks).view(np.uint8))
    for tensor, flipped in zip(
        whole, encode(weight, scheme, layout="KN", scales=rule), strict=True
    ):
        assert np.array_equal(tensor.T, flipped)
    one = encode(weight[:1, :32], scheme, layout="NK", scales=rule)  # one group: no view of it
    assert np.array_equal(weight, kept) and one[0].shape[0] == 1


@packing
@rules
def test_decoding_is_one_rounded_product(scheme: QuantScheme, rule: Scales) -> None:
    """(level of the code) * scale, in exact arithmetic, rounded once."""
    k = 2 * (scheme.group_size or 20)
    weight = weights(3, k, seed=2)
    arrays = encode(weight, scheme, layout="NK", scales=rule)
    decoded = decode(arrays, scheme, k, layout="NK")
    groups = scheme.num_groups(k)
    codes = unpack(arrays[0], scheme.bits).reshape(3, groups, -1).astype(np.int64)
    if scheme.codes == "e4m3":
        floats = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        level = floats[codes]
    elif scheme.codes == "affine":
        level = codes - unpack_zeros(arrays[2], scheme, groups).astype(np.float64)[..., None]
    else:
        level = codes.astype(np.float64) - scheme.max_int
    # Levels have 9 bits at most and scales 24: float64 holds the product exactly.
    exact = (level * arrays[1].astype(np.float64)[..., None]).reshape(3, -1)[:, :k]
    assert np.array_equal(decoded, exact.astype(decoded.dtype))


@packing
def test_each_rule_is_no_worse_than_the_one_before(scheme: QuantScheme) -> None:
    """Row by row for "mse"; "signed" may lose single rows and wins in sum."""
    for seed, k in ((0, 160), (1, 77)):
        weight = weights(64, k, seed)
        absmax, signed, mse = (
            error(weight, encode(weight, scheme, scales=rule), scheme) for rule in RULES
        )
        assert (mse <= absmax * (1 + 1e-5)).all() and (mse <= signed * (1 + 1e-5)).all()
        assert mse.sum() < 0.98 * absmax.sum()
        if scheme.codes != "symmetric":
            assert np.array_equal(signed, absmax)
        elif scheme.bits < 8:
            assert signed.sum() < 0.9 * absmax.sum()


@symmetric
def test_signed_uses_the_code_that_only_one_side_has(scheme: QuantScheme) -> None:
    """The largest weight gets the last code, whatever its sign; as Q4_0, mirrored."""
    weight = weights(50, 100)
    arrays = encode(weight, scheme, layout="NK", scales="signed")
    size, groups = scheme.group_of(100), scheme.num_groups(100)
    x = np.zeros((50, groups * size), np.float32)
    x[:, :100] = narrow(weight, scheme.model_dtype)
    x = x.reshape(50, groups, size)
    peak = np.where(x.max(axis=2) >= -x.min(axis=2), x.max(axis=2), x.min(axis=2))
    expected = (peak / np.float32(scheme.max_int + 1)).astype(arrays[1].dtype)
    assert np.array_equal(arrays[1], expected) and (peak < 0).any() and (peak > 0).any()
    codes = unpack(arrays[0], scheme.bits).reshape(50, groups, -1)
    assert (codes.max(axis=2) == 2 * scheme.max_int + 1).all()
    plain = unpack(encode(weight, scheme, layout="NK")[0], scheme.bits)
    assert plain.max() == 2 * scheme.max_int  # "absmax": MLC's formula, in test_group.py


@packing
def test_auto_is_signed_for_few_bits_and_mlcs_formula_for_others(scheme: QuantScheme) -> None:
    few = scheme.codes == "symmetric" and scheme.bits in (3, 4)
    weight = weights(5, 90)
    expected = encode(weight, scheme, scales="signed" if few else "absmax")
    for mine, other in zip(encode(weight, scheme, scales="auto"), expected, strict=True):
        assert np.array_equal(mine, other)
    assert [chosen_rule(scales, scheme) for scales in RULES] == list(RULES)


def test_signed_is_the_grid_of_q4_0() -> None:
    gguf = pytest.importorskip("gguf")
    weight = weights(40, 128)
    kind = gguf.GGMLQuantizationType.Q4_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    mine = decode(encode(weight, SCHEMES["q4f16_1"], scales="signed"), SCHEMES["q4f16_1"], 128)
    step = np.abs(weight).reshape(40, 4, 32).max(axis=2).repeat(32, axis=1) / 8
    # Theirs rounds halves up and after a float16 scale that is not used to choose codes.
    assert (np.abs(theirs - mine.astype(np.float32)) < 0.01 * step).mean() > 0.99


@packing
def test_importance_is_what_counts(scheme: QuantScheme) -> None:
    """Less weighted error than without it; columns without importance may be anything."""
    rng = np.random.default_rng(5)
    weight = weights(48, 200)
    importance = np.exp(2 * rng.standard_normal(200)).astype(np.float32)
    exact = narrow(weight, scheme.model_dtype).astype(np.float64)

    def loss(importance: np.ndarray | None, rule: Scales = "mse") -> float:
        arrays = encode(weight, scheme, scales=rule, importance=importance)
        e = decode(arrays, scheme, 200).astype(np.float64) - exact
        return float((np.square(e) * weight_of).sum())

    weight_of = importance.astype(np.float64)
    assert loss(importance) < loss(None) and loss(importance) <= loss(None, "absmax")
    ones = encode(weight, scheme, scales="mse", importance=np.ones(200, np.float32))
    for mine, plain in zip(ones, encode(weight, scheme, scales="mse"), strict=True):
        assert np.array_equal(mine, plain)
    # Without any importance every scale is as good: the plain rule stays.
    nothing = encode(weight, scheme, scales="mse", importance=np.zeros(200, np.float32))
    for mine, plain in zip(nothing, encode(weight, scheme), strict=True):
        assert np.array_equal(mine, plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_importance_must_be_numbers_from_zero(bad: float) -> None:
    importance = np.ones(32, np.float32)
    importance[3] = bad
    with pytest.raises(ValueError, match="32 finite numbers"):
        encode(weights(2, 32), SCHEMES["q4f16_1"], scales="mse", importance=importance)
    with pytest.raises(ValueError, match="32 finite numbers"):
        encode(weights(2, 32), SCHEMES["q4f16_1"], importance=np.ones(31, np.float32))


@packing
def test_the_search_is_what_its_docstring_says(scheme: QuantScheme) -> None:
    """Group by group in scalar float32 arithmetic."""
    k, f32 = 2 * (scheme.group_size or 40) - 3, np.float32
    weight = weights(3, k, seed=9)
    rng = np.random.default_rng(3)
    importance = rng.uniform(0, 2, k).astype(np.float32)
    arrays = encode(weight, scheme, layout="NK", scales="mse", importance=importance)
    kind, size, groups = levels_of(scheme), scheme.group_of(k), scheme.num_groups(k)
    dtype = numpy_dtype(scheme.model_dtype)
    x = np.zeros((3, groups * size), np.float32)
    x[:, :k] = narrow(weight, scheme.model_dtype)
    m = np.zeros(groups * size, np.float32)
    m[:k] = importance
    decoded = np.zeros_like(x)

    def loss(w: np.ndarray, level: np.ndarray, s: np.ndarray, m: np.ndarray, rounded: bool) -> f32:
        total = f32(0)
        for i in range(size):
            value = f32(level[i, 0] * f32(s[0]))
            e = f32(w[i, 0] - (f32(dtype.type(value)) if rounded else value))
            total = f32(total + f32(f32(e * e) * m[i]))
        return total

    for row, group in itertools.product(range(3), range(groups)):
        part = slice(group * size, (group + 1) * size)
        w, weighing = x[row, part, None].copy(), m[part]
        tried = [(s, z, kind.nearest(w, s, z)) for s, z in kind.candidates(w)]
        losses = [loss(w, level, s, weighing, False) for s, z, level in tried]
        s, z, level = tried[int(np.argmin(losses))]  # the first of equals
        above = below = f32(0)
        for i in range(size):
            above = f32(above + f32(f32(w[i, 0] * level[i, 0]) * weighing[i]))
            below = f32(below + f32(f32(level[i, 0] * level[i, 0]) * weighing[i]))
        refined = np.array([f32(above / below)]).astype(dtype) if below else s
        ends = [kind.absmax(w.copy()), (level, s, z), (kind.nearest(w, refined, z), refined, z)]
        if scheme.codes == "symmetric":
            ends.insert(1, kind.signed(w.copy()))
        losses = [loss(w, level, s, weighing, True) for level, s, z in ends]
        level, s, z = ends[int(np.argmin(losses))]
        assert arrays[1][row, group] == s[0]
        decoded[row, part] = level[:, 0] * f32(s[0])
    assert np.array_equal(decode(arrays, scheme, k, layout="NK"), decoded[:, :k].astype(dtype))


@packing
@rules
def test_zeros_and_the_smallest_numbers(scheme: QuantScheme, rule: Scales) -> None:
    """Zero groups stay zero, scales are never -0.0, and padding is weight 0."""
    k = 2 * (scheme.group_size or 64) + 1
    weight = np.zeros((3, k), np.float32)
    weight[1] = -0.0
    weight[2] = -float(ml_dtypes.finfo(numpy_dtype(scheme.model_dtype)).smallest_subnormal)
    arrays = encode(weight, scheme, scales=rule)
    decoded = decode(arrays, scheme, k).astype(np.float64)
    assert (decoded[:2] == 0).all() and np.abs(decoded[2]).max() <= 8 * np.abs(weight[2]).max()
    assert not np.signbit(arrays[1][arrays[1] == 0].astype(np.float32)).any()


@packing
@rules
@pytest.mark.parametrize("source", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_not_finite_and_too_large_are_refused(
    scheme: QuantScheme, rule: Scales, source: type
) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        weight = np.zeros((3, 64), source)
        weight[1, 7] = bad
        with pytest.raises(InputError, match=r"'a\.weight' holds a value that is not finite"):
            encode(weight, scheme, scales=rule, name="a.weight")
    if scheme.model_dtype == "float16" and source != np.float16:
        weight[1, 7] = 1e5
        with pytest.raises(InputError, match=r"'a\.weight' holds .* overflows float16"):
            encode(weight, scheme, scales=rule, name="a.weight")


@packing
@rules
def test_the_largest_numbers_stay_finite(scheme: QuantScheme, rule: Scales) -> None:
    largest = float(ml_dtypes.finfo(numpy_dtype(scheme.model_dtype)).max)
    weight = np.linspace(-largest / 2, largest / 2, 256).reshape(2, 128).astype(np.float32)
    arrays = encode(weight, scheme, scales=rule)
    decoded = decode(arrays, scheme, 128).astype(np.float64)
    assert np.isfinite(arrays[1].astype(np.float64)).all() and np.isfinite(decoded).all()
    assert np.abs(decoded - weight).max() < 0.3 * largest


@packing
@rules
def test_the_best_weights_for_stored_scales(scheme: QuantScheme, rule: Scales) -> None:
    """`nearest` is never further away than what is stored, and hardly nearer."""
    weight = weights(30, 150)
    arrays = encode(weight, scheme, scales=rule)
    exact = narrow(weight, scheme.model_dtype).astype(np.float64)
    best = np.abs(nearest(weight, arrays, scheme).astype(np.float64) - exact)
    stored = np.abs(decode(arrays, scheme, 150).astype(np.float64) - exact)
    # 8 bits in float16: quotients near 254 are apart by 0.125, so codes near halves miss.
    assert best.sum() <= stored.sum() <= 1.02 * best.sum()


def test_a_tensor_on_an_affine_grid_is_reproduced() -> None:
    """What AWQ stores, with all codes from 0 to 15 in use; fewer codes too by the search."""
    scheme = SCHEMES["q4f16_awq"]
    rng = np.random.default_rng(0)
    zero = rng.integers(0, 16, (40, 2, 1))
    scale = np.float16(2.0 ** rng.uniform(-9, -3, (40, 2, 1)))
    q = rng.integers(0, 16, (40, 2, 128))
    q[..., :2] = 0, 15
    on_grid = ((q - zero) * scale.astype(np.float64)).astype(np.float32).reshape(40, 256)
    exact = on_grid.astype(np.float16)
    kept = zero[..., 0] % 15 != 0  # with 0 inside the range
    for rule in ("absmax", "mse"):
        found = decode(encode(on_grid, scheme, scales=rule), scheme, 256)
        same = (found == exact).reshape(40, 2, 128).all(axis=-1)
        assert same[kept].mean() > 0.9
    narrowed = np.clip(q, 1, 14)
    on_grid = ((narrowed - zero) * scale.astype(np.float64)).astype(np.float32).reshape(40, 256)
    found = decode(encode(on_grid, scheme, scales="mse"), scheme, 256)
    same = (found == on_grid.astype(np.float16)).reshape(40, 2, 128).all(axis=-1)
    inside = ((zero > 1) & (zero < 14))[..., 0]
    assert same[inside].mean() > 0.9


def test_e4m3_is_the_nearest_float8() -> None:
    """Against all finite float8 numbers, between them, at ties and beyond them."""
    scheme = SCHEMES["e4m3f32_1"]
    table = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    numbers = np.unique(table[np.isfinite(table)])
    assert numbers[-1] == 448 and numbers.size == 253
    middles = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, middles, middles * (1 + 2.0**-20), middles * (1 - 2.0**-20)])
    x = np.concatenate([x, [500.0, -1e30, 2.0**-40, -(2.0**-40)]]).astype(np.float32)
    ones = np.ones(x.size, np.float32)
    level = E4M3(scheme).nearest(x.copy(), ones, None)
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(level, expected.astype(np.float32))
    codes = E4M3(scheme).codes(level, None)
    assert np.array_equal(codes, expected.view(np.uint8)) and not (codes & 0x7F == 0x7F).any()
    assert np.array_equal(E4M3(scheme).read(codes, None), level)


def test_zero_points_are_packed_along_the_groups() -> None:
    scheme = SCHEMES["q4f16_awq"]
    zeros = np.random.default_rng(0).integers(0, 16, (3, 11), dtype=np.uint32)
    words = pack_zeros(zeros, scheme)
    assert words.shape == (3, 2) == (3, scheme.num_zero_words(11 * 128))
    assert int(words[1, 0]) == sum(int(z) << (4 * i) for i, z in enumerate(zeros[1, :8]))
    assert (words[:, 1] >> np.uint32(12) == 0).all()
    assert np.array_equal(unpack_zeros(words, scheme, 11), zeros)


def test_a_whole_row_shares_its_scale_per_channel() -> None:
    scheme = SCHEMES["q8f16_pc"]
    weight = weights(5, 77)
    words, scales = encode(weight, scheme)
    assert words.shape == (5, 20) and scales.shape == (5, 1)
    peak = np.abs(weight.astype(np.float16)).max(axis=1).astype(np.float32)
    assert np.array_equal(scales[:, 0], (peak / 127).astype(np.float16))


# Frozen: published parameter files hold such bytes, and every faster path gives them.
GOLDEN = {
    "q3f16_0": ("d71b8d777265", "95d9495b8ef7", "da88903dbc7a"),
    "q3f16_1": ("f30a2b13be80", "62569094b403", "2b19d02ffe7d"),
    "q4f16_0": ("b24e8701aebc", "ac6da4c8eda1", "07405dd3e80f"),
    "q4f16_1": ("80a757724d5e", "da645260566f", "920c5f3c1103"),
    "q4f16_2": ("80a757724d5e", "da645260566f", "920c5f3c1103"),
    "q4f32_1": ("5fc7999b8a0d", "24e91caedd9d", "ba94eeaa5ff1"),
    "q4bf16_0": ("668e33b53cfb", "2971d4b55617", "af1d150f95f6"),
    "q4bf16_1": ("b49c6e08b5b9", "023ff70dca77", "16b3a150f3c0"),
    "q8f16_0": ("23ad2450f708", "34ac829267b5", "7a2c17b990a0"),
    "q8f16_1": ("27ee70bf3106", "0180f9485fac", "6fa7bf1946c1"),
    "q8f32_1": ("0f72b65ec5f8", "64f21a468d79", "ce752d09be9b"),
    "q8f16_pc": ("ea4d44a9fa38", "f6e671291d4a", "8d5ca08142d4"),
    "q8f32_pc": ("e318fa71a5db", "3d6fa7ef6a38", "403a7c2d0048"),
    "q4f16_awq": ("6e1c72e96650", "6e1c72e96650", "edf716928460"),
    "e4m3f16_1": ("ddc5042191d6", "ddc5042191d6", "9a66d830bfbe"),
    "e4m3bf16_1": ("106abe59885f", "106abe59885f", "adc2bcd09bd2"),
    "e4m3f32_1": ("ba2fa11318dc", "ba2fa11318dc", "ce828604be76"),
}


@packing
def test_golden_bytes(scheme: QuantScheme) -> None:
    n = np.arange(7 * 323, dtype=np.int64)
    weight = (((n * n * 2654435761) % 65521 - 32760) / 32768).astype(np.float32).reshape(7, 323)
    weight *= np.float32(2.0) ** np.arange(7, dtype=np.float32)[:, None]
    found = []
    for rule in RULES:
        digest = hashlib.sha256()
        for tensor in encode(weight, scheme, scales=rule):
            digest.update(tensor.tobytes())
        found.append(digest.hexdigest()[:12])
    assert tuple(found) == GOLDEN[scheme.name]
