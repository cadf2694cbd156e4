"""GGUF block types that are integers times one scale: read as codes instead of numbers.

The other types are not: those with a minimum (Q4_1, Q2_K, Q4_K ...) have a floating offset, and
those with scales of scales (Q3_K, Q6_K, IQ*) have a scale of more digits than a float16, for fewer
elements than any of our groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mlc_compile.weights.gguf_file import dequantize, ggml_types
from mlc_compile.weights.reader import Array, Packed, PackedInfo


@dataclass(frozen=True)
class _Block:
    """A block type: where its scale lies, and the bytes of a scale of 1."""

    info: PackedInfo
    scale: slice
    one: bytes


def _block(bits: int, size: int, zero: int, *, last: bool = False) -> _Block:
    """A type with a float16 scale, first or last in the block."""
    where = slice(-2, None) if last else slice(0, 2)
    return _Block(PackedInfo("affine", bits, size, "float16", zero), where, b"\x00\x3c")


_BLOCKS: Mapping[str, _Block] = MappingProxyType(
    {
        "Q4_0": _block(4, 32, 8),
        "Q5_0": _block(5, 32, 16),
        "Q8_0": _block(8, 32, 128),
        "IQ4_NL": _block(8, 32, 128),  # a table of 16 integers, -127 to 113
        "TQ1_0": _block(2, 256, 1, last=True),
        "TQ2_0": _block(2, 256, 1, last=True),
        # Twice the e2m1 numbers, -12 to 12, times half the power of two that is stored.
        "MXFP4": _Block(
            PackedInfo("affine", 5, 32, "float8_e8m0fnu", 12), slice(0, 1), bytes([128])
        ),
    }
)


def packed_info(type_name: str) -> PackedInfo | None:
    """What is known of a matrix of this block type; None where it can't be read as codes."""
    block = _BLOCKS.get(type_name)
    return block.info if block else None


def unpack(blocks: Array, type_name: str) -> Packed:
    """Codes and scales of rows of blocks, uint8 [n, bytes].

    A block whose scale is 1 decodes to its integers: what the bits of each type mean stays with
    the reference decoder.
    """
    block = _BLOCKS[type_name]
    elements, size = next(
        (elements, nbytes) for name, elements, nbytes in ggml_types().values() if name == type_name
    )
    n, count = len(blocks), blocks.shape[1] // size
    if n == 0:
        return Packed(np.empty((0, count * elements), np.uint8), np.empty((0, count), np.float32))
    split = blocks.reshape(n, count, size)
    units = split.copy()
    units[..., block.scale] = np.frombuffer(block.one, np.uint8)
    integers = dequantize(units.reshape(blocks.shape), type_name)
    zero = block.info.symmetric_zero or 0
    codes = (integers.astype(np.int16) + np.int16(zero)).astype(np.uint8)
    stored = np.ascontiguousarray(split[..., block.scale])
    if block.info.scale_dtype == "float16":
        scales = stored.view("<f2")[..., 0].astype(np.float32)
    else:
        scales = np.ldexp(np.float32(1), stored[..., 0].astype(np.int32) - 128)
    return Packed(codes, scales)
