"""How a parameter is read from a checkpoint's tensors, and those tensors made of a parameter again.

`ParamSpec.parts` says which rows of which tensors; here they are read in blocks, as [rows, k] or,
of a vector, [elements]. `published` is the inverse, which the reference decoder loads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlc_compile.models.params import HeadRows, ParamSpec, Source, expected_shapes
from mlc_compile.weights.checkpoint import Checkpoint

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Part:
    """One of a parameter's parts, with the shape of its tensor.

    Attributes:
        source: the tensor and what is done with it.
        shape: the tensor's, as it is stored.
        vector: rows are elements, of a tensor of any rank.
    """

    source: Source
    shape: tuple[int, ...]
    vector: bool

    @property
    def matrix(self) -> tuple[int, ...]:
        """The shape after `transposed`; a vector's is flat."""
        if self.vector:
            return (math.prod(self.shape),)
        *outer, n, k = self.shape
        return (*outer, k, n) if self.source.transposed else self.shape

    @property
    def num_rows(self) -> int:
        """The rows that it gives."""
        if self.source.rows is not None:
            return self.source.rows.num_rows
        rows: int = math.prod(self.matrix if self.vector else self.matrix[:-1])
        return rows

    def blocks(self, elements: int) -> Iterator[slice]:
        """Its rows in pieces of about so many elements; none crosses the end of an expert."""
        step = max(1, elements // (1 if self.vector else max(1, self.matrix[-1])))
        together = self.matrix[-2] if len(self.matrix) == 3 else self.num_rows
        for first in range(0, self.num_rows, max(1, together)):
            for start in range(first, first + together, step):
                yield slice(start, min(first + together, start + step))

    def touched(self, rows: slice) -> int:
        """Elements of the file that `read` looks at, or lie in the same pages."""
        if self.source.transposed:
            return math.prod(self.shape[-2:])
        count: int = rows.stop - rows.start
        return count if self.vector else count * self.matrix[-1]

    def read(self, checkpoint: Checkpoint, rows: slice) -> Array:
        """[n, k], or [n] of a vector: one of `blocks`. In float32 where values change."""
        found = self._picked(checkpoint, rows)
        if self.source.add:
            found = found.astype(np.float32) + np.float32(self.source.add)
        if self.source.unit_rows:
            found = found.astype(np.float32)
            length = np.sqrt(np.sum(np.square(found), axis=-1, keepdims=True))
            found = found / np.maximum(length, np.float32(1e-12))
        return found

    def _picked(self, checkpoint: Checkpoint, rows: slice) -> Array:
        name, flip = self.source.name, self.source.transposed
        index = None
        if self.source.rows is not None:
            index = self.source.rows.indices()[rows]
            rows = slice(int(index.min()), int(index.max()) + 1)
        if self.vector:
            found = checkpoint.read(name).reshape(-1)[rows]
        elif len(self.shape) == 3:
            expert, first = divmod(rows.start, self.matrix[-2])
            whole = checkpoint.read(name, slice(expert, expert + 1))[0]
            inside = slice(first, first + rows.stop - rows.start)
            found = whole[:, inside].T if flip else whole[inside]
        elif flip:
            found = checkpoint.read(name)[:, rows].T
        else:
            found = checkpoint.read(name, rows)
        if index is not None and not np.array_equal(index, np.arange(rows.start, rows.stop)):
            found = found[index - rows.start]
        return np.ascontiguousarray(found) if flip else found


def parts_in(spec: ParamSpec, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Part, ...]:
    """A parameter's parts, over tensors of these shapes."""
    vector = len(spec.shape) == 1
    return tuple(Part(part, shapes[part.name], vector) for part in spec.parts)


def read_parameter(spec: ParamSpec, checkpoint: Checkpoint) -> Array:
    """A whole parameter, in the checkpoint's own dtype, or float32 where values change.

    Raises ValueError where the tensors do not give its shape.
    """
    shapes = {name: checkpoint.tensors[name].shape for name in spec.sources}
    # The whole as one block of a tensor; experts one by one.
    found = [
        part.read(checkpoint, rows)
        for part in parts_in(spec, shapes)
        for rows in part.blocks(max(1, math.prod(part.matrix)))
    ]
    whole = found[0] if len(found) == 1 else np.concatenate(found)
    return whole.reshape(spec.shape)


def published(
    specs: tuple[ParamSpec, ...], weights: Mapping[str, Float32]
) -> Iterator[tuple[str, Float32]]:
    """The checkpoint's tensors out of ours, each once, in the layout of `expected_shapes`.

    weights: by the name of their ParamSpec. What can be is a view of them. Vectors are flat.
    Raises ValueError for a weight that does not have its parameter's shape.
    """
    for spec in specs:
        shapes, made = expected_shapes(spec), dict[str, Float32]()
        whole = weights[spec.name]
        if whole.shape != spec.shape:
            raise ValueError(f"{spec.name} is {list(whole.shape)}, not {list(spec.shape)}")
        rows = whole.reshape(-1, *spec.shape[1:][-1:])
        start = 0
        for part in parts_in(spec, shapes):
            stop = start + part.num_rows
            _put(part, rows[start:stop], made)
            start = stop
        yield from made.items()


def _put(part: Part, rows: Float32, made: dict[str, Float32]) -> None:
    """The inverse of `Part.read` for all its rows."""
    source = part.source
    if source.add:
        rows = rows - np.float32(source.add)
    if source.rows is None or _is_all(source.rows):
        whole = rows.reshape(part.matrix)
        made[source.name] = np.swapaxes(whole, -1, -2) if source.transposed else whole
        return
    if source.name not in made:
        made[source.name] = np.empty(part.shape, np.float32)
    target = made[source.name]
    (target.T if source.transposed else target)[source.rows.indices()] = rows


def _is_all(rows: HeadRows) -> bool:
    """Whether these are all rows, in order."""
    return np.array_equal(rows.indices(), np.arange(rows.source_rows))
