"""What the formats of quantised checkpoints have in common.

- `section_of` reads a `quantization_config` strictly: each key is used, declared to change nothing,
  or refused with its value.
- `Matrix` is one weight [N, K] that is stored as codes, scales and zero points in other tensors.
- All formats but AutoAWQ pack codes as one dense stream of bits, the first element lowest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mlc_compile.config import ConfigReader
from mlc_compile.errors import InputError
from mlc_compile.quantization.hold import values
from mlc_compile.weights.reader import (
    Array,
    Packed,
    PackedInfo,
    TensorInfo,
    TensorReader,
    numpy_dtype,
)

T = TypeVar("T")

UNQUANTISED = "convert from the unquantised checkpoint"
_AGAIN = "download the checkpoint again"


def section_of(value: Any, where: str) -> ConfigReader:
    """A JSON object of config.json, to be taken key by key; null is as good as absent.

    where: its place in config.json, for messages.
    """
    if not isinstance(value, Mapping):
        raise InputError(f"config.json: {where} is {value!r:.80}, not an object")
    given = {key: item for key, item in value.items() if item is not None}
    return ConfigReader(given, where="config.json", prefix=f"{where}.")


def choice(section: ConfigReader, key: str, *allowed: T, hint: str = UNQUANTISED) -> T:
    """The value of a key that has one of these; the first where it is absent."""
    section.only(key, allowed, hint=hint)
    return next(item for item in allowed if item == section.raw.get(key, allowed[0]))


def unsupported(section: ConfigReader, key: str) -> InputError:
    """The error for a key's value; the caller raises it."""
    problem = f"is {section.raw.get(key)!r:.80}, which is not supported"
    return section.fail(key, problem, hint=UNQUANTISED)


@dataclass(frozen=True)
class Matrix:
    """A weight [N, K] made of other tensors.

    Attributes:
        sources: the tensors it is made of.
        load: rows start to stop of it.
        rounded: the dtype that the format's reference multiplies in.
        column_groups: the group of each column, [K], where they are not in order (GPTQ's
            desc_act); such a weight is dequantised.
    """

    shape: tuple[int, int]
    info: PackedInfo
    sources: tuple[str, ...]
    load: Callable[[int, int], Packed]
    rounded: str
    column_groups: Callable[[], Array] | None = None

    def values(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Dequantised rows [stop - start, K], as the reference gives them."""
        packed, info = self.load(start, stop), self.info
        if self.column_groups is not None:
            groups = self.column_groups()
            zeros = None if packed.zeros is None else packed.zeros[:, groups]
            packed = Packed(packed.codes, packed.scales[:, groups], zeros)
            info = PackedInfo(info.codes, info.bits, 1, info.scale_dtype, info.symmetric_zero)
        product = values(packed, info)
        if self.rounded == "float32":
            return product
        with np.errstate(over="ignore", invalid="ignore"):  # the conversion refuses those
            return product.astype(numpy_dtype(self.rounded)).astype(np.float32)


@dataclass
class Layers:
    """The matrices of a checkpoint, by the name of the weight that they are.

    Attributes:
        dropped: tensors that have no use here.
        notes: what is not carried over.
    """

    matrices: dict[str, Matrix] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


class Parts:
    """The tensors of one packed weight: `X.<suffix>` for a module X, checked when asked for."""

    def __init__(self, reader: TensorReader, module: str) -> None:
        self.reader = reader
        self.module = module

    def has(self, suffix: str) -> bool:
        return f"{self.module}.{suffix}" in self.reader.tensors

    def info(self, suffix: str, dtypes: tuple[str, ...], rank: int = 2) -> TensorInfo:
        """The tensor; InputError if it is missing, has another dtype or number of axes."""
        name = f"{self.module}.{suffix}"
        if not self.has(suffix):
            raise InputError(f"the packed weight of {self.module} lacks {name}", hint=_AGAIN)
        info = self.reader.tensors[name]
        if info.dtype not in dtypes or len(info.shape) != rank:
            raise InputError(
                f"{name} is {info.dtype} {list(info.shape)}, expected {rank} axes of "
                f"{' or '.join(dtypes)}",
                hint=UNQUANTISED,
            )
        return info

    def check(self, suffix: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        """InputError unless a shape is the one that the others make."""
        if found != expected:
            raise InputError(
                f"{self.module}.{suffix} is {list(found)}, the other tensors and "
                f"quantization_config make it {list(expected)}",
                hint=_AGAIN,
            )

    def read(self, suffix: str, rows: slice | None = None) -> Array:
        return self.reader.read(f"{self.module}.{suffix}", rows)


def modules_with(tensors: Mapping[str, Any], suffix: str) -> list[str]:
    """The modules X that have a tensor `X.<suffix>`."""
    end = f".{suffix}"
    return [name.removesuffix(end) for name in tensors if name.endswith(end)]


def check_listed(modules: list[str], listed: tuple[str, ...], key: str) -> None:
    """InputError if a packed module is in the list of those that stay as they are."""
    both = sorted(set(modules) & set(listed))
    if both:
        raise InputError(
            f"config.json: quantization_config.{key} lists {both[0]}, which is packed",
            hint="config.json belongs to another checkpoint, or this one is damaged",
        )


def group_size_of(section: ConfigReader, default: int | None = None) -> int:
    """Columns that share a scale; 0 for a whole row, which these formats write as -1."""
    key = "group_size"
    if default is None:
        size = section.integer(key, low=-1, high=1 << 20)
    else:
        size = section.integer(key, default=default, low=-1, high=1 << 20)
    if size == 0:
        raise unsupported(section, key)
    return 0 if size == -1 else size


def group_count(k: int, size: int) -> int:
    """Groups of a row of k columns."""
    return -(-k // size) if size else 1


def period(bits: int) -> tuple[int, int]:
    """Words and elements after which the stream's elements start at bit 0 of a word again."""
    return (1, 32 // bits) if 32 % bits == 0 else (bits, 32)


def unpack_stream(words: Array, bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Elements of `bits` bits each, element i at bit i * bits of the words along axis 0.

    words: int32 [w, n] of any strides. Returns uint8 [count, n].
    """
    per, elements = period(bits)
    words = words.view(np.uint32)
    whole = -(-len(words) // per) * per
    if whole != len(words):
        words = np.pad(words, ((0, whole - len(words)), (0, 0)))
    mask = np.uint32((1 << bits) - 1)
    found = np.empty((whole // per * elements, words.shape[1]), np.uint8)
    for element in range(elements):
        word, shift = divmod(element * bits, 32)
        lane = words[word::per] >> np.uint32(shift)
        if shift + bits > 32:
            lane |= words[word + 1 :: per] << np.uint32(32 - shift)
        found[element::elements] = lane & mask
    return found[:count]


def unpack_columns(words: Array, bits: int, start: int, stop: int) -> npt.NDArray[np.uint8]:
    """Elements start to stop of each row of words: int32 [m, w] -> uint8 [stop - start, m]."""
    per, elements = period(bits)
    first, last = start // elements, -(-stop // elements)
    part = words[:, first * per : last * per].T
    found = unpack_stream(part, bits, (last - first) * elements)
    return found[start - first * elements : stop - first * elements]
