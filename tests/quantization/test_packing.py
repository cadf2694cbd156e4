"""Packing against arithmetic on Python integers."""

from __future__ import annotations

import numpy as np
import pytest

from mlc_compile.quantization.packing import pack, unpack

BITS = [3, 4, 8]


def fields_of(bits: int, rows: int, words: int) -> np.ndarray:
    rng = np.random.default_rng(bits)
    return rng.integers(0, 1 << bits, (rows, words * (32 // bits)), dtype=np.uint32)


@pytest.mark.parametrize("bits", BITS)
def test_first_element_is_lowest(bits: int) -> None:
    per_word = 32 // bits
    fields = fields_of(bits, 3, 5)
    words = pack(fields, bits)
    assert words.dtype == np.uint32
    for row in range(3):
        for word in range(5):
            lane = fields[row, word * per_word : (word + 1) * per_word]
            assert int(words[row, word]) == sum(int(q) << (r * bits) for r, q in enumerate(lane))


@pytest.mark.parametrize("bits", BITS)
def test_unpack_undoes_pack(bits: int) -> None:
    fields = fields_of(bits, 4, 6)
    np.testing.assert_array_equal(unpack(pack(fields, bits), bits), fields)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32])
def test_axis_and_dtype_do_not_matter(bits: int, dtype: type) -> None:
    fields = fields_of(bits, 4, 6)
    down = pack(np.ascontiguousarray(fields.T).astype(dtype).astype(np.uint32), bits, axis=0)
    np.testing.assert_array_equal(down.T, pack(fields.astype(dtype).astype(np.uint32), bits))


def test_part_of_a_word_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fill"):
        pack(np.zeros((1, 12), np.uint32), 4)
