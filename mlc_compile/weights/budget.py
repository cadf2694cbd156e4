"""How much memory a conversion takes, and the shape of its work that keeps a promise.

The peak of resident memory is

    what the process holds before it starts (measured)
    + workers x the largest work item (its rows of the source, packed rows, temporaries)
    + source pages that wait to be given back + a fixed rest.

The results do not depend on any of these numbers.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass

from mlc_compile.errors import InputError
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.parts import parts_in
from mlc_compile.weights.plan import ConversionPlan
from mlc_compile.weights.work import (
    BLOCK_ELEMENTS,
    CHUNK_ELEMENTS,
    row_length,
    row_step,
    source_itemsize,
)

_MIB = 1 << 20
# Per element of a block: copies of the rows as float32, packed rows, whole-block temporaries.
_BYTES_PER_ELEMENT = 16
_DECODED_BYTES = 16  # besides, for each element that a block format decodes at once
_WORKER = 6 * _MIB  # chunk-sized temporaries, hash buffer, stack
_FIXED = 24 * _MIB  # journal, plan, allocator
_COMPILER = 256 * _MIB  # TVM, where kernels are not there yet
_REMOTE_CACHE = 64 * _MIB  # of a source behind a URL (remote.py), and in flight a worker
_REMOTE_WORKER = 16 * _MIB
_MAPPED = 64 * _MIB  # source pages between two releases, where memory allows
_LEAST_MAPPED = 8 * _MIB


@dataclass(frozen=True)
class Budget:
    """How a conversion works.

    Attributes:
        workers: items in work at once.
        block_elements: of a work item.
        mapped: bytes of source pages after which they are released.
        peak: the resident memory it may reach, in bytes.
    """

    workers: int
    block_elements: int
    mapped: int
    peak: int


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def plan_budget(
    plan: ConversionPlan,
    checkpoint: Checkpoint,
    jobs: int,
    max_ram: int | None,
    *,
    compiled: bool = False,
) -> Budget:
    """The most workers, up to `jobs`, and the largest blocks that keep to `max_ram` bytes.

    compiled: kernels may have to be built, for which TVM is imported.
    Raises InputError when not even one small item fits.
    """
    base = resident()
    fixed = base + _FIXED + (_COMPILER if compiled and "tvm" not in sys.modules else 0)
    remote = sum(source.path is None for source in checkpoint.sources)
    fixed += min(remote, 1) * _REMOTE_CACHE
    worker = _WORKER + min(remote, 1) * _REMOTE_WORKER
    sizes = [BLOCK_ELEMENTS]
    while sizes[-1] > CHUNK_ELEMENTS:
        sizes.append(sizes[-1] // 2)
    items = {size: _largest_item(plan, checkpoint, size) + worker for size in sizes}
    if max_ram is None:
        peak = fixed + jobs * items[sizes[0]] + _MAPPED
        return Budget(jobs, sizes[0], _MAPPED, peak)
    least = max(fixed + items[sizes[-1]] + _LEAST_MAPPED, peak_resident())
    if max_ram < least:
        raise InputError(
            f"--max-ram {max_ram / _MIB:.0f}MiB is too small: this process holds "
            f"{base / _MIB:.0f} MiB before it starts and one work item takes "
            f"{items[sizes[-1]] / _MIB:.0f} MiB",
            hint=f"the smallest that works is --max-ram {math.ceil(least / _MIB) + 1}MiB",
        )
    room = max_ram - fixed
    # Smaller blocks cost little until an eighth of the usual size; fewer workers cost much.
    for workers in range(jobs, 0, -1):
        for size in sizes if workers == 1 else sizes[:4]:
            mapped = min(_MAPPED, room - workers * items[size])
            if mapped >= _LEAST_MAPPED:
                peak = fixed + workers * items[size] + mapped
                return Budget(workers, size, mapped, peak)
    raise AssertionError("one worker with the smallest block fits")


def _largest_item(plan: ConversionPlan, checkpoint: Checkpoint, elements: int) -> int:
    """Bytes of the largest block of about so many elements."""
    largest = 0
    for param in plan.params:
        shapes = {name: checkpoint.tensors[name].shape for name in param.spec.sources}
        for part in parts_in(param.spec, shapes):
            length = row_length(part)
            rows = min(part.num_rows, row_step(part, elements))
            block = rows * length
            touched = part.touched(slice(0, rows))
            if part.source.rows is not None and not part.source.transposed:
                heads = part.source.rows  # other heads' rows lie between those that are taken
                touched = min(heads.source_rows, rows * heads.per_group) * length
            size = source_itemsize(checkpoint, part)
            if _is_decoded(checkpoint, part.source.name):
                # Experts come one by one, other tensors by rows, but transposed ones as a whole.
                touched = max(touched, math.prod(part.shape[1:]) if len(part.shape) == 3 else 0)
                size += _DECODED_BYTES
            item = touched * size + block * _BYTES_PER_ELEMENT
            if part.source.name in checkpoint.reader.packed:
                # Codes that are packed along the rows are read as a whole.
                item += math.prod(part.shape) + block * _DECODED_BYTES
            largest = max(largest, item)
    return largest


def _is_decoded(checkpoint: Checkpoint, name: str) -> bool:
    """Whether reading makes an array of its own, rather than a view of the mapped file."""
    return checkpoint.tensors[name].dtype not in ("float16", "bfloat16", "float32", "float64")


def resident() -> int:
    """Bytes of this process's memory that are resident now."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def peak_resident() -> int:
    """The most that was resident so far."""
    try:
        # Not ru_maxrss: on Linux that starts with what the parent held when it forked.
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows: the interpreter and the imports, roughly
        return 64 * _MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
