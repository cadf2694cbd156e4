"""What a conversion will take, without doing it: exact bytes, and time from a short sample.

The time is an estimate: one block is really read and packed and a few megabytes are really read
and hashed, and the rest is taken to go at the same rates on every core.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlc_compile.weights.budget import Budget
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.packer import Packer, lost
from mlc_compile.weights.plan import ConversionPlan
from mlc_compile.weights.sources import DIGESTS, SourceHash
from mlc_compile.weights.work import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    Block,
    blocks,
    chunk_rows,
    row_length,
)

_SAMPLE = 8 << 20
_SAMPLED_BLOCKS = 3  # of the largest tensor
_START = 0.3  # seconds: imports, the plan, the manifests


@dataclass(frozen=True)
class Estimate:
    """A conversion that was not done.

    Attributes:
        source_bytes: of the tensors that are read.
        seconds: estimated.
    """

    plan: ConversionPlan
    budget: Budget
    source_bytes: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            **self.plan.to_json(),
            "source_bytes": self.source_bytes,
            "estimated_seconds": round(self.seconds, 3),
            "peak_ram_bytes": self.budget.peak,
            "jobs": self.budget.workers,
            "notes": list(self.notes),
        }

    def to_text(self) -> str:
        """The same for people."""
        rate = self.source_bytes / 1e6 / self.seconds
        lines = [
            self.plan.to_text(),
            f"time          about {self.seconds:.1f} s with {self.budget.workers} jobs "
            f"({rate:.0f} MB/s of input; an estimate, from a sample)",
            f"memory        at most {self.budget.peak / (1 << 20):.0f} MiB",
        ]
        return "\n".join([*lines, *(f"note          {note}" for note in self.notes)])


def estimate(
    plan: ConversionPlan,
    checkpoint: Checkpoint,
    packing: Packer,
    budget: Budget,
    *,
    source_hash: SourceHash = "blake3",
) -> Estimate:
    """Times a sample of the work. Raises InputError for values there that cannot be stored."""
    found = list(blocks(plan, checkpoint, BLOCK_ELEMENTS))
    source_bytes = sum(block.source_bytes for block in found)
    largest = max(plan.params, key=lambda param: param.spec.num_elements)
    sample = [block for block in found if block.param is largest][:_SAMPLED_BLOCKS]
    small = next(blocks(plan, checkpoint, CHUNK_ELEMENTS))

    def pack(block: Block) -> None:
        packing.pack(block.param, block.part, block.rows, chunk_rows(block.part))

    pack(small)  # what is done once
    elements = sum(_elements(block) for block in sample)

    def pack_sample() -> None:
        for block in sample:
            pack(block)

    packed = _seconds(pack_sample) / elements
    checkpoint.release()
    data = bytes(_SAMPLE)
    sha256 = _seconds(lambda: hashlib.sha256(data)) / _SAMPLE
    md5 = _seconds(lambda: hashlib.md5(data, usedforsecurity=False)) / _SAMPLE
    written = _seconds(lambda: np.frombuffer(data, np.uint8).copy()) / _SAMPLE
    cores = packed * plan.source_elements
    if source_hash != "none":
        cores += _seconds(lambda: DIGESTS[source_hash](data)) / _SAMPLE * source_bytes
    cores += (sha256 + md5 + written) * plan.total_bytes
    seconds = _START + cores / budget.workers
    return Estimate(plan, budget, source_bytes, seconds, lost(plan, checkpoint))


def _elements(block: Block) -> int:
    rows: int = block.rows.stop - block.rows.start
    return rows * row_length(block.part)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return max(time.perf_counter() - started, 1e-9)
