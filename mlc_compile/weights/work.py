"""The work items of a conversion: blocks of rows of a parameter, each independent of all others.

- A block reads some rows of one tensor, packs them and writes them where they belong, in layout
  "KN" as columns. Blocks of one tensor may be in work on several cores at once.
- How far the stored values are from the source is summed over chunks of rows that depend on the
  tensor's shape alone, and the chunks' sums are added exactly (math.fsum): neither the size of the
  blocks nor their order can be seen in the result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from mlc_compile.quantization.policy import stored_layout
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.packer import Packer, Sums
from mlc_compile.weights.parts import Part, parts_in
from mlc_compile.weights.plan import ConversionPlan, ParamPlan
from mlc_compile.weights.tensor_cache import TensorCacheWriter

Array = npt.NDArray[Any]
CHUNK_ELEMENTS = 1 << 17  # errors are summed over so many
BLOCK_ELEMENTS = 2 << 20  # packed at once, where memory allows


@dataclass(frozen=True)
class Block:
    """Some rows of one part of a parameter.

    Attributes:
        index: its place in the plan.
        rows: of the part.
        first: the row of the parameter that they start at.
        touched: bytes of the source that may become this process's memory.
        source_bytes: its share of the source's bytes.
    """

    index: int
    param: ParamPlan
    part: Part
    rows: slice
    first: int
    touched: int
    source_bytes: int


def row_step(part: Part, elements: int) -> int:
    """Rows of a block of about so many elements, a whole number of chunks."""
    chunk = chunk_rows(part)
    return chunk * max(1, elements // (chunk * row_length(part)))


def chunk_rows(part: Part) -> int:
    """Rows that errors are summed over."""
    return max(1, CHUNK_ELEMENTS // row_length(part))


def row_length(part: Part) -> int:
    """Elements of a row."""
    return 1 if part.vector else max(1, part.matrix[-1])


def source_itemsize(checkpoint: Checkpoint, part: Part) -> int:
    """Bytes that an element takes when it is read: of block types that of float32, decoded."""
    plain = {"float16": 2, "bfloat16": 2, "float64": 8}
    return plain.get(checkpoint.tensors[part.source.name].dtype, 4)


def blocks(plan: ConversionPlan, checkpoint: Checkpoint, elements: int) -> Iterator[Block]:
    """All of a conversion, in blocks of about so many elements."""
    index = 0
    for param in plan.params:
        first = 0
        shapes = {name: checkpoint.tensors[name].shape for name in param.spec.sources}
        for part in parts_in(param.spec, shapes):
            info = checkpoint.tensors[part.source.name]
            size, length = source_itemsize(checkpoint, part), row_length(part)
            whole = max(1, math.prod(info.shape))
            order = part.source.rows.indices() if part.source.rows is not None else None
            for rows in part.blocks(row_step(part, elements) * length):
                touched = part.touched(rows)
                if order is not None and not part.source.transposed:
                    span = order[rows]
                    touched = (int(span.max()) - int(span.min()) + 1) * length
                before, after = (info.nbytes * r * length // whole for r in (rows.start, rows.stop))
                yield Block(
                    index, param, part, rows, first + rows.start, touched * size, after - before
                )
                index += 1
            first += part.num_rows


class Converter:
    """Converts blocks; called by several threads.

    finished: indices of shards that are complete already and are not written to again.
    mapped: bytes of source pages after which they are given back to the system.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        writer: TensorCacheWriter,
        packer: Packer,
        finished: Collection[int],
        mapped: int,
    ) -> None:
        self._checkpoint = checkpoint
        self._writer = writer
        self._packer = packer
        self._finished = finished
        self._mapped = mapped
        self._lock = threading.Lock()
        self._unreleased = 0

    def __call__(self, block: Block) -> Sums:
        """Reads, packs and writes one block. InputError for values that cannot be stored."""
        param = block.param
        step = chunk_rows(block.part)
        arrays, sums = self._packer.pack(param, block.part, block.rows, step)
        layout = stored_layout(param.spec, self._packer.scheme) if len(arrays) > 1 else "NK"
        for stored, array in zip(param.stored, arrays, strict=True):
            if self._writer.shard_of(stored.name) in self._finished:
                continue
            if layout == "KN":
                self._writer.write_columns(stored.name, array.T, block.first)
            else:
                row = stored.nbytes // param.spec.num_rows
                self._writer.write(stored.name, array, block.first * row)
        self._release(block.touched)
        return sums

    def _release(self, touched: int) -> None:
        with self._lock:
            self._unreleased += touched
            if self._unreleased < self._mapped:
                return
            self._unreleased = 0
        self._checkpoint.release()
