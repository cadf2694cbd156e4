"""Kernels of a paged KV cache around decoding; they call cuh/attention_decode and rope_append.

- Decode cuts sequences into chunks of pages, as many as the page lists' extents (all that the host
  knows) ask for; kernels read the lengths. Chunks' results meet in a workspace of at most
  4 (TARGET_BLOCKS + B u) h (d + 8) bytes, for u units of h query heads that share a KV head.
- Sliding windows are the portable kernels' business, as are bfloat16 on devices without it and
  head sizes that no fragment fits. Pages before the window of a layer are skipped.
- Where every device has dependent launches, a kernel may begin before the one before has ended.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels._launch import device_call
from mlc_compile.targets.gpu_kernels import _attention_ir as ir
from mlc_compile.targets.gpu_kernels._attention_decode import ARGUMENTS
from mlc_compile.targets.gpu_kernels._emit import Expr, bind, f32, i32
from mlc_compile.targets.kv_cache import PAGE_SIZE, KVCacheSpec

TYPES = {"float32": "float", "float16": "half", "bfloat16": "nv_bfloat16"}
LARGEST_HEAD = 256
BFLOAT16 = 80
"""The first architecture with it: for older ones TVM passes it as uint16."""

TARGET_BLOCKS = 132
"""Blocks that share the pages of a batch: one for each multiprocessor of an H100."""
FLOAT32_TARGET_BLOCKS = 2 * TARGET_BLOCKS
"""Blocks of float32 are half as large."""

LEAST_CHUNKS = 16
CHUNK_FLOATS = 1 << 14
"""A sequence has at most as many chunks as have this many floats together, or LEAST_CHUNKS: more
take longer to add up than they save."""

COUNTERS = 16384
"""kDecodeCounters of attention_decode.cuh: sequences times units that may be cut."""
WHOLE = 1 << 24
"""Pages of a chunk that no sequence exceeds."""

THREADS = 128
FEW_ROWS = 16
"""Rows from which `split_rotary` computes a row's sines and cosines once for all heads."""


@dataclass(frozen=True)
class Bounds:
    """What a kernel that bounds scores or keys has more: attention_bounds.cuh.

    Attributes:
        flags: its first template arguments.
        arguments: its first arguments.
        scale: of what it takes for scores, but for log2(e).
    """

    flags: tuple[str, ...]
    arguments: tuple[Expr, ...]
    scale: Expr

    @staticmethod
    def of(spec: KVCacheSpec, a: SimpleNamespace) -> Bounds | None:
        """None where scores are as they are and all earlier keys are seen."""
        cap, window = spec.softcap, spec.layer_window
        if cap is None and window is None:
            return None
        size = T.max(a.sm_scale, f32(0) - a.sm_scale)
        seen = T.Select(a.sm_scale < f32(0), i32(window or 0), i32(0))
        where = (_address(a.q_position), _address(a.k_offset), seen)
        flags = tuple(str(bound is not None).lower() for bound in (cap, window))
        if cap is None:
            return Bounds(flags, (size, *where), size)
        return Bounds(flags, (size * f32(1 / cap), *where), f32(cap))


def supports(spec: KVCacheSpec, archs: CudaArchs) -> bool:
    """Whether these kernels serve a cache of this kind on all of these devices."""
    if spec.sliding_window is not None or spec.head_dim > LARGEST_HEAD:
        return False
    if spec.dtype == "float32":
        return spec.head_dim % 4 == 0
    return spec.head_dim % 16 == 0 and (spec.dtype == "float16" or archs.minimum >= BFLOAT16)


def decode(spec: KVCacheSpec, archs: CudaArchs) -> tirx.PrimFunc | None:
    """`decode` of `KVCacheKernels`; None where these kernels don't serve the cache."""
    if not supports(spec, archs):
        return None
    d, kv_heads, group = spec.head_dim, spec.num_kv_heads, spec.group_size
    if spec.dtype == "float32":
        most, warps, target = 2 if d > 128 else 4, 4, FLOAT32_TARGET_BLOCKS
    else:
        most, warps, target = 4 if d > 128 else 8, 8, TARGET_BLOCKS
    in_kv = -(-group // most)
    heads, units = -(-group // in_kv), kv_heads * in_kv  # decode_heads, decode_units
    most_chunks = max(1, min(target // units, max(LEAST_CHUNKS, CHUNK_FLOATS // (heads * d))))

    def body(a: SimpleNamespace) -> None:
        rows, listed = a.extent.rows, a.extent.id_count
        pages = listed
        if spec.layer_window is not None:
            most_seen = rows * (spec.layer_window // PAGE_SIZE + 2)
            pages = bind(T.Select(a.sm_scale < f32(0), T.min(pages, most_seen), pages))
        share = T.max(tirx.truncdiv(pages + (most_chunks - 1), most_chunks), 2)
        # A page for each warp is done before two blocks would have met.
        share = T.Select(pages <= rows * warps, i32(warps), share)
        share = bind(T.Select(rows * units <= COUNTERS, share, i32(WHOLE)))
        alone = T.max(tirx.truncdiv(pages + share - 1, share), 1)
        chunks = bind(T.Select(rows == 1, alone, tirx.truncdiv(pages, share) + rows))
        size = heads * d + -(-2 * heads // 4) * 4  # of a chunk: DecodeMerge::kPart
        part = T.alloc_buffer((chunks * (units * size),), "float32", layout=None)
        bounds = Bounds.of(spec, a)
        function = _function("attention_decode", archs, spec, d, kv_heads, group, warps)
        if bounds is not None:
            function = f"bounded_{function}".replace("<", f"<{', '.join(bounds.flags)}, ")
        device_call(
            "attention_decode.cuh",
            function,
            [
                *(() if bounds is None else bounds.arguments),
                *map(_address, (a.q, a.pages, a.page_indptr, a.page_indices, a.length_info)),
                *map(_address, (a.out, a.lse)),
                part,  # not an address: TVM would shorten it to what it sees used
                *(rows, listed, share, a.sm_scale if bounds is None else bounds.scale),
            ],
            threads=32 * warps,
            grid=[chunks, units],
        )

    return ir.build("attn_decode", spec, ARGUMENTS, body)


def split_rotary(spec: KVCacheSpec, archs: CudaArchs) -> tirx.PrimFunc | None:
    """`split_rotary` of `KVCacheKernels`; None with a sliding window."""
    if not _moves(spec, archs):
        return None
    d, half = spec.head_dim, spec.rotary_dim // 2
    q_heads, kv_heads = spec.num_qo_heads, spec.num_kv_heads

    def body(a: SimpleNamespace) -> None:
        rows, factor = a.extent.rows, f32(spec.attention_factor)
        tensors = [*map(_address, (a.qkv, a.q_position, a.q, a.new_k, a.new_v, a.inv_freq)), factor]
        numbers = (d, half, q_heads, kv_heads)
        with T.If(rows < FEW_ROWS):
            with T.Then():
                threads = 2 * THREADS
                device_call(
                    "rope_append.cuh",
                    _function("split_rotary_few", archs, spec, *numbers, threads),
                    [*tensors, rows],
                    threads=threads,
                    grid=[ir.pieces(rows * ((q_heads + 2 * kv_heads) * (d - half)), threads)],
                )
            with T.Else():
                device_call(
                    "rope_append.cuh",
                    _function("split_rotary", archs, spec, *numbers, THREADS),
                    tensors,
                    threads=THREADS,
                    grid=[rows],
                )

    return ir.build("kv_split_rotary", spec, "qkv q_position q new_k new_v inv_freq", body)


def transpose_append(spec: KVCacheSpec, archs: CudaArchs) -> tirx.PrimFunc | None:
    """`transpose_append` of `KVCacheKernels`."""
    if not _moves(spec, archs):
        return None
    d, kv_heads = spec.head_dim, spec.num_kv_heads

    def body(a: SimpleNamespace) -> None:
        vector = _vector(spec, d)
        device_call(
            "rope_append.cuh",
            _function("transpose_append", archs, spec, d, kv_heads, vector, THREADS),
            [*map(_address, (a.pages, a.k, a.v, a.slot)), a.extent.kv_rows],
            threads=THREADS,
            grid=[ir.pieces(a.extent.kv_rows * (kv_heads * d // vector), THREADS)],
        )

    return ir.build("kv_transpose_append", spec, "pages k v slot", body)


def merge_state(spec: KVCacheSpec, archs: CudaArchs) -> tirx.PrimFunc | None:
    """`merge_state` of `KVCacheKernels`."""
    if not _moves(spec, archs):
        return None
    d = spec.head_dim

    def body(a: SimpleNamespace) -> None:
        rows = bind(a.extent.rows * spec.num_qo_heads)
        device_call(
            "rope_append.cuh",
            _function("merge_state", archs, spec, d, THREADS),
            [*map(_address, (a.out, a.lse, a.other_out, a.other_lse)), rows],
            threads=THREADS,
            grid=[ir.pieces(rows, THREADS * _vector(spec, d) // d)],
        )

    return ir.build("attn_merge_state", spec, "out lse other_out other_lse", body)


def _moves(spec: KVCacheSpec, archs: CudaArchs) -> bool:
    """Whether the kernels without products serve it."""
    if spec.dtype == "bfloat16" and archs.minimum < BFLOAT16:
        return False
    return spec.sliding_window is None and spec.head_dim // _vector(spec, spec.head_dim) <= THREADS


def _vector(spec: KVCacheSpec, width: int) -> int:
    """vector_size of vector.cuh."""
    n = 4 if spec.dtype == "float32" else 8
    while width % n:
        n //= 2
    return n


def _function(name: str, archs: CudaArchs, spec: KVCacheSpec, *numbers: int) -> str:
    suffix = "_dependent" if archs.dependent_launch else ""
    return f"{name}{suffix}<{', '.join(map(str, (TYPES[spec.dtype], *numbers)))}>"


def _address(cells: ir.Cells) -> Expr:
    """Where a tensor begins: an int32 one may be a view into a larger one."""
    return T.address_of(cells.buffer[i32(0)])
