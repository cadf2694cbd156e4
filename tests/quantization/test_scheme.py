"""The scheme table, as mlc-format.md section 2 states it."""

from __future__ import annotations

import dataclasses

import pytest

from mlc_compile.errors import InputError
from mlc_compile.models.params import ParamSpec
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, get_scheme, numpy_dtype

# name: bits, group, model dtype, layout, embedding, final layer, codes
TABLE = {
    "q0f16": (0, 0, "float16", "NK", True, True),
    "q0bf16": (0, 0, "bfloat16", "NK", True, True),
    "q0f32": (0, 0, "float32", "NK", True, True),
    "q3f16_0": (3, 40, "float16", "KN", True, True),
    "q3f16_1": (3, 40, "float16", "NK", True, True),
    "q4f16_0": (4, 32, "float16", "KN", True, True),
    "q4f16_1": (4, 32, "float16", "NK", True, True),
    "q4f16_2": (4, 32, "float16", "NK", False, False),
    "q4f32_1": (4, 32, "float32", "NK", True, True),
    "q4bf16_0": (4, 32, "bfloat16", "KN", True, True),
    "q4bf16_1": (4, 32, "bfloat16", "NK", True, True),
    "q8f16_0": (8, 32, "float16", "KN", True, True),
    "q8f16_1": (8, 32, "float16", "NK", True, True),
    "q8f32_1": (8, 32, "float32", "NK", True, True),
    "q8f16_pc": (8, 0, "float16", "NK", True, True),
    "q8f32_pc": (8, 0, "float32", "NK", True, True),
    "q4f16_awq": (4, 128, "float16", "NK", False, False, "affine"),
    "e4m3f16_1": (8, 128, "float16", "NK", True, True, "e4m3"),
    "e4m3bf16_1": (8, 128, "bfloat16", "NK", True, True, "e4m3"),
    "e4m3f32_1": (8, 128, "float32", "NK", True, True, "e4m3"),
}


def test_the_table_is_the_published_one() -> None:
    assert {
        name: (
            s.bits,
            s.group_size,
            s.model_dtype,
            s.layout,
            s.quantize_embedding,
            s.quantize_lm_head,
            s.codes,
        )
        for name, s in SCHEMES.items()
    } == {name: row if len(row) == 7 else (*row, "symmetric") for name, row in TABLE.items()}


@pytest.mark.parametrize(
    ("bits", "per_word", "words", "top"), [(3, 10, 4, 3), (4, 8, 4, 7), (8, 4, 8, 127)]
)
def test_derived_numbers(bits: int, per_word: int, words: int, top: int) -> None:
    for scheme in SCHEMES.values():
        if scheme.bits == bits and scheme.group_size in (32, 40):
            derived = (scheme.elems_per_word, scheme.words_per_group, scheme.max_int)
            assert derived == (per_word, words, top)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=str)
def test_every_scheme_is_consistent(scheme: QuantScheme) -> None:
    assert get_scheme(scheme.name) is scheme
    assert scheme.storage_dtype == "uint32"
    assert numpy_dtype(scheme.model_dtype).itemsize == (4 if "f32" in scheme.name else 2)
    assert scheme.of(ParamSpec("x.weight", (4, 4), "linear", ())) is scheme
    kind = "plain" if scheme.is_plain else scheme.codes
    assert scheme.kind == ("per channel" if scheme.name.endswith("_pc") else kind)
    assert scheme.has_zeros == (scheme.codes == "affine")
    if scheme.per_channel:
        assert [scheme.group_of(k) for k in (1, 4, 77)] == [4, 4, 80]
        assert [scheme.num_words(k) for k in (1, 4, 77)] == [1, 1, 20]
        assert {scheme.num_groups(k) for k in (1, 4, 77)} == {1}
    elif scheme.is_plain:
        assert scheme.elems_per_word == scheme.words_per_group == scheme.max_int == 0
    else:
        assert scheme.words_per_group * scheme.elems_per_word == scheme.group_size
        assert scheme.num_groups(scheme.group_size) == 1
        assert scheme.num_groups(scheme.group_size + 1) == 2
        assert scheme.num_words(1) == scheme.words_per_group


def test_unknown_name_says_the_closest() -> None:
    with pytest.raises(InputError, match=r"'q4f16-1'.*q4f16_1"):
        get_scheme("q4f16-1")
    with pytest.raises(InputError, match=r"choose one of q0f32, .*q8f32_1"):
        get_scheme("zzz")


def test_a_group_must_fill_words() -> None:
    with pytest.raises(ValueError, match="whole"):
        dataclasses.replace(SCHEMES["q3f16_1"], group_size=32)


def test_what_has_no_kernels_is_no_scheme() -> None:
    with pytest.raises(ValueError, match="NK only"):
        dataclasses.replace(SCHEMES["q4f16_awq"], layout="KN")
    with pytest.raises(ValueError, match="8 bits"):
        dataclasses.replace(SCHEMES["e4m3f16_1"], bits=4)
