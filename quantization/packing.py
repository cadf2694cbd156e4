"""Packing of small unsigned integers into 32-bit words, first element in the lowest bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]


def pack(fields: npt.NDArray[Any], bits: int, axis: int = -1) -> Words:
    """Packs `32 // bits` neighbours along `axis` into one word.

    fields: unsigned integers below 2**bits; `axis` must be a multiple of `32 // bits` long.
    Returns uint32 of the same shape, except that `axis` is `32 // bits` times shorter.
    """
    per_word = 32 // bits
    axis %= fields.ndim
    shape = fields.shape
    if shape[axis] % per_word:
        raise ValueError(f"axis of {shape[axis]} elements does not fill words of {per_word}")
    split = fields.reshape(*shape[:axis], shape[axis] // per_word, per_word, *shape[axis + 1 :])
    lanes = np.moveaxis(split, axis + 1, 0)
    words: Words = lanes[0].astype(np.uint32)
    for lane in range(1, per_word):
        words |= np.left_shift(lanes[lane], np.uint32(lane * bits), dtype=np.uint32)
    return words


def unpack(words: Words, bits: int) -> Words:
    """Undoes `pack` along the last axis: uint32 [..., w] -> uint32 [..., w * (32 // bits)]."""
    shifts = np.arange(32 // bits, dtype=np.uint32) * np.uint32(bits)
    fields = (words[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return fields.reshape(*words.shape[:-1], -1)
