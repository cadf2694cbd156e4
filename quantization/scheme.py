"""Quantisation schemes: one class, many rows of data.

A scheme is either plain (`bits == 0`: every parameter is stored in `model_dtype`) or packs small
codes, groups of which share a scale along K, the last axis of a weight [N, K]. What a code stands
for (`codes`), with s the scale of its group:

    symmetric  (q - M) * s      q an unsigned integer of `bits` bits, M = 2**(bits - 1) - 1
    affine     (q - z) * s      z an unsigned integer of `bits` bits, one for each group
    e4m3       e4m3fn(q) * s    q a byte: a float8 of 4 exponent and 3 mantissa bits, no infinity

The first is mlc-format.md, "Group quant, exact". A new scheme is one more row of `_ROWS`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np

from mlc_compile.errors import InputError
from mlc_compile.models.params import ParamSpec
from mlc_compile.quantization.overrides import Override

Layout = Literal["NK", "KN"]
ModelDtype = Literal["float16", "bfloat16", "float32"]
Label = Literal["stable", "experimental"]
Codes = Literal["symmetric", "affine", "e4m3"]

WORD_BITS = 32


@dataclass(frozen=True)
class QuantScheme:
    """How the weights of one model are stored.

    bits: width of one packed element; 0 stores every weight in `model_dtype`.
    group_size: elements along K (the last axis of a [N, K] weight) that share one scale; 0 gives
        each row one scale ("per channel").
    layout: "NK" keeps a linear weight as [N, words]; "KN" stores it and its scale transposed.
        Embeddings are always "NK".
    quantize_embedding, quantize_lm_head: False leaves that weight in `model_dtype`.
    codes: what an element stands for; see above.
    overrides: parameters that another scheme holds; `of` says which one. The first match counts.
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
    codes: Codes = "symmetric"
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        if self.bits and (self.bits < 2 or self.group_size % self.elems_per_word):
            raise ValueError(f"{self.name}: a group must fill whole {self.storage_dtype} words")
        if self.codes != "symmetric" and self.layout != "NK":
            raise ValueError(f"{self.name}: {self.codes} codes are laid out NK only")
        if self.codes == "e4m3" and self.bits != 8:
            raise ValueError(f"{self.name}: e4m3 codes have 8 bits")

    @property
    def is_plain(self) -> bool:
        """True when nothing is packed (`overrides` apart)."""
        return self.bits == 0

    @property
    def per_channel(self) -> bool:
        """True when each row has one scale."""
        return self.bits > 0 and self.group_size == 0

    @property
    def kind(self) -> str:
        """What a kernel must be able to read: the codes, or "per channel"; "plain" where nothing
        is packed."""
        if self.is_plain:
            return "plain"
        return "per channel" if self.per_channel else self.codes

    @property
    def has_zeros(self) -> bool:
        """True when a third tensor, X.q_zero, holds the zero point of each group."""
        return self.bits > 0 and self.codes == "affine"

    @property
    def elems_per_word(self) -> int:
        """Elements in one word; the top `32 % bits` bits stay 0 (q3: 10 elements, 2 bits)."""
        return WORD_BITS // self.bits if self.bits else 0

    @property
    def words_per_group(self) -> int:
        """Words of one group along K; 0 where it is a whole row, whose length is not the scheme's
        (`num_words`)."""
        return self.group_size // self.elems_per_word if self.bits else 0

    @property
    def max_int(self) -> int:
        """M: symmetric codes 0..2M stand for -M..M, and the last code for M + 1 where it is used:
        plain conversion ("absmax") never does."""
        return (1 << (self.bits - 1)) - 1 if self.bits and self.codes == "symmetric" else 0

    def group_of(self, k: int) -> int:
        """Elements of one group of a row of `k` elements, padding included."""
        if self.group_size or not self.bits:
            return self.group_size
        return -(-k // self.elems_per_word) * self.elems_per_word

    def num_groups(self, k: int) -> int:
        """Groups along an axis of `k` elements; the last one may be padded with weight 0."""
        return -(-k // self.group_size) if self.group_size else 1

    def num_words(self, k: int) -> int:
        """Words along an axis of `k` elements, padded to whole groups."""
        return self.num_groups(k) * self.group_of(k) // self.elems_per_word

    def num_zero_words(self, k: int) -> int:
        """Words of the zero points of a row of `k` elements, packed as elements are; the unused
        elements of the last word are 0."""
        return -(-self.num_groups(k) // self.elems_per_word)

    def of(self, spec: ParamSpec) -> QuantScheme:
        """The scheme that holds this parameter, without overrides: the first override's that
        matches its name, else this one."""
        if not self.overrides:
            return self
        for override in self.overrides:
            if override.matches(spec.name):
                return get_scheme(override.scheme)
        return replace(self, overrides=())

    def overrides_json(self) -> list[list[str]]:
        """[pattern, scheme name] in order, as artefacts record them."""
        return [[override.pattern, override.scheme] for override in self.overrides]

    def __str__(self) -> str:
        more = f" ({', '.join(map(str, self.overrides))})" if self.overrides else ""
        return self.name + more


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
    QuantScheme("q8f16_pc", 8, 0, "float16", label="experimental"),
    QuantScheme("q8f32_pc", 8, 0, "float32", label="experimental"),
    # What AutoAWQ and GPTQ checkpoints hold: they leave the embedding and the head as they are.
    QuantScheme(
        "q4f16_awq",
        4,
        128,
        "float16",
        quantize_embedding=False,
        quantize_lm_head=False,
        label="experimental",
        codes="affine",
    ),
    QuantScheme("e4m3f16_1", 8, 128, "float16", label="experimental", codes="e4m3"),
    QuantScheme("e4m3bf16_1", 8, 128, "bfloat16", label="experimental", codes="e4m3"),
    QuantScheme("e4m3f32_1", 8, 128, "float32", label="experimental", codes="e4m3"),
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
