"""A parameter of the compiled model, and how it is made of a checkpoint's tensors.

The ways in which published layouts differ from ours are data: which tensors, which of their rows in
which order, transposed or not, and a constant that the checkpoint leaves out. The converter reads
by it, and the reference decoder inverts it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Role: TypeAlias = Literal[
    "embedding", "positions", "linear", "lm_head", "norm", "bias", "router", "expert"
]
"""What quantisation policies go by. "expert" is [experts, out, in]; routers are never packed."""


@dataclass(frozen=True)
class HeadRows:
    """The rows of some heads in a tensor whose axis 0 is [groups, per_group, size].

    Of each group come the heads `first` to `first + count`, in order.

    Attributes:
        pairs: so many of a head's first rows are rotated as neighbours (0, 1), (2, 3) ...; they
            are put as two halves, even rows first, which is what our kernels rotate.
    """

    groups: int
    per_group: int
    size: int
    first: int = 0
    count: int = 1
    pairs: int = 0

    @property
    def num_rows(self) -> int:
        """How many rows are taken."""
        return self.groups * self.count * self.size

    @property
    def source_rows(self) -> int:
        """How many rows the tensor must have."""
        return self.groups * self.per_group * self.size

    def indices(self) -> NDArray[np.int64]:
        """[num_rows]: where each row lies in the tensor."""
        rows = np.arange(self.source_rows).reshape(self.groups, self.per_group, self.size)
        rows = rows[:, self.first : self.first + self.count]
        if self.pairs:
            rotated = rows[..., : self.pairs]
            halves = [rotated[..., 0::2], rotated[..., 1::2], rows[..., self.pairs :]]
            rows = np.concatenate(halves, axis=-1)
        return rows.reshape(-1)


@dataclass(frozen=True)
class Source:
    """A tensor of the checkpoint, or some rows of it.

    Attributes:
        name: the tensor.
        rows: which rows, after `transposed`; None is all, in order.
        transposed: stored [in, out] (GPT-2's Conv1D), taken as [out, in].
        add: what the class adds to the stored values before it uses them (Gemma's norms: 1).
        unit_rows: the class divides each row by its length (Baichuan 2's head).
    """

    name: str
    rows: HeadRows | None = None
    transposed: bool = False
    add: float = 0.0
    unit_rows: bool = False


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the compiled model, unquantised.

    Attributes:
        name: our name, as in tensor-cache.json and `_metadata`.
        shape: linear weights are [out, in], those of experts [experts, out, in].
        role: what quantisation policies go by.
        parts: what it is made of, in order: their rows one after the other. A row is the last
            axis; a vector's rows are its elements. Experts' rows are those of expert 0, then 1 ...
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    parts: tuple[Source, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Rows of the last axis; elements of a vector."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else self.shape[0]

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors it is made of, each once, in order."""
        return tuple(dict.fromkeys(part.name for part in self.parts))


def expected_shapes(spec: ParamSpec) -> dict[str, tuple[int, ...]]:
    """The shape, as stored, that each tensor of a parameter must have; a vector may have any rank.

    Parts that say no rows are whole tensors of equal size; an expert parameter with one part is a
    tensor that holds all experts.
    """
    found = {}
    for part in spec.parts:
        if part.rows is None and len(spec.parts) == 1:
            shape = spec.shape
        else:
            rows = spec.num_rows // len(spec.parts)
            rows = rows if part.rows is None else part.rows.source_rows
            shape = (rows, *spec.shape[1:][-1:])
        if part.transposed:
            shape = (*shape[:-2], shape[-1], shape[-2])
        found[part.name] = shape
    return found


def parts_of(
    modules: tuple[str, ...], suffix: str, *, transposed: bool = False, add: float = 0.0
) -> tuple[Source, ...]:
    """Whole tensors, one after the other."""
    flip = transposed and suffix == "weight"
    return tuple(Source(f"{m}.{suffix}", transposed=flip, add=add) for m in modules)


def linear(
    name: str,
    shape: tuple[int, int],
    modules: tuple[str, ...],
    bias: bool | str,
    *,
    role: Role = "linear",
    transposed: bool = False,
) -> Iterator[ParamSpec]:
    """The weight [out, in] and, where it has one, the bias [out] of a projection."""
    yield ParamSpec(
        f"{name}.weight", shape, role, parts_of(modules, "weight", transposed=transposed)
    )
    if resolved(bias, name):
        yield ParamSpec(f"{name}.bias", shape[:1], "bias", parts_of(modules, "bias"))


def resolved(option: bool | str, name: str) -> bool:
    """An option's value; one that still names a config.json key is a bug."""
    if isinstance(option, str):
        raise ValueError(f"{name}: option {option!r} is not resolved; use load_model")
    return option
