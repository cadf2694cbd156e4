"""Quantisation schemes: one class, many rows of data.

A scheme is either plain (`bits == 0`: every parameter is stored in `model_dtype`) or symmetric
group quantisation (mlc-format.md, "Group quant, exact"). A new scheme is one more row of `_ROWS`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from mlc_compile.errors import InputError

Layout = Literal["NK", "KN"]
ModelDtype = Literal["float16", "bfloat16", "float32"]
Label = Literal["stable", "experimental"]

WORD_BITS = 32


@dataclass(frozen=True)
class QuantScheme:
    """How the weights of one model are stored.

    bits: width of one packed element; 0 stores every weight in `model_dtype`.
    group_size: elements along K (the last axis of a [N, K] weight) that share one scale.
    layout: "NK" keeps a linear weight as [N, words]; "KN" stores it and its scale transposed.
        Embeddings are always "NK".
    quantize_embedding, quantize_lm_head: False leaves that weight in `model_dtype`.
    """

    name: str
    bits: int
    group_size: int
    model_dtype: ModelDtype
    layout: Layout = "NK"
    quantize_embedding: bool = True
    quantize_lm_head: bool = True
    label: Label = "stable"
    storage_dtype: Literal["uint32"] = "uint32"

    def __post_init__(self) -> None:
        if self.bits and (self.bits < 2 or self.group_size % self.elems_per_word):
            raise ValueError(f"{self.name}: a group must fill whole {self.storage_dtype} words")

    @property
    def is_plain(self) -> bool:
        """True when nothing is packed."""
        return self.bits == 0

    @property
    def elems_per_word(self) -> int:
        """Elements in one word; the top `32 % bits` bits stay 0 (q3: 10 elements, 2 bits)."""
        return WORD_BITS // self.bits if self.bits else 0

    @property
    def words_per_group(self) -> int:
        """Words of one group along K."""
        return self.group_size // self.elems_per_word if self.bits else 0

    @property
    def max_int(self) -> int:
        """M: packed values run from 0 to 2M and stand for -M..M (the last code is never used)."""
        return (1 << (self.bits - 1)) - 1 if self.bits else 0

    def num_groups(self, k: int) -> int:
        """Groups along an axis of `k` elements; the last one may be padded with zeros."""
        return -(-k // self.group_size)

    def num_words(self, k: int) -> int:
        """Words along an axis of `k` elements, padded to whole groups."""
        return self.num_groups(k) * self.words_per_group


_DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "uint32": np.dtype("<u4"),
}


def is_stored_dtype(name: str) -> bool:
    """Whether parameter files may hold this dtype."""
    return name in _DTYPES


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type of a stored dtype name ("bfloat16" is the one of ml_dtypes)."""
    return _DTYPES[name]


# bfloat16 is experimental: the web runtime and most mobile GPUs have no bfloat16 arithmetic.
_ROWS = (
    QuantScheme("q0f32", 0, 0, "float32"),
    QuantScheme("q0f16", 0, 0, "float16"),
    QuantScheme("q0bf16", 0, 0, "bfloat16", label="experimental"),
    QuantScheme("q3f16_0", 3, 40, "float16", "KN"),
    QuantScheme("q3f16_1", 3, 40, "float16"),
    QuantScheme("q4f16_0", 4, 32, "float16", "KN"),
    QuantScheme("q4f16_1", 4, 32, "float16"),
    QuantScheme("q4f16_2", 4, 32, "float16", quantize_embedding=False, quantize_lm_head=False),
    QuantScheme("q4f32_1", 4, 32, "float32"),
    QuantScheme("q4bf16_0", 4, 32, "bfloat16", "KN", label="experimental"),
    QuantScheme("q4bf16_1", 4, 32, "bfloat16", label="experimental"),
    QuantScheme("q8f16_0", 8, 32, "float16", "KN"),
    QuantScheme("q8f16_1", 8, 32, "float16"),
    QuantScheme("q8f32_1", 8, 32, "float32"),
)

SCHEMES: dict[str, QuantScheme] = {scheme.name: scheme for scheme in _ROWS}


def get_scheme(name: str) -> QuantScheme:
    """The scheme called `name`.

    Raises InputError with the closest names when there is none.
    """
    if name in SCHEMES:
        return SCHEMES[name]
    close = difflib.get_close_matches(name, SCHEMES, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(SCHEMES)}"
    raise InputError(f"unknown quantisation scheme '{name}'", hint=hint)
