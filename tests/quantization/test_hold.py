"""Packed tensors held by a scheme: the same codes and scales, decoded by the reference."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mlc_compile.errors import InputError
from mlc_compile.quantization.codec import decode
from mlc_compile.quantization.hold import (
    Packed,
    PackedInfo,
    hold,
    holding_schemes,
    holds,
    losses,
    values,
)
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, get_scheme, numpy_dtype

INFOS = {
    "int4 sym g128": PackedInfo("affine", 4, 128, "float16", 8),
    "int4 sym g32": PackedInfo("affine", 4, 32, "float16", 8),
    "int4 sym row": PackedInfo("affine", 4, 0, "float16", 8),
    "int4 asym g128": PackedInfo("affine", 4, 128, "float16"),
    "int4 asym g32": PackedInfo("affine", 4, 32, "float16"),
    "int3 sym row": PackedInfo("affine", 3, 0, "float16", 4),
    "int2 asym g128": PackedInfo("affine", 2, 128, "float16"),
    "int8 sym g32": PackedInfo("affine", 8, 32, "float16", 128),
    "int8 sym row": PackedInfo("affine", 8, 0, "float16", 128),
    "int8 asym row": PackedInfo("affine", 8, 0, "float16"),
    "int5 sym g32": PackedInfo("affine", 5, 32, "float16", 16),
    "int2 sym g256": PackedInfo("affine", 2, 256, "float16", 1),
    "e4m3 g128": PackedInfo("e4m3", 8, 128, "float16"),
    "e4m3 row": PackedInfo("e4m3", 8, 0, "float16"),
}
# What each is held by, float16 schemes alone; layout and model dtype make no difference.
EXPECTED = {
    "int4 sym g128": "q4f16_0 q4f16_1 q4f16_2 q4f16_awq q8f16_0 q8f16_1",
    "int4 sym g32": "q4f16_0 q4f16_1 q4f16_2 q8f16_0 q8f16_1",
    "int4 sym row": "q4f16_0 q4f16_1 q4f16_2 q4f16_awq q8f16_0 q8f16_1 q8f16_pc",
    "int4 asym g128": "q4f16_awq q8f16_0 q8f16_1",
    "int4 asym g32": "q8f16_0 q8f16_1",
    "int3 sym row": "q3f16_0 q3f16_1 q4f16_0 q4f16_1 q4f16_2 q4f16_awq q8f16_0 q8f16_1 q8f16_pc",
    "int2 asym g128": "q4f16_0 q4f16_1 q4f16_2 q4f16_awq q8f16_0 q8f16_1",
    "int8 sym g32": "q8f16_0 q8f16_1",
    "int8 sym row": "q8f16_0 q8f16_1 q8f16_pc",
    "int8 asym row": "",
    "int5 sym g32": "q8f16_0 q8f16_1",
    "int2 sym g256": "q4f16_0 q4f16_1 q4f16_2 q4f16_awq q8f16_0 q8f16_1",
    "e4m3 g128": "e4m3f16_1",
    "e4m3 row": "e4m3f16_1",
}
N = 5


def random(info: PackedInfo, k: int, seed: int = 0) -> Packed:
    """Every code, in groups with either extreme, and a scale of 0."""
    rng = np.random.default_rng(seed)
    groups = -(-k // info.group_size) if info.group_size else 1
    codes = rng.integers(0, 1 << info.bits, (N, k)).astype(np.uint8)
    if info.codes == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0  # not a number
    codes[0] = 0  # the least of all: -8, -128 ...
    codes[1, ::2] = 0
    codes[2] = np.maximum(codes[2], 1)
    scales = rng.uniform(0.001, 0.1, (N, groups)).astype(np.float16)
    scales[3, 0] = 0
    scales[4] *= -1
    zeros = None
    if info.codes == "affine" and info.symmetric_zero is None:
        zeros = rng.integers(0, 1 << info.bits, (N, groups)).astype(np.uint8)
    return Packed(codes, scales.astype(np.float32), zeros)


HELD = [(name, scheme) for name, held in EXPECTED.items() for scheme in held.split()]


def test_what_each_kind_is_held_by() -> None:
    assert set(EXPECTED) == set(INFOS)
    for name, info in INFOS.items():
        found = [
            scheme.name
            for scheme in SCHEMES.values()
            if scheme.model_dtype == "float16" and holds(info, scheme)
        ]
        assert sorted(found) == sorted(EXPECTED[name].split()), name
        for scheme in SCHEMES.values():
            if not holds(info, scheme):
                assert hold(random(info, 256), info, scheme) is None


@pytest.mark.parametrize(("name", "scheme_name"), HELD)
def test_held_codes_decode_to_the_same_numbers(name: str, scheme_name: str) -> None:
    info, scheme = INFOS[name], get_scheme(scheme_name)
    for k in (256, 96, 201, 8):
        packed = random(info, k)
        arrays = hold(packed, info, scheme)
        assert arrays is not None
        found = decode(arrays, scheme, k)
        exact = values(packed, info)  # codes of 8 bits times 11: exact in float32
        np.testing.assert_array_equal(found, exact.astype(numpy_dtype(scheme.model_dtype)))
        width = scheme.num_groups(k) * scheme.group_of(k)
        assert not decode(arrays, scheme, width)[:, k:].any()  # padding stands for 0
        swapped = hold(packed, info, scheme, layout="NK")
        assert swapped is not None
        same = scheme.layout == "NK" or info.codes != "affine"
        expected = arrays if same else tuple(array.T for array in arrays)
        for one, other in zip(swapped, expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_rows_are_independent() -> None:
    """Blocks of rows give what the whole gives: the result can't depend on jobs."""
    for name, scheme_name in HELD:
        info, scheme = INFOS[name], get_scheme(scheme_name)
        packed = random(info, 128)
        whole = hold(packed, info, scheme, layout="NK")
        for row, one in ((row, slice(row, row + 1)) for row in range(N)):
            zeros = None if packed.zeros is None else packed.zeros[one]
            part = hold(
                Packed(packed.codes[one], packed.scales[one], zeros), info, scheme, layout="NK"
            )
            assert whole is not None
            assert part is not None
            for mine, all_rows in zip(part, whole, strict=True):
                np.testing.assert_array_equal(mine[0], all_rows[row])


def test_values_are_the_definition() -> None:
    for info in INFOS.values():
        packed = random(info, 200)
        found = values(packed, info)
        for n, k in product(range(N), (0, 31, 32, 127, 128, 199)):
            group = k // info.group_size if info.group_size else 0
            code = packed.codes[n, k]
            if info.codes == "e4m3":
                number = float(code.view(ml_dtypes.float8_e4m3fn))
            else:
                zeros, middle = packed.zeros, info.symmetric_zero
                number = int(code) - (
                    int(zeros[n, group]) if zeros is not None else int(middle or 0)
                )
            assert found[n, k] == np.float32(number) * packed.scales[n, group]


def test_scales_are_rounded_and_that_is_said() -> None:
    info = PackedInfo("e4m3", 8, 128, "float32")
    packed = random(info, 128)
    fine = Packed(packed.codes, packed.scales * np.float32(1.0001))
    scheme = get_scheme("e4m3f16_1")
    arrays = hold(fine, info, scheme)
    assert arrays is not None
    np.testing.assert_array_equal(arrays[1], fine.scales.astype(np.float16))
    (said,) = losses([(info, scheme)])
    assert "float32 scales are rounded to float16" in said
    assert losses([(info, get_scheme("e4m3f32_1"))]) == ()


def test_losses_count_and_name_the_scheme_that_keeps_all() -> None:
    awq = INFOS["int4 asym g128"]
    said = losses([(awq, get_scheme("q4f16_1"))] * 3 + [(awq, get_scheme("q4f16_awq"))])
    assert len(said) == 1
    assert "3 weights of 4-bit codes, groups of 128, zero points" in said[0]
    assert "q4f16_1" in said[0]
    assert "q4f16_awq keeps them as they are" in said[0]
    (said_none,) = losses([(INFOS["int8 asym row"], get_scheme("q8f16_1"))])
    assert "no scheme keeps them" in said_none
    assert losses([(awq, get_scheme("q0f16"))]) == ()  # dequantised, as was asked


def test_the_smallest_scheme_is_named_first() -> None:
    first = {name: (*holding_schemes(info), None)[0] for name, info in INFOS.items()}
    assert first["int4 sym g32"] == "q4f16_1"
    assert first["int4 asym g128"] == "q4f16_awq"
    assert first["int8 sym g32"] == "q8f16_1"
    assert first["int8 sym row"] == "q8f16_pc"
    assert first["e4m3 g128"] == "e4m3f16_1"
    assert first["int8 asym row"] is None


@pytest.mark.parametrize("scheme_name", ["q8f16_1", "q8f16_pc"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 7e4, 600.0])
def test_numbers_out_of_range_are_refused(bad: float, scheme_name: str) -> None:
    info, scheme = INFOS["int8 sym row"], get_scheme(scheme_name)
    packed = random(info, 64)
    scales = packed.scales.copy()
    scales[0] = bad  # 600 times -128 is more than a float16 holds, 600 is not
    with pytest.raises(InputError, match="tensor 'x' holds a value"):
        hold(Packed(packed.codes, scales), info, scheme, name="x")
    small = np.full_like(packed.codes, 129)
    if bad == 600.0:
        assert hold(Packed(small, scales), info, scheme, name="x") is not None


def test_e4m3_codes_that_are_no_number_are_refused() -> None:
    info, scheme = INFOS["e4m3 g128"], get_scheme("e4m3f16_1")
    packed = random(info, 128)
    packed.codes[2, 7] = 0xFF
    with pytest.raises(InputError, match="not finite"):
        hold(packed, info, scheme, name="x")


def test_every_scheme_of_one_model_dtype_holds_alike() -> None:
    """Only bits, groups and codes decide."""

    def kind(scheme: QuantScheme) -> tuple[object, ...]:
        return scheme.bits, scheme.group_size, scheme.codes

    for info in INFOS.values():
        found: dict[tuple[object, ...], bool] = {}
        for scheme in SCHEMES.values():
            assert found.setdefault(kind(scheme), holds(info, scheme)) == holds(info, scheme)


def test_the_documented_table_is_what_is_held() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "sources.md").read_text("utf-8")
    rows = re.findall(
        r"^\| (.*?) \| (int|e4m3)(\d?) \| (\d+|row) \| (\d+|own|-) \| (.*?) \|", text, re.M
    )
    assert len(rows) >= 10
    for what, codes, bits, group, zero, held in rows:
        info = PackedInfo(
            "e4m3" if codes == "e4m3" else "affine",
            int(bits) if codes != "e4m3" else 8,
            0 if group == "row" else int(group),
            "float16",
            int(zero) if zero.isdecimal() else None,
        )
        named = {name for name in re.findall(r"`(.*?)`", held)}
        found = {
            name
            for name in holding_schemes(info)
            if SCHEMES[name].model_dtype == "float16" and SCHEMES[name].layout == "NK"
        }
        assert named == found - {"q4f16_2"}, what
