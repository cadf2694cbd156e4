"""Attention of many rows on the matrix units: what calls cuh/attention_prefill*.cuh.

- For float16 and bfloat16 caches; sliding windows, trees and float32 are the portable kernels'
  business. Windows of layers and bounded scores are served, but not by Hopper's tile.
- Three kinds of tiles: within the shared memory of sm_75, for sm_80 and later, and for Hopper's
  warpgroup products. A library holds what its devices need, and its host code chooses.
- A few rows against many cached keys are too few tiles for a GPU: then several blocks share a tile,
  each with a part of the keys, and a second launch merges the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels._attn_math import LOG2_E
from mlc_compile.targets.cuda_kernels._arch import CudaArchs, compute_capability
from mlc_compile.targets.cuda_kernels._launch import device_call
from mlc_compile.targets.cuda_kernels.attention_decode import Bounds
from mlc_compile.targets.gpu_kernels import _attention_ir as ir
from mlc_compile.targets.gpu_kernels._attention_prefill import ARGUMENTS
from mlc_compile.targets.gpu_kernels._emit import Expr, bind, f32, i32
from mlc_compile.targets.kv_cache import KVCacheSpec

TYPES = {"float16": "half", "bfloat16": "nv_bfloat16"}
LARGEST_HEAD = 256
AMPERE, HOPPER = 80, 90
HOPPER_HEADS = (64, 128)
"""Head sizes of whole 128-byte rows whose output fits the registers of a warpgroup."""

FULL_TILE = 128
"""Rows of the larger tiles."""
FULL_GPU = 256
"""Blocks of such tiles that keep a large GPU busy: keys are cut in parts to have as many."""
MAX_PARTS = 16
PART_PAGES = 16
"""Pages of a part, at least: with fewer the merge would cost more than the parts save."""
MERGE_WARPS = 4


@dataclass(frozen=True)
class Tile:
    """The shape of a block's work, and the device function that does it.

    Attributes:
        rows: query rows; a row is one query head of one token.
        shape: the function's template arguments after the numbers of the cache.
        threads: of a block.
        shared_bytes: of a block.
    """

    header: str
    suffix: str
    rows: int
    shape: str
    threads: int
    shared_bytes: int


def _mma(head_dim: int, row_blocks: int, keys: int, devices: str) -> Tile:
    """Four warps of `row_blocks` times 16 rows; one such block stays in registers."""
    rows = 64 * row_blocks
    shared = 2 * (2 * keys + (rows if row_blocks > 1 else 0)) * (head_dim + 8)
    shape = f"4, {row_blocks}, {keys}, mlc::attention::Devices::{devices}"
    return Tile("attention_prefill.cuh", "", rows, shape, 128, shared)


def _wgmma(head_dim: int, warpgroups: int, keys: int, *, copiers: bool) -> Tile:
    """Warpgroups of 64 rows, and one more that copies; keys and values have two places each,
    aligned to 1024 bytes, the queries one."""
    rows, threads = 64 * warpgroups, 128 * (warpgroups + copiers)
    shared = 2 * (4 * keys * head_dim + rows * (head_dim + 8)) + 1024
    shape = f"{warpgroups}, {keys}, {str(copiers).lower()}"
    return Tile("attention_prefill_sm90.cuh", "_sm90", rows, shape, threads, shared)


def tiles(
    head_dim: int, archs: CudaArchs, *, paged: bool, plain: bool = True
) -> list[tuple[int, Tile]]:
    """(the least capability that runs it, a tile), best first; Hopper's is for it alone, and for
    `plain` scores.

    Which is best was measured (benchmarks/NOTES.md): on Hopper two small blocks on a multiprocessor
    beat a large one while sequences are short, and lose to it where the L2 cache is the limit.
    """
    hopper = plain and HOPPER in archs.archs and head_dim in HOPPER_HEADS
    old, new = archs.minimum < AMPERE, max(archs.archs) >= AMPERE
    found = []
    if hopper:
        many = _wgmma(head_dim, 2, 128, copiers=True)
        few = _wgmma(head_dim, 1, 8192 // head_dim, copiers=False)
        found.append((HOPPER, many if paged and head_dim == 128 else few))
    if new:
        devices = "NewButHopper" if hopper else "New" if old else "All"
        found.append((AMPERE, _mma(head_dim, 2 if head_dim <= 128 else 1, 64, devices)))
    if old:
        keys = 64 if head_dim <= 160 else 32
        found.append((0, _mma(head_dim, 1, keys, "Old" if new else "All")))
    return found


def supports(spec: KVCacheSpec, archs: CudaArchs) -> bool:
    """Whether there are kernels of this cache for all of these devices."""
    if spec.dtype not in TYPES or (spec.dtype == "bfloat16" and archs.minimum < AMPERE):
        return False
    fits = spec.head_dim % 16 == 0 and spec.head_dim <= LARGEST_HEAD
    return fits and spec.sliding_window is None


def prefill(spec: KVCacheSpec, *, paged: bool, archs: CudaArchs) -> tirx.PrimFunc | None:
    """`prefill_paged` or `prefill_ragged` of `KVCacheKernels`; None where it does not support."""
    if not supports(spec, archs):
        return None
    name = f"attn_prefill_{'paged' if paged else 'ragged'}"
    heads, group, d = spec.num_kv_heads, spec.group_size, spec.head_dim

    def view(cells: ir.Cells) -> Expr:
        """Where an int32 array begins: it may be a view into a larger one."""
        return T.address_of(cells.buffer[i32(0)])

    def body(a: SimpleNamespace) -> None:
        if paged:
            keys = [a.pages.buffer, view(a.page_indptr), view(a.page_indices), view(a.length_info)]
        else:
            keys = [a.k.buffer, a.v.buffer, view(a.kv_indptr)]
        batch = a.extent.ends - i32(1)
        rows, causal = a.extent.rows, a.causal > 0
        count = rows * (heads * group)
        scale = a.sm_scale * f32(LOG2_E)
        function = f"prefill_{'paged' if paged else 'ragged'}"
        numbers = f"{TYPES[spec.dtype]}, {d}, {group}, {heads}"
        bounds = Bounds.of(spec, a)
        before = () if bounds is None else bounds.arguments
        if bounds is not None:
            scale, function = bounds.scale * f32(LOG2_E), f"bounded_{function}"
            numbers = ", ".join([*bounds.flags, numbers])

        def attend(out: Any, lse: Any, parts: Expr | None = None) -> None:
            kind = "" if not paged else f", {TYPES[spec.dtype]}" if parts is None else ", float"
            total, tail = [count] if paged else [], [batch, causal, scale]

            def launch(tile: Tile) -> None:
                blocks = (ir.divide(rows * group, tile.rows) + batch) * heads
                device_call(
                    tile.header,
                    f"{function}{tile.suffix}<{numbers}, {tile.shape}{kind}>",
                    [*before, a.q.buffer, view(a.qo_indptr), *keys, out, lse, *total, *tail],
                    threads=tile.threads,
                    grid=[blocks] if parts is None else [blocks, parts],
                    shared_bytes=tile.shared_bytes,
                )

            _choose(tiles(d, archs, paged=paged, plain=bounds is None), None, launch)

        if not paged:
            return attend(a.out.buffer, a.lse.buffer)
        pages = tirx.truncdiv(a.extent.id_count, T.max(batch, 1) * PART_PAGES)
        blocks = T.max(T.max(ir.divide(rows * group, FULL_TILE), batch) * heads, 1)
        parts = bind(T.min(T.min(pages, tirx.truncdiv(i32(FULL_GPU), blocks)), MAX_PARTS))
        # Not a condition on `parts`: TVM would take a size that it is part of for unbounded.
        several = bind(T.Select(parts > 1, i32(1), i32(0)))
        with T.If(several > 0):
            with T.Then():
                sizes = [rows * parts * (heads * group * n) for n in (d, 1)]
                part_out, part_lse = (T.alloc_buffer((n,), "float32", layout=None) for n in sizes)
                attend(part_out, part_lse, parts)
                device_call(
                    "attention_prefill.cuh",
                    f"merge_parts<{TYPES[spec.dtype]}, {d}, {MERGE_WARPS}>",
                    [part_out, part_lse, a.out.buffer, a.lse.buffer, count, parts],
                    threads=32 * MERGE_WARPS,
                    grid=[ir.pieces(count, MERGE_WARPS)],
                )
            with T.Else():
                attend(a.out.buffer, a.lse.buffer)

    return ir.build(name, spec, ARGUMENTS[name], body)


def _choose(
    tiles: Sequence[tuple[int, Tile]], capability: Expr | None, launch: Callable[[Tile], None]
) -> None:
    """Launch the first tile that suits the device's capability, which is asked for if need be."""
    (least, tile), *others = tiles
    if not others:
        return launch(tile)
    capability = compute_capability() if capability is None else capability
    with T.If(capability == HOPPER if least == HOPPER else capability >= i32(least)):
        with T.Then():
            launch(tile)
        with T.Else():
            _choose(others, capability, launch)
