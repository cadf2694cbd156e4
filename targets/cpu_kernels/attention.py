"""CPU kernels of the paged KV cache: append, attention, merge, copies.

- A page holds the keys of a head transposed, [d][16 slots]; values are [16 slots][d]. So a page of
  keys is one vector register row per dimension, and a decode step needs no horizontal sums.
- Decode puts keys in lanes: 16 scores at once for each query head of a KV head's group, which share
  every load. A sequence is split into key ranges, so that threads share one token's work.
- Prefill puts query rows in lanes (rows of a tile x heads of a group), so that scores, softmax and
  output need no horizontal operation either; keys and values are broadcast.
- Softmax is online, in base 2, over float32; the caches may be float32, float16 or bfloat16.
- Sliding window: the runtime keeps cached rows without saying their position in the text, and
  numbers them anew as the window slides. Differences of those numbers are true distances, and
  rotary attention depends on differences only. A cached key is stored rotated by its slot in the
  page; the kernels add the rotation of the page. The mask is exact: distance < window.
- Windowed layers: a call with a negative `sm_scale` masks by position and starts at the first page
  that one of its queries sees. Which layers those are is known only when called.
- One parallel region in a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

from tvm import tirx
from tvm.script import tirx as T

from mlc_compile.targets.cpu_kernels._attn_math import (
    LOG2_E,
    NEGATIVE,
    cos,
    exp2,
    f32,
    lanes_for,
    sin,
    tanh,
)
from mlc_compile.targets.cpu_kernels.rope import PARALLEL_TOKENS, fill_frequencies, split_rotary
from mlc_compile.targets.kv_cache import PAGE_SIZE, KVCacheKernels, KVCacheSpec

EMPTY = NEGATIVE / 10
"""Running maximum before any key: above a masked score, so that masked keys weigh exactly 0."""

SPLIT_PAGES = 8
"""Fewest pages of a decode split; shorter ones cost more in merging than they gain."""

EVERY = 1 << 30
"""The reach of a layer without a window."""


@dataclass(frozen=True)
class Tiling:
    """Loop shapes for one machine: `lanes` float32 values in a vector register.

    Attributes:
        tile_lanes: lanes of a prefill tile, at least `tile_rows` x group heads.
        row_keys, row_dims, row_vectors: keys, or dimensions, x vectors of its register block.
        group: query heads of a decode register block.
        pages: pages of a decode softmax block.
    """

    lanes: int
    tile_lanes: int
    tile_rows: int
    row_keys: int
    row_dims: int
    row_vectors: int
    group: int
    pages: int

    @staticmethod
    def of(spec: KVCacheSpec, vector_bits: int) -> Tiling:
        lanes = min(vector_bits // 32, PAGE_SIZE)
        # 12 accumulators, 3 query vectors and one key fill the 16 registers of AVX2. They were the
        # best of those tried with AVX-512 too (157 GFLOP/s on one core; 87 with AVX2).
        vectors, keys = 3, 4
        rows = max(1, 48 // spec.group_size)
        chunk = vectors * lanes
        per_page = PAGE_SIZE // lanes
        limit = 14 if lanes == 8 else 16
        group = max(
            g
            for g in range(1, spec.group_size + 1)
            if spec.group_size % g == 0 and (g == 1 or g * per_page <= limit)
        )
        return Tiling(
            lanes=lanes,
            tile_lanes=-(-rows * spec.group_size // chunk) * chunk,
            tile_rows=rows,
            row_keys=keys,
            row_dims=lanes_for(spec.head_dim, keys),
            row_vectors=vectors,
            group=group,
            pages=max(1, 12 // (group * per_page)),
        )


def cpu_kv_cache_kernels(spec: KVCacheSpec, *, vector_bits: int = 256) -> KVCacheKernels:
    """Kernels for a CPU with vector registers of `vector_bits` (512, 256 or 128)."""
    tiling = Tiling.of(spec, vector_bits)
    window = spec.sliding_window is not None
    return KVCacheKernels(
        split_rotary=split_rotary(spec, tiling.lanes),
        transpose_append=_transpose_append(spec, tiling),
        prefill_ragged=_prefill_ragged(spec, tiling, tree=False),
        prefill_paged=_prefill_paged(spec, tiling, tree=False),
        decode=_decode(spec, tiling),
        tree_paged=None if window else _prefill_paged(spec, tiling, tree=True),
        tree_ragged=None if window else _prefill_ragged(spec, tiling, tree=True),
        merge_state=_merge_state(spec, tiling),
        copy_single_page=_copy_single_page(spec, tiling),
        debug_get_kv=_debug_get_kv(spec),
        compact_copy=_compact_copy(spec, tiling),
    )


def _query_factor(spec: KVCacheSpec, sm_scale: tirx.Expr) -> tirx.Expr:
    """What multiplies a query: its products with keys are scores in base 2, or `_score`'s input."""
    scale = sm_scale if spec.layer_window is None else T.fabs(sm_scale)
    return scale * f32(LOG2_E if spec.softcap is None else 1 / spec.softcap)


def _score(spec: KVCacheSpec, product: tirx.Expr) -> tirx.Expr:
    """The score, in base 2, of a scaled query's product with a key."""
    return product if spec.softcap is None else f32(spec.softcap * LOG2_E) * tanh(product)


def _reach(spec: KVCacheSpec, sm_scale: tirx.Expr) -> tirx.Expr | int:
    """How many positions a query sees in this call, its own included and sinks apart."""
    if spec.layer_window is None:
        return (spec.sliding_window or 0) - spec.attention_sink
    bounded = T.int32(spec.layer_window)
    return T.Select(sm_scale < f32(0.0), bounded, T.int32(EVERY))


def _transpose_append(spec: KVCacheSpec, tiling: Tiling) -> tirx.PrimFunc:
    heads, d, dtype, page = spec.num_kv_heads, spec.head_dim, spec.dtype, PAGE_SIZE
    half, factor = spec.rotary_dim // 2, spec.attention_factor
    turns = spec.sliding_window is not None and half > 0
    lanes, half_lanes = lanes_for(d, tiling.lanes), lanes_for(half, tiling.lanes)

    @T.macro
    def token(
        pages: T.Buffer, k: T.Buffer, v: T.Buffer, slot: T.Buffer, freq: T.Buffer, t: T.int32
    ) -> None:
        if slot[t] >= 0:
            c = T.alloc_buffer((half,), "float32")
            s = T.alloc_buffer((half,), "float32")
            base = T.alloc_buffer((1,), "int64")
            offset = T.alloc_buffer((1,), "int32")
            offset[0] = slot[t] % page
            if turns:
                for o in T.serial(half // half_lanes):
                    for i in T.vectorized(half_lanes):
                        e = T.meta_var(o * half_lanes + i)
                        c[e] = f32(factor) * cos(T.Cast("float32", offset[0]) * freq[e])
                        s[e] = f32(factor) * sin(T.Cast("float32", offset[0]) * freq[e])
            for h in T.serial(heads):
                base[0] = (T.Cast("int64", slot[t] // page) * (2 * heads) + h) * (page * d)
                if turns:
                    for e in T.serial(half):
                        x = T.meta_var(T.Cast("float32", k[t, h, e]))
                        y = T.meta_var(T.Cast("float32", k[t, h, e + half]))
                        pages[base[0] + e * page + offset[0]] = T.Cast(dtype, x * c[e] - y * s[e])
                        pages[base[0] + (e + half) * page + offset[0]] = T.Cast(
                            dtype, y * c[e] + x * s[e]
                        )
                    for e in T.serial(d - 2 * half):
                        pages[base[0] + (e + 2 * half) * page + offset[0]] = k[t, h, e + 2 * half]
                else:
                    for e in T.serial(d):
                        pages[base[0] + e * page + offset[0]] = k[t, h, e]
                for o in T.serial(d // lanes):
                    for i in T.vectorized(lanes):
                        pages[base[0] + heads * page * d + offset[0] * d + o * lanes + i] = v[
                            t, h, o * lanes + i
                        ]

    @T.prim_func(s_tir=True)
    def kv_transpose_append(
        var_pages: T.handle, var_k: T.handle, var_v: T.handle, var_slot: T.handle
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int32()
        num_pages = T.int64()
        slot_offset = T.int32()
        paged = T.match_buffer(var_pages, (num_pages, 2, heads, page, d), dtype)
        k = T.match_buffer(var_k, (n, heads, d), dtype)
        v = T.match_buffer(var_v, (n, heads, d), dtype)
        slot = T.match_buffer(var_slot, (n,), "int32", elem_offset=slot_offset)
        pages = T.decl_buffer((num_pages * (2 * heads * page * d),), dtype, data=paged.data)
        freq = T.alloc_buffer((max(half, 1),), "float32")
        if turns:
            fill_frequencies(freq, spec.inv_freq)
        if n < PARALLEL_TOKENS:
            for t in T.serial(n):
                token(pages, k, v, slot, freq, t)
        else:
            for t in T.parallel(n):
                token(pages, k, v, slot, freq, t)

    return kv_transpose_append


def _tile_macros(spec: KVCacheSpec, tiling: Tiling, *, key_major: bool) -> SimpleNamespace:
    """Loops shared by the ragged and the paged prefill kernels.

    A block of 16 keys lies in `kb`, [16][d] if `key_major`, else [d][16]; its values in `vb`,
    [16][d]. Lane arrays have `tile_lanes` elements; `lo`, `hi` bound each lane's visible slots. In
    windowed layers `lo` has two elements more, the least and the greatest of them.
    """
    d, group, dtype, page = spec.head_dim, spec.group_size, spec.dtype, PAGE_SIZE
    lanes, width, rows = tiling.lanes, tiling.tile_lanes, tiling.tile_rows
    vectors, keys, dims = tiling.row_vectors, tiling.row_keys, tiling.row_dims
    chunk = vectors * lanes
    key_stride, dim_stride = (d, 1) if key_major else (1, page)
    layered = spec.layer_window is not None

    @T.macro
    def find(indptr: T.Buffer, batch: T.int32, tile: T.int32, at: T.Buffer) -> None:
        # at[0] = sequence of this tile or -1, at[1] = its first row in the sequence
        at[0] = -1
        at[1] = tile
        for b in T.serial(batch):
            if at[0] < 0:
                tiles = T.meta_var((indptr[b + 1] - indptr[b] + (rows - 1)) // rows)
                if at[1] < tiles:
                    at[0] = b
                    at[1] = at[1] * rows
                else:
                    at[1] = at[1] - tiles

    @T.macro
    def load_queries(
        q: T.Buffer,
        qt: T.Buffer,
        ot: T.Buffer,
        m: T.Buffer,
        z: T.Buffer,
        first: T.int32,
        last: T.int32,
        h: T.int32,
        scale: T.float32,
    ) -> None:
        for g in T.serial(group):
            for r in T.serial(rows):
                for e in T.serial(d):
                    qt[e * width + g * rows + r] = scale * T.Cast(
                        "float32", q[T.min(first + r, last), h * group + g, e]
                    )
        for e in T.serial(d):
            for r in T.serial(width - group * rows):
                qt[e * width + group * rows + r] = f32(0.0)
        for e in T.serial(d * width // lanes):
            for i in T.vectorized(lanes):
                ot[e * lanes + i] = f32(0.0)
        for e in T.serial(width // lanes):
            for i in T.vectorized(lanes):
                m[e * lanes + i] = f32(EMPTY)
                z[e * lanes + i] = f32(0.0)

    @T.macro
    def scores(qt: T.Buffer, kb: T.Buffer, p: T.Buffer) -> None:
        for c in T.serial(width // chunk):
            for kg in T.serial(page // keys):
                acc = T.alloc_buffer((keys * chunk,), "float32")
                for k in T.unroll(keys * vectors):
                    for i in T.vectorized(lanes):
                        acc[k * lanes + i] = f32(0.0)
                for e in T.serial(d):
                    for k in T.unroll(keys):
                        key = T.meta_var(kb[(kg * keys + k) * key_stride + e * dim_stride])
                        for n in T.unroll(vectors):
                            for i in T.vectorized(lanes):
                                a = T.meta_var(k * chunk + n * lanes + i)
                                acc[a] = acc[a] + key * qt[e * width + c * chunk + n * lanes + i]
                for k in T.unroll(keys):
                    for n in T.unroll(vectors):
                        for i in T.vectorized(lanes):
                            p[(kg * keys + k) * width + c * chunk + n * lanes + i] = _score(
                                spec, acc[k * chunk + n * lanes + i]
                            )

    @T.macro
    def mask(p: T.Buffer, lo: T.Buffer, hi: T.Buffer, slot: T.int32) -> None:
        for k in T.serial(page):
            for c in T.serial(width // lanes):
                for i in T.vectorized(lanes):
                    e = T.meta_var(c * lanes + i)
                    p[k * width + e] = T.Select(
                        tirx.all(lo[e] <= slot + k, slot + k < hi[e]),
                        p[k * width + e],
                        f32(NEGATIVE),
                    )

    @T.macro
    def softmax(p: T.Buffer, m: T.Buffer, z: T.Buffer, alpha: T.Buffer) -> None:
        for c in T.serial(width // lanes):
            top = T.alloc_buffer((lanes,), "float32")
            total = T.alloc_buffer((lanes,), "float32")
            for i in T.vectorized(lanes):
                top[i] = m[c * lanes + i]
            for k in T.unroll(page):
                for i in T.vectorized(lanes):
                    top[i] = T.max(top[i], p[k * width + c * lanes + i])
            for i in T.vectorized(lanes):
                alpha[c * lanes + i] = exp2(m[c * lanes + i] - top[i])
            for i in T.vectorized(lanes):
                m[c * lanes + i] = top[i]
            for i in T.vectorized(lanes):
                total[i] = z[c * lanes + i] * alpha[c * lanes + i]
            for k in T.serial(page):
                for i in T.vectorized(lanes):
                    p[k * width + c * lanes + i] = exp2(p[k * width + c * lanes + i] - top[i])
                for i in T.vectorized(lanes):
                    total[i] = total[i] + p[k * width + c * lanes + i]
            for i in T.vectorized(lanes):
                z[c * lanes + i] = total[i]

    @T.macro
    def outputs(p: T.Buffer, vb: T.Buffer, ot: T.Buffer, alpha: T.Buffer) -> None:
        for c in T.serial(width // chunk):
            for eg in T.serial(d // dims):
                acc = T.alloc_buffer((dims * chunk,), "float32")
                for e in T.unroll(dims):
                    for n in T.unroll(vectors):
                        for i in T.vectorized(lanes):
                            lane = T.meta_var(c * chunk + n * lanes + i)
                            acc[e * chunk + n * lanes + i] = (
                                ot[(eg * dims + e) * width + lane] * alpha[lane]
                            )
                for k in T.serial(page):
                    for e in T.unroll(dims):
                        value = T.meta_var(vb[k * d + eg * dims + e])
                        for n in T.unroll(vectors):
                            for i in T.vectorized(lanes):
                                a = T.meta_var(e * chunk + n * lanes + i)
                                lane = T.meta_var(c * chunk + n * lanes + i)
                                acc[a] = acc[a] + value * p[k * width + lane]
                for e in T.unroll(dims):
                    for n in T.unroll(vectors):
                        for i in T.vectorized(lanes):
                            ot[(eg * dims + e) * width + c * chunk + n * lanes + i] = acc[
                                e * chunk + n * lanes + i
                            ]

    @T.macro
    def lower_bounds(
        lo: T.Buffer,
        positions: T.Buffer,
        q_start: T.int32,
        q_len: T.int32,
        row: T.int32,
        offset: T.int32,
        reach: T.int32,
    ) -> None:
        # Rows may belong to several sequences that share these keys: their positions have no order.
        lo[width] = EVERY
        lo[width + 1] = 0
        for lane in T.serial(width):
            r = T.meta_var(T.min(row + lane % rows, q_len - 1))
            lo[lane] = T.max(positions[q_start + r] - offset - (reach - 1), 0)
            lo[width] = T.min(lo[width], lo[lane])
            lo[width + 1] = T.max(lo[width + 1], lo[lane])

    @T.macro
    def far_nodes(
        p: T.Buffer,
        order: T.Buffer,
        base: T.int32,
        nodes: T.int32,
        key: T.int32,
        place: T.int32,
        reach: T.int32,
        at: T.int32,
    ) -> None:
        # Distance in a tree: the row's ancestors, itself included, that descend from the key.
        if nodes > reach:
            distance = T.alloc_buffer((1,), "int32")
            distance[0] = 0
            for n in T.serial(nodes):
                node = T.meta_var(order[base + n, 0])
                if order[key, 0] < node and node <= place and place < order[base + n, 1]:
                    distance[0] = distance[0] + 1
            if distance[0] >= reach:
                p[at] = f32(NEGATIVE)

    @T.macro
    def tree_mask(
        p: T.Buffer,
        order: T.Buffer,
        base: T.int32,
        nodes: T.int32,
        first: T.int32,
        qo_len: T.int32,
        kv_len: T.int32,
        slot: T.int32,
        reach: T.int32,
    ) -> None:
        # A key of the tree is visible to its descendants: order[.., 0] is a node's place in
        # depth-first order, order[.., 1] the end of its subtree.
        for k in T.serial(page):
            if slot + k >= kv_len - nodes and slot + k < kv_len:
                for lane in T.serial(group * rows):
                    row = T.meta_var(T.min(first + lane % rows, qo_len - 1))
                    place = T.meta_var(order[base + nodes - qo_len + row, 0])
                    key = T.meta_var(base + slot + k - (kv_len - nodes))
                    if place < order[key, 0] or place >= order[key, 1]:
                        p[k * width + lane] = f32(NEGATIVE)
                    if layered:
                        far_nodes(p, order, base, nodes, key, place, reach, k * width + lane)

    @T.macro
    def store(
        out: T.Buffer,
        lse: T.Buffer,
        ot: T.Buffer,
        m: T.Buffer,
        z: T.Buffer,
        first: T.int32,
        last: T.int32,
        h: T.int32,
    ) -> None:
        # A row that saw no key has z = 0 and zero sums.
        for g in T.serial(group):
            for r in T.serial(rows):
                if first + r <= last:
                    inverse = T.alloc_buffer((1,), "float32")
                    inverse[0] = T.Select(
                        z[g * rows + r] > f32(0.0),
                        f32(1.0) / T.max(z[g * rows + r], f32(1e-37)),
                        f32(0.0),
                    )
                    for e in T.serial(d):
                        out[first + r, h * group + g, e] = T.Cast(
                            dtype, ot[e * width + g * rows + r] * inverse[0]
                        )
                    lse[first + r, h * group + g] = m[g * rows + r] + T.log2(
                        T.max(z[g * rows + r], f32(1e-37))
                    )

    return SimpleNamespace(
        find=find,
        load_queries=load_queries,
        scores=scores,
        mask=mask,
        lower_bounds=lower_bounds,
        tree_mask=tree_mask,
        softmax=softmax,
        outputs=outputs,
        store=store,
    )


def _prefill_ragged(spec: KVCacheSpec, tiling: Tiling, *, tree: bool) -> tirx.PrimFunc:
    """Attention among the tokens of this round, each sequence by itself."""
    d, dtype, page = spec.head_dim, spec.dtype, PAGE_SIZE
    q_heads, heads, half = spec.num_qo_heads, spec.num_kv_heads, spec.rotary_dim // 2
    width, rows, factor = tiling.tile_lanes, tiling.tile_rows, spec.attention_factor
    lanes, half_lanes = lanes_for(d, tiling.lanes), lanes_for(half, tiling.lanes)
    limited, sinks = spec.sliding_window is not None, spec.attention_sink
    turns = limited and half > 0
    # Nodes of a tree lie nearer than their rows: `tree_mask` bounds them.
    layered = spec.layer_window is not None and not tree
    tile = _tile_macros(spec, tiling, key_major=True)

    @T.macro
    def load_block(
        k: T.Buffer,
        v: T.Buffer,
        kb: T.Buffer,
        vb: T.Buffer,
        freq: T.Buffer,
        start: T.int32,
        count: T.int32,
        position: T.int32,
        h: T.int32,
    ) -> None:
        # Past the end, the last row repeats: masked keys need finite values.
        for r in T.serial(page):
            source = T.meta_var(start + T.min(r, count - 1))
            if turns:
                for o in T.serial(half // half_lanes):
                    for i in T.vectorized(half_lanes):
                        e = T.meta_var(o * half_lanes + i)
                        angle = T.meta_var(T.Cast("float32", position + r) * freq[e])
                        x = T.meta_var(T.Cast("float32", k[source, h, e]))
                        y = T.meta_var(T.Cast("float32", k[source, h, e + half]))
                        kb[r * d + e] = f32(factor) * (x * cos(angle) - y * sin(angle))
                        kb[r * d + e + half] = f32(factor) * (y * cos(angle) + x * sin(angle))
                for e in T.serial(d - 2 * half):
                    kb[r * d + 2 * half + e] = T.Cast("float32", k[source, h, 2 * half + e])
            else:
                for o in T.serial(d // lanes):
                    for i in T.vectorized(lanes):
                        kb[r * d + o * lanes + i] = T.Cast("float32", k[source, h, o * lanes + i])
            for o in T.serial(d // lanes):
                for i in T.vectorized(lanes):
                    vb[r * d + o * lanes + i] = T.Cast("float32", v[source, h, o * lanes + i])

    @T.macro
    def unit(
        q: T.Buffer,
        q_indptr: T.Buffer,
        k: T.Buffer,
        v: T.Buffer,
        kv_indptr: T.Buffer,
        offsets: T.Buffer,
        positions: T.Buffer,
        tree_indptr: T.Buffer,
        order: T.Buffer,
        out: T.Buffer,
        lse: T.Buffer,
        freq: T.Buffer,
        at: T.Buffer,
        h: T.int32,
        causal: T.int32,
        scale: T.float32,
        reach: T.int32,
    ) -> None:
        b: T.let[T.int32] = at[0]
        row: T.let[T.int32] = at[1]
        q_start: T.let[T.int32] = q_indptr[b]
        q_len: T.let[T.int32] = q_indptr[b + 1] - q_start
        kv_start: T.let[T.int32] = kv_indptr[b]
        kv_len: T.let[T.int32] = kv_indptr[b + 1] - kv_start
        shift: T.let[T.int32] = kv_len - q_len
        qt = T.alloc_buffer((d * width,), "float32")
        ot = T.alloc_buffer((d * width,), "float32")
        kb = T.alloc_buffer((page * d,), "float32")
        vb = T.alloc_buffer((page * d,), "float32")
        p = T.alloc_buffer((page * width,), "float32")
        m = T.alloc_buffer((width,), "float32")
        z = T.alloc_buffer((width,), "float32")
        alpha = T.alloc_buffer((width,), "float32")
        lo = T.alloc_buffer((width + 2 if layered else width,), "int32")
        hi = T.alloc_buffer((width,), "int32")
        tile.load_queries(q, qt, ot, m, z, q_start + row, q_start + q_len - 1, h, scale)
        for lane in T.serial(width):
            last = T.meta_var(T.min(row + lane % rows, q_len - 1) + shift)
            hi[lane] = T.Select(causal > 0, last + 1, kv_len)
            lo[lane] = T.max(last - (reach - 1), 0) if limited else 0
        if layered:
            tile.lower_bounds(lo, positions, q_start, q_len, row, offsets[b], reach)
        first_lo: T.let[T.int32] = (
            lo[width] if layered else T.max(row + shift - (reach - 1), 0) if limited else 0
        )
        last_lo: T.let[T.int32] = (
            lo[width + 1]
            if layered
            else T.max(T.min(row + rows, q_len) - 1 + shift - (reach - 1), 0)
            if limited
            else 0
        )
        first_hi: T.let[T.int32] = T.Select(causal > 0, row + shift + 1, kv_len)
        end: T.let[T.int32] = T.Select(causal > 0, T.min(row + rows + shift, kv_len), kv_len)
        begin: T.let[T.int32] = first_lo // page if sinks == 0 else 0
        for j in T.serial((end + (page - 1)) // page - begin):
            slot: T.let[T.int32] = (begin + j) * page
            position: T.let[T.int32] = (offsets[b] + slot) if limited else 0
            load_block(k, v, kb, vb, freq, kv_start + slot, T.min(kv_len - slot, page), position, h)
            tile.scores(qt, kb, p)
            if slot + page > first_hi or slot < last_lo:
                if sinks > 0:
                    # Sinks stay visible: they are the first keys of the whole text.
                    for r in T.serial(page):
                        for lane in T.serial(width):
                            if slot + r >= hi[lane] or (
                                slot + r < lo[lane] and position + r >= sinks
                            ):
                                p[r * width + lane] = f32(NEGATIVE)
                else:
                    tile.mask(p, lo, hi, slot)
            if tree:
                tile.tree_mask(
                    p,
                    order,
                    tree_indptr[b],
                    tree_indptr[b + 1] - tree_indptr[b],
                    row,
                    q_len,
                    kv_len,
                    slot,
                    reach,
                )
            tile.softmax(p, m, z, alpha)
            tile.outputs(p, vb, ot, alpha)
        tile.store(out, lse, ot, m, z, q_start + row, q_start + q_len - 1, h)

    if tree:

        @T.prim_func(s_tir=True)
        def attn_tree_ragged(
            var_q: T.handle,
            var_q_indptr: T.handle,
            var_k: T.handle,
            var_v: T.handle,
            var_kv_indptr: T.handle,
            var_q_position: T.handle,
            var_tree_indptr: T.handle,
            var_order: T.handle,
            var_out: T.handle,
            var_lse: T.handle,
            rotary_mode: T.int32,
            rope_scale: T.float32,
            rope_theta: T.float32,
            sm_scale: T.float32,
        ) -> None:
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            q_len = T.int32()
            kv_len = T.int32()
            tree_len = T.int32()
            batch_1 = T.int32()
            q_indptr_offset = T.int32()
            kv_indptr_offset = T.int32()
            q_position_offset = T.int32()
            tree_indptr_offset = T.int32()
            order_offset = T.int32()
            q = T.match_buffer(var_q, (q_len, q_heads, d), dtype)
            q_indptr = T.match_buffer(
                var_q_indptr, (batch_1,), "int32", elem_offset=q_indptr_offset
            )
            k = T.match_buffer(var_k, (kv_len, heads, d), dtype)
            v = T.match_buffer(var_v, (kv_len, heads, d), dtype)
            kv_indptr = T.match_buffer(
                var_kv_indptr, (batch_1,), "int32", elem_offset=kv_indptr_offset
            )
            position = T.match_buffer(
                var_q_position, (q_len,), "int32", elem_offset=q_position_offset
            )
            tree_indptr = T.match_buffer(
                var_tree_indptr, (batch_1,), "int32", elem_offset=tree_indptr_offset
            )
            order = T.match_buffer(var_order, (tree_len, 2), "int32", elem_offset=order_offset)
            out = T.match_buffer(var_out, (q_len, q_heads, d), dtype)
            lse = T.match_buffer(var_lse, (q_len, q_heads), "float32")
            freq = T.alloc_buffer((1,), "float32")
            for u in T.parallel(heads * (q_len // rows + batch_1 - 1)):
                at = T.alloc_buffer((2,), "int32")
                tile.find(q_indptr, batch_1 - 1, u % (q_len // rows + batch_1 - 1), at)
                if at[0] >= 0:
                    unit(
                        q,
                        q_indptr,
                        k,
                        v,
                        kv_indptr,
                        position,
                        position,
                        tree_indptr,
                        order,
                        out,
                        lse,
                        freq,
                        at,
                        u // (q_len // rows + batch_1 - 1),
                        0,
                        _query_factor(spec, sm_scale),
                        _reach(spec, sm_scale),
                    )

        return attn_tree_ragged

    @T.prim_func(s_tir=True)
    def attn_prefill_ragged(
        var_q: T.handle,
        var_q_indptr: T.handle,
        var_k: T.handle,
        var_v: T.handle,
        var_kv_indptr: T.handle,
        var_q_position: T.handle,
        var_k_offset: T.handle,
        var_out: T.handle,
        var_lse: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        q_len = T.int32()
        kv_len = T.int32()
        batch = T.int32()
        q_indptr_offset = T.int32()
        kv_indptr_offset = T.int32()
        q_position_offset = T.int32()
        k_offset_offset = T.int32()
        q = T.match_buffer(var_q, (q_len, q_heads, d), dtype)
        q_indptr = T.match_buffer(var_q_indptr, (batch + 1,), "int32", elem_offset=q_indptr_offset)
        k = T.match_buffer(var_k, (kv_len, heads, d), dtype)
        v = T.match_buffer(var_v, (kv_len, heads, d), dtype)
        kv_indptr = T.match_buffer(
            var_kv_indptr, (batch + 1,), "int32", elem_offset=kv_indptr_offset
        )
        positions = T.match_buffer(var_q_position, (q_len,), "int32", elem_offset=q_position_offset)
        offsets = T.match_buffer(var_k_offset, (batch,), "int32", elem_offset=k_offset_offset)
        out = T.match_buffer(var_out, (q_len, q_heads, d), dtype)
        lse = T.match_buffer(var_lse, (q_len, q_heads), "float32")
        freq = T.alloc_buffer((max(half, 1),), "float32")
        if turns:
            fill_frequencies(freq, spec.inv_freq)
        for u in T.parallel(heads * (q_len // rows + batch)):
            at = T.alloc_buffer((2,), "int32")
            # Short and long tiles alternate, so that every thread's share is alike.
            tiles: T.let[T.int32] = q_len // rows + batch
            x: T.let[T.int32] = u % tiles
            tile.find(q_indptr, batch, T.Select(x % 2 == 0, x // 2, tiles - 1 - x // 2), at)
            if at[0] >= 0:
                unit(
                    q,
                    q_indptr,
                    k,
                    v,
                    kv_indptr,
                    offsets,
                    positions,
                    q_indptr,
                    q_indptr,
                    out,
                    lse,
                    freq,
                    at,
                    u // tiles,
                    causal,
                    _query_factor(spec, sm_scale),
                    _reach(spec, sm_scale),
                )

    return attn_prefill_ragged


def _prefill_paged(spec: KVCacheSpec, tiling: Tiling, *, tree: bool) -> tirx.PrimFunc:
    """Attention of several rows to cached pages."""
    d, dtype, page = spec.head_dim, spec.dtype, PAGE_SIZE
    q_heads, heads, half = spec.num_qo_heads, spec.num_kv_heads, spec.rotary_dim // 2
    width, rows = tiling.tile_lanes, tiling.tile_rows
    lanes, half_lanes = lanes_for(d, tiling.lanes), lanes_for(half, tiling.lanes)
    page_lanes = tiling.lanes
    limited, sinks = spec.sliding_window is not None, spec.attention_sink
    turns, layered = limited and half > 0, spec.layer_window is not None
    segments = 2 if limited else 1
    tile = _tile_macros(spec, tiling, key_major=False)

    @T.macro
    def load_block(
        pages: T.Buffer,
        kb: T.Buffer,
        vb: T.Buffer,
        freq: T.Buffer,
        base: T.int64,
        unused: T.int32,
        valid: T.int32,
        position: T.int32,
    ) -> None:
        if turns:
            c = T.alloc_buffer((half,), "float32")
            s = T.alloc_buffer((half,), "float32")
            for o in T.serial(half // half_lanes):
                for i in T.vectorized(half_lanes):
                    e = T.meta_var(o * half_lanes + i)
                    c[e] = cos(T.Cast("float32", position) * freq[e])
                    s[e] = sin(T.Cast("float32", position) * freq[e])
            for e in T.serial(half):
                for o in T.unroll(page // page_lanes):
                    for i in T.vectorized(page_lanes):
                        n = T.meta_var(o * page_lanes + i)
                        x = T.meta_var(T.Cast("float32", pages[base + e * page + n]))
                        y = T.meta_var(T.Cast("float32", pages[base + (e + half) * page + n]))
                        kb[e * page + n] = x * c[e] - y * s[e]
                        kb[(e + half) * page + n] = y * c[e] + x * s[e]
            for e in T.serial(d - 2 * half):
                for o in T.unroll(page // page_lanes):
                    for i in T.vectorized(page_lanes):
                        n = T.meta_var((2 * half + e) * page + o * page_lanes + i)
                        kb[n] = T.Cast("float32", pages[base + n])
        else:
            for o in T.serial(d * page // page_lanes):
                for i in T.vectorized(page_lanes):
                    n = T.meta_var(o * page_lanes + i)
                    kb[n] = T.Cast("float32", pages[base + n])
        # Slots never written may hold NaN, which a weight of 0 would not silence.
        for r in T.serial(page):
            for o in T.serial(d // lanes):
                for i in T.vectorized(lanes):
                    n = T.meta_var(T.max(T.min(r, valid - 1), unused) * d + o * lanes + i)
                    vb[r * d + o * lanes + i] = T.Cast(
                        "float32", pages[base + heads * page * d + n]
                    )

    @T.macro
    def unit(
        q: T.Buffer,
        q_indptr: T.Buffer,
        pages: T.Buffer,
        page_indptr: T.Buffer,
        page_ids: T.Buffer,
        lengths: T.Buffer,
        offsets: T.Buffer,
        positions: T.Buffer,
        tree_indptr: T.Buffer,
        order: T.Buffer,
        out: T.Buffer,
        lse: T.Buffer,
        freq: T.Buffer,
        at: T.Buffer,
        h: T.int32,
        causal: T.int32,
        scale: T.float32,
        reach: T.int32,
    ) -> None:
        b: T.let[T.int32] = at[0]
        row: T.let[T.int32] = at[1]
        q_start: T.let[T.int32] = q_indptr[b]
        q_len: T.let[T.int32] = q_indptr[b + 1] - q_start
        pages_at: T.let[T.int32] = page_indptr[b]
        page_count: T.let[T.int32] = page_indptr[b + 1] - pages_at
        qt = T.alloc_buffer((d * width,), "float32")
        ot = T.alloc_buffer((d * width,), "float32")
        kb = T.alloc_buffer((page * d,), "float32")
        vb = T.alloc_buffer((page * d,), "float32")
        p = T.alloc_buffer((page * width,), "float32")
        m = T.alloc_buffer((width,), "float32")
        z = T.alloc_buffer((width,), "float32")
        alpha = T.alloc_buffer((width,), "float32")
        lo = T.alloc_buffer((width + 2 if layered else width,), "int32")
        hi = T.alloc_buffer((width,), "int32")
        tile.load_queries(q, qt, ot, m, z, q_start + row, q_start + q_len - 1, h, scale)
        bounds = T.alloc_buffer((6,), "int32")
        if limited:
            _window_bounds(bounds, lengths, b, page_count, offsets[b], sinks)
        else:
            bounds[0] = 0
            bounds[1] = T.Select(page_count > 0, (page_count - 1) * page + lengths[b], 0)
            bounds[2] = 0
        for segment in T.serial(segments):
            begin: T.let[T.int32] = bounds[segment * 3]
            end: T.let[T.int32] = bounds[segment * 3 + 1]
            shift: T.let[T.int32] = bounds[segment * 3 + 2]
            first_position: T.let[T.int32] = positions[q_start + row]
            last_position: T.let[T.int32] = positions[q_start + T.min(row + rows, q_len) - 1]
            for lane in T.serial(width):
                r = T.meta_var(T.min(row + lane % rows, q_len - 1))
                if limited:
                    lo[lane] = T.Select(
                        segment == 0,
                        begin,
                        T.max(positions[q_start + r] - shift - (reach - 1), begin),
                    )
                    hi[lane] = end
                else:
                    lo[lane] = 0
                    hi[lane] = T.Select(causal > 0, T.min(end - q_len + r + 1, end), end)
            if layered:
                tile.lower_bounds(lo, positions, q_start, q_len, row, offsets[b], reach)
            first_lo: T.let[T.int32] = (
                lo[width]
                if layered
                else T.Select(
                    segment == 0, begin, T.max(first_position - shift - (reach - 1), begin)
                )
                if limited
                else 0
            )
            last_lo: T.let[T.int32] = (
                lo[width + 1]
                if layered
                else T.Select(
                    segment == 0, begin, T.max(last_position - shift - (reach - 1), begin)
                )
                if limited
                else 0
            )
            first_hi: T.let[T.int32] = (
                end if limited else T.Select(causal > 0, T.min(end - q_len + row + 1, end), end)
            )
            first_page: T.let[T.int32] = first_lo // page
            for j in T.serial(T.max((end + (page - 1)) // page - first_page, 0)):
                slot: T.let[T.int32] = (first_page + j) * page
                base: T.let[T.int64] = (
                    T.Cast("int64", page_ids[pages_at + first_page + j]) * (2 * heads) + h
                ) * (page * d)
                load_block(
                    pages,
                    kb,
                    vb,
                    freq,
                    base,
                    T.max(begin - slot, 0),
                    T.min(end - slot, page),
                    slot + shift,
                )
                tile.scores(qt, kb, p)
                if slot + page > first_hi or slot < last_lo:
                    tile.mask(p, lo, hi, slot)
                if tree:
                    tile.tree_mask(
                        p,
                        order,
                        tree_indptr[b],
                        tree_indptr[b + 1] - tree_indptr[b],
                        row,
                        q_len,
                        end,
                        slot,
                        reach,
                    )
                tile.softmax(p, m, z, alpha)
                tile.outputs(p, vb, ot, alpha)
        tile.store(out, lse, ot, m, z, q_start + row, q_start + q_len - 1, h)

    if tree:

        @T.prim_func(s_tir=True)
        def attn_tree_paged(
            var_q: T.handle,
            var_q_indptr: T.handle,
            var_pages: T.handle,
            var_page_indptr: T.handle,
            var_page_ids: T.handle,
            var_lengths: T.handle,
            var_k_offset: T.handle,
            var_q_position: T.handle,
            var_out: T.handle,
            var_lse: T.handle,
            rotary_mode: T.int32,
            rope_scale: T.float32,
            rope_theta: T.float32,
            sm_scale: T.float32,
            var_tree_indptr: T.handle,
            var_order: T.handle,
        ) -> None:
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
            q_len = T.int32()
            batch = T.int32()
            id_count = T.int32()
            tree_len = T.int32()
            num_pages = T.int64()
            q_indptr_offset = T.int32()
            page_indptr_offset = T.int32()
            page_ids_offset = T.int32()
            lengths_offset = T.int32()
            k_offset_offset = T.int32()
            q_position_offset = T.int32()
            tree_indptr_offset = T.int32()
            order_offset = T.int32()
            q = T.match_buffer(var_q, (q_len, q_heads, d), dtype)
            q_indptr = T.match_buffer(
                var_q_indptr, (batch + 1,), "int32", elem_offset=q_indptr_offset
            )
            paged = T.match_buffer(var_pages, (num_pages, 2, heads, page, d), dtype)
            page_indptr = T.match_buffer(
                var_page_indptr, (batch + 1,), "int32", elem_offset=page_indptr_offset
            )
            page_ids = T.match_buffer(
                var_page_ids, (id_count,), "int32", elem_offset=page_ids_offset
            )
            lengths = T.match_buffer(var_lengths, (batch,), "int32", elem_offset=lengths_offset)
            offsets = T.match_buffer(var_k_offset, (batch,), "int32", elem_offset=k_offset_offset)
            positions = T.match_buffer(
                var_q_position, (q_len,), "int32", elem_offset=q_position_offset
            )
            out = T.match_buffer(var_out, (q_len, q_heads, d), dtype)
            lse = T.match_buffer(var_lse, (q_len, q_heads), "float32")
            tree_indptr = T.match_buffer(
                var_tree_indptr, (batch + 1,), "int32", elem_offset=tree_indptr_offset
            )
            order = T.match_buffer(var_order, (tree_len, 2), "int32", elem_offset=order_offset)
            pages = T.decl_buffer((num_pages * (2 * heads * page * d),), dtype, data=paged.data)
            freq = T.alloc_buffer((1,), "float32")
            for u in T.parallel(heads * (q_len // rows + batch)):
                at = T.alloc_buffer((2,), "int32")
                tile.find(q_indptr, batch, u % (q_len // rows + batch), at)
                if at[0] >= 0:
                    unit(
                        q,
                        q_indptr,
                        pages,
                        page_indptr,
                        page_ids,
                        lengths,
                        offsets,
                        positions,
                        tree_indptr,
                        order,
                        out,
                        lse,
                        freq,
                        at,
                        u // (q_len // rows + batch),
                        0,
                        _query_factor(spec, sm_scale),
                        _reach(spec, sm_scale),
                    )

        return attn_tree_paged

    length_rows = 3 if limited else 1

    @T.prim_func(s_tir=True)
    def attn_prefill_paged(
        var_q: T.handle,
        var_q_indptr: T.handle,
        var_pages: T.handle,
        var_page_indptr: T.handle,
        var_page_ids: T.handle,
        var_lengths: T.handle,
        var_k_offset: T.handle,
        var_q_position: T.handle,
        var_out: T.handle,
        var_lse: T.handle,
        causal: T.int32,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        q_len = T.int32()
        batch = T.int32()
        id_count = T.int32()
        num_pages = T.int64()
        q_indptr_offset = T.int32()
        page_indptr_offset = T.int32()
        page_ids_offset = T.int32()
        lengths_offset = T.int32()
        k_offset_offset = T.int32()
        q_position_offset = T.int32()
        q = T.match_buffer(var_q, (q_len, q_heads, d), dtype)
        q_indptr = T.match_buffer(var_q_indptr, (batch + 1,), "int32", elem_offset=q_indptr_offset)
        paged = T.match_buffer(var_pages, (num_pages, 2, heads, page, d), dtype)
        page_indptr = T.match_buffer(
            var_page_indptr, (batch + 1,), "int32", elem_offset=page_indptr_offset
        )
        page_ids = T.match_buffer(var_page_ids, (id_count,), "int32", elem_offset=page_ids_offset)
        lengths = _lengths(var_lengths, batch, length_rows, lengths_offset)
        offsets = T.match_buffer(var_k_offset, (batch,), "int32", elem_offset=k_offset_offset)
        positions = T.match_buffer(var_q_position, (q_len,), "int32", elem_offset=q_position_offset)
        out = T.match_buffer(var_out, (q_len, q_heads, d), dtype)
        lse = T.match_buffer(var_lse, (q_len, q_heads), "float32")
        pages = T.decl_buffer((num_pages * (2 * heads * page * d),), dtype, data=paged.data)
        freq = T.alloc_buffer((max(half, 1),), "float32")
        if turns:
            fill_frequencies(freq, spec.inv_freq)
        for u in T.parallel(heads * (q_len // rows + batch)):
            at = T.alloc_buffer((2,), "int32")
            tile.find(q_indptr, batch, u % (q_len // rows + batch), at)
            if at[0] >= 0:
                unit(
                    q,
                    q_indptr,
                    pages,
                    page_indptr,
                    page_ids,
                    lengths,
                    offsets,
                    positions,
                    q_indptr,
                    q_indptr,
                    out,
                    lse,
                    freq,
                    at,
                    u // (q_len // rows + batch),
                    causal,
                    _query_factor(spec, sm_scale),
                    _reach(spec, sm_scale),
                )

    return attn_prefill_paged


def _lengths(var: tirx.Var, batch: tirx.Expr, length_rows: int, elem_offset: tirx.Var) -> T.Buffer:
    shape = (batch,) if length_rows == 1 else (length_rows, batch)
    return T.match_buffer(var, shape, "int32", elem_offset=elem_offset)


def _window_bounds(
    bounds: T.Buffer,
    lengths: T.Buffer,
    b: tirx.Expr,
    page_count: tirx.Expr,
    offset: tirx.Expr,
    sinks: int,
) -> None:
    """Emit bounds[0:3] = begin, end, shift of the sink slots and bounds[3:6] of the window's.

    A slot is a place in the sequence's pages; slot + shift is the runtime's number of the token in
    it. Before a sequence first slides the runtime says no sink; the first `sinks` tokens are.
    """
    last, start, sink = lengths[0, b], lengths[1, b], lengths[2, b]
    end = T.Select(page_count > 0, (page_count - 1) * PAGE_SIZE + last, 0)
    slid = T.Or(sink > 0, start > 0)
    natural = T.max(T.min(sinks - offset, end), 0)
    sink_end = T.Select(slid, sink, natural)
    window_begin = T.Select(slid, start, natural)
    values = [0, sink_end, offset, window_begin, end, offset + sink_end - window_begin]
    for i, value in enumerate(values):
        T.buffer_store(bounds, value, [i])


def _decode(spec: KVCacheSpec, tiling: Tiling) -> tirx.PrimFunc:
    """Attention of one row of each sequence to its cached pages."""
    d, dtype, page, lanes = spec.head_dim, spec.dtype, PAGE_SIZE, tiling.lanes
    q_heads, heads, half = spec.num_qo_heads, spec.num_kv_heads, spec.rotary_dim // 2
    group, block, pages_in_block = spec.group_size, tiling.group, tiling.pages
    vectors, keys = page // lanes, pages_in_block * page
    d_lanes, half_lanes = lanes_for(d, lanes), lanes_for(half, lanes)
    # Value vectors of a register block: 12 accumulators where they divide evenly.
    value_vectors = max(
        n
        for n in range(1, d // d_lanes + 1)
        if (d // d_lanes) % n == 0 and (n == 1 or n * block <= 14)
    )
    limited, sinks = spec.sliding_window is not None, spec.attention_sink
    turns, layered = limited and half > 0, spec.layer_window is not None
    segments, length_rows = (2, 3) if limited else (1, 1)
    page_query = group * d if turns else 0  # each page has its own rotation of the query

    def seen_pages(count: tirx.Expr, batch: tirx.Expr, sm_scale: tirx.Expr) -> tirx.Expr:
        if spec.layer_window is None:
            return count
        most = T.min(count, batch * (-(-spec.layer_window // page) + 1))
        return T.Select(sm_scale < f32(0.0), most, count)

    def fold_max(buffer: T.Buffer) -> None:
        _fold(buffer, lanes, T.max)

    def fold_sum(buffer: T.Buffer) -> None:
        _fold(buffer, lanes, lambda a, b: a + b)

    @T.macro
    def rotate_query(
        q: T.Buffer, qr: T.Buffer, freq: T.Buffer, position: T.int32, n: T.int32
    ) -> None:
        # By minus the page's position: what is left to a key is its slot in the page.
        c = T.alloc_buffer((half,), "float32")
        s = T.alloc_buffer((half,), "float32")
        for o in T.serial(half // half_lanes):
            for i in T.vectorized(half_lanes):
                e = T.meta_var(o * half_lanes + i)
                c[e] = cos(T.Cast("float32", position) * freq[e])
                s[e] = sin(T.Cast("float32", position) * freq[e])
        for g in T.serial(group):
            for o in T.serial(half // half_lanes):
                for i in T.vectorized(half_lanes):
                    e = T.meta_var(o * half_lanes + i)
                    x = T.meta_var(q[g * d + e])
                    y = T.meta_var(q[g * d + e + half])
                    qr[(n * group + g) * d + e] = x * c[e] + y * s[e]
                    qr[(n * group + g) * d + e + half] = y * c[e] - x * s[e]

    @T.macro
    def scores(pages: T.Buffer, q: T.Buffer, base: T.Buffer, p: T.Buffer) -> None:
        for gb in T.serial(group // block):
            acc = T.alloc_buffer((block * keys,), "float32")
            for n in T.unroll(block * keys // lanes):
                for i in T.vectorized(lanes):
                    acc[n * lanes + i] = f32(0.0)
            for e in T.serial(d):
                for n in T.unroll(pages_in_block):
                    for v in T.unroll(vectors):
                        for g in T.unroll(block):
                            for i in T.vectorized(lanes):
                                a = T.meta_var(g * keys + n * page + v * lanes + i)
                                x = T.meta_var(q[n * page_query + (gb * block + g) * d + e])
                                acc[a] = acc[a] + x * T.Cast(
                                    "float32", pages[base[n] + e * page + v * lanes + i]
                                )
            for n in T.unroll(block * keys // lanes):
                for i in T.vectorized(lanes):
                    p[gb * block * keys + n * lanes + i] = _score(spec, acc[n * lanes + i])

    @T.macro
    def softmax(p: T.Buffer, m: T.Buffer, z: T.Buffer, alpha: T.Buffer) -> None:
        for g in T.serial(group):
            top = T.alloc_buffer((lanes,), "float32")
            total = T.alloc_buffer((lanes,), "float32")
            for i in T.vectorized(lanes):
                top[i] = p[g * keys + i]
            for n in T.unroll(keys // lanes - 1):
                for i in T.vectorized(lanes):
                    top[i] = T.max(top[i], p[g * keys + (n + 1) * lanes + i])
            fold_max(top)
            top[0] = T.max(top[0], m[g])
            alpha[g] = exp2(m[g] - top[0])
            m[g] = top[0]
            for i in T.vectorized(lanes):
                total[i] = z[g * lanes + i] * alpha[g]
            for n in T.unroll(keys // lanes):
                for i in T.vectorized(lanes):
                    p[g * keys + n * lanes + i] = exp2(p[g * keys + n * lanes + i] - top[0])
                for i in T.vectorized(lanes):
                    total[i] = total[i] + p[g * keys + n * lanes + i]
            for i in T.vectorized(lanes):
                z[g * lanes + i] = total[i]

    @T.macro
    def outputs(
        pages: T.Buffer,
        base: T.Buffer,
        p: T.Buffer,
        alpha: T.Buffer,
        o: T.Buffer,
        slot: T.int32,
        begin: T.int32,
        end: T.int32,
    ) -> None:
        # Only slots in use: others may hold NaN, which a weight of 0 would not silence.
        for gb in T.serial(group // block):
            for eb in T.serial(d // (d_lanes * value_vectors)):
                acc = T.alloc_buffer((block * value_vectors * d_lanes,), "float32")
                for g in T.unroll(block):
                    for v in T.unroll(value_vectors):
                        for i in T.vectorized(d_lanes):
                            at = T.meta_var((eb * value_vectors + v) * d_lanes + i)
                            acc[(g * value_vectors + v) * d_lanes + i] = (
                                o[(gb * block + g) * d + at] * alpha[gb * block + g]
                            )
                for n in T.serial(pages_in_block):
                    unused = T.meta_var(T.max(begin - slot - n * page, 0))
                    used = T.meta_var(T.max(T.min(end - slot - n * page, page) - unused, 0))
                    for j in T.serial(used):
                        k = T.meta_var(unused + j)
                        for v in T.unroll(value_vectors):
                            for g in T.unroll(block):
                                for i in T.vectorized(d_lanes):
                                    at = T.meta_var((eb * value_vectors + v) * d_lanes + i)
                                    a = T.meta_var((g * value_vectors + v) * d_lanes + i)
                                    acc[a] = acc[a] + p[
                                        (gb * block + g) * keys + n * page + k
                                    ] * T.Cast(
                                        "float32",
                                        pages[base[n] + heads * page * d + k * d + at],
                                    )
                for g in T.unroll(block):
                    for v in T.unroll(value_vectors):
                        for i in T.vectorized(d_lanes):
                            at = T.meta_var((eb * value_vectors + v) * d_lanes + i)
                            o[(gb * block + g) * d + at] = acc[
                                (g * value_vectors + v) * d_lanes + i
                            ]

    @T.macro
    def unit(
        q: T.Buffer,
        pages: T.Buffer,
        page_indptr: T.Buffer,
        page_ids: T.Buffer,
        lengths: T.Buffer,
        offsets: T.Buffer,
        positions: T.Buffer,
        freq: T.Buffer,
        part_o: T.Buffer,
        part_m: T.Buffer,
        part_z: T.Buffer,
        b: T.int32,
        h: T.int32,
        split: T.int32,
        splits: T.int32,
        u: T.int32,
        scale: T.float32,
        reach: T.int32,
    ) -> None:
        ql = T.alloc_buffer((group * d,), "float32")
        qr = T.alloc_buffer((pages_in_block * group * d,), "float32")
        o = T.alloc_buffer((group * d,), "float32")
        p = T.alloc_buffer((group * keys,), "float32")
        m = T.alloc_buffer((group,), "float32")
        z = T.alloc_buffer((group * lanes,), "float32")
        alpha = T.alloc_buffer((group,), "float32")
        base = T.alloc_buffer((pages_in_block,), "int64")
        bounds = T.alloc_buffer((6,), "int32")
        pages_at: T.let[T.int32] = page_indptr[b]
        page_count: T.let[T.int32] = page_indptr[b + 1] - pages_at
        for g in T.serial(group):
            m[g] = f32(EMPTY)
            for i in T.vectorized(lanes):
                z[g * lanes + i] = f32(0.0)
            for e in T.serial(d // d_lanes):
                for i in T.vectorized(d_lanes):
                    ql[g * d + e * d_lanes + i] = scale * T.Cast(
                        "float32", q[b, h * group + g, e * d_lanes + i]
                    )
                for i in T.vectorized(d_lanes):
                    o[g * d + e * d_lanes + i] = f32(0.0)
            if turns:
                for n in T.serial(pages_in_block):
                    for e in T.serial(d - 2 * half):
                        qr[(n * group + g) * d + 2 * half + e] = ql[g * d + 2 * half + e]
        if limited:
            _window_bounds(bounds, lengths, b, page_count, offsets[b], sinks)
            bounds[3] = T.max(bounds[3], positions[b] - bounds[5] - (reach - 1))
        else:
            bounds[0] = T.max(positions[b] - offsets[b] - (reach - 1), 0) if layered else 0
            bounds[1] = T.Select(page_count > 0, (page_count - 1) * page + lengths[b], 0)
        for segment in T.serial(segments):
            begin: T.let[T.int32] = bounds[segment * 3]
            end: T.let[T.int32] = bounds[segment * 3 + 1]
            first_page: T.let[T.int32] = begin // page
            count: T.let[T.int32] = T.max((end + (page - 1)) // page - first_page, 0)
            from_page: T.let[T.int32] = first_page + count * split // splits
            to_page: T.let[T.int32] = first_page + count * (split + 1) // splits
            for j in T.serial((to_page - from_page + (pages_in_block - 1)) // pages_in_block):
                at: T.let[T.int32] = from_page + j * pages_in_block
                limit: T.let[T.int32] = T.min(end, to_page * page)
                for n in T.serial(pages_in_block):
                    base[n] = (
                        T.Cast("int64", page_ids[pages_at + T.min(at + n, to_page - 1)])
                        * (2 * heads)
                        + h
                    ) * (page * d)
                if turns:
                    for n in T.serial(pages_in_block):
                        rotate_query(ql, qr, freq, (at + n) * page + bounds[segment * 3 + 2], n)
                    scores(pages, qr, base, p)
                else:
                    scores(pages, ql, base, p)
                if at * page < begin or (at + pages_in_block) * page > limit:
                    for g in T.serial(group):
                        for c in T.serial(keys // lanes):
                            for i in T.vectorized(lanes):
                                k = T.meta_var(at * page + c * lanes + i)
                                p[g * keys + c * lanes + i] = T.Select(
                                    tirx.all(begin <= k, k < limit),
                                    p[g * keys + c * lanes + i],
                                    f32(NEGATIVE),
                                )
                softmax(p, m, z, alpha)
                outputs(pages, base, p, alpha, o, at * page, begin, limit)
        for g in T.serial(group):
            total = T.alloc_buffer((lanes,), "float32")
            for i in T.vectorized(lanes):
                total[i] = z[g * lanes + i]
            fold_sum(total)
            part_m[u * group + g] = m[g]
            part_z[u * group + g] = total[0]
            for e in T.serial(d // d_lanes):
                for i in T.vectorized(d_lanes):
                    part_o[(u * group + g) * d + e * d_lanes + i] = o[g * d + e * d_lanes + i]

    @T.macro
    def join(
        part_o: T.Buffer,
        part_m: T.Buffer,
        part_z: T.Buffer,
        out: T.Buffer,
        lse: T.Buffer,
        b: T.int32,
        h: T.int32,
        g: T.int32,
        splits: T.int32,
    ) -> None:
        acc = T.alloc_buffer((d,), "float32")
        w = T.alloc_buffer((3,), "float32")
        w[0] = f32(EMPTY)
        w[1] = f32(0.0)
        for e in T.serial(d // d_lanes):
            for i in T.vectorized(d_lanes):
                acc[e * d_lanes + i] = f32(0.0)
        for s in T.serial(splits):
            w[0] = T.max(w[0], part_m[((b * heads + h) * splits + s) * group + g])
        for s in T.serial(splits):
            u = T.meta_var(((b * heads + h) * splits + s) * group + g)
            w[2] = exp2(part_m[u] - w[0])
            w[1] = w[1] + w[2] * part_z[u]
            for e in T.serial(d // d_lanes):
                for i in T.vectorized(d_lanes):
                    acc[e * d_lanes + i] = (
                        acc[e * d_lanes + i] + w[2] * part_o[u * d + e * d_lanes + i]
                    )
        lse[b, h * group + g] = w[0] + T.log2(T.max(w[1], f32(1e-37)))
        w[2] = f32(1.0) / T.max(w[1], f32(1e-37))
        for e in T.serial(d // d_lanes):
            for i in T.vectorized(d_lanes):
                out[b, h * group + g, e * d_lanes + i] = T.Cast(dtype, acc[e * d_lanes + i] * w[2])

    @T.prim_func(s_tir=True)
    def attn_decode(
        var_q: T.handle,
        var_pages: T.handle,
        var_page_indptr: T.handle,
        var_page_ids: T.handle,
        var_lengths: T.handle,
        var_k_offset: T.handle,
        var_q_position: T.handle,
        var_out: T.handle,
        var_lse: T.handle,
        rotary_mode: T.int32,
        rope_scale: T.float32,
        rope_theta: T.float32,
        sm_scale: T.float32,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        batch = T.int32()
        id_count = T.int32()
        num_pages = T.int64()
        page_indptr_offset = T.int32()
        page_ids_offset = T.int32()
        lengths_offset = T.int32()
        k_offset_offset = T.int32()
        q_position_offset = T.int32()
        q = T.match_buffer(var_q, (batch, q_heads, d), dtype)
        paged = T.match_buffer(var_pages, (num_pages, 2, heads, page, d), dtype)
        page_indptr = T.match_buffer(
            var_page_indptr, (batch + 1,), "int32", elem_offset=page_indptr_offset
        )
        page_ids = T.match_buffer(var_page_ids, (id_count,), "int32", elem_offset=page_ids_offset)
        lengths = _lengths(var_lengths, batch, length_rows, lengths_offset)
        offsets = T.match_buffer(var_k_offset, (batch,), "int32", elem_offset=k_offset_offset)
        positions = T.match_buffer(var_q_position, (batch,), "int32", elem_offset=q_position_offset)
        out = T.match_buffer(var_out, (batch, q_heads, d), dtype)
        lse = T.match_buffer(var_lse, (batch, q_heads), "float32")
        pages = T.decl_buffer((num_pages * (2 * heads * page * d),), dtype, data=paged.data)
        freq = T.alloc_buffer((max(half, 1),), "float32")
        if turns:
            fill_frequencies(freq, spec.inv_freq)
        splits: T.let[T.int32] = T.max(
            T.min(seen_pages(id_count, batch, sm_scale) // (batch * SPLIT_PAGES), 8), 1
        )
        part_o = T.alloc_buffer((batch * q_heads * splits * d,), "float32")
        part_m = T.alloc_buffer((batch * q_heads * splits,), "float32")
        part_z = T.alloc_buffer((batch * q_heads * splits,), "float32")
        for u in T.parallel(batch * heads * splits):
            unit(
                q,
                pages,
                page_indptr,
                page_ids,
                lengths,
                offsets,
                positions,
                freq,
                part_o,
                part_m,
                part_z,
                u // (heads * splits),
                u // splits % heads,
                u % splits,
                splits,
                u,
                _query_factor(spec, sm_scale),
                _reach(spec, sm_scale),
            )
        for b in T.serial(batch):
            for h in T.serial(heads):
                for g in T.serial(group):
                    join(part_o, part_m, part_z, out, lse, b, h, g, splits)

    return attn_decode


def _fold(buffer: T.Buffer, lanes: int, combine: Callable[..., tirx.Expr]) -> None:
    """Emit a tree reduction of `lanes` values into buffer[0]."""
    width = lanes // 2
    while width:
        with T.vectorized(0, width) as i:
            value = combine(buffer[i], buffer[i + width])
            T.buffer_store(buffer, value, [i])
        width //= 2


def _merge_state(spec: KVCacheSpec, tiling: Tiling) -> tirx.PrimFunc:
    heads, d, dtype = spec.num_qo_heads, spec.head_dim, spec.dtype
    lanes = lanes_for(d, tiling.lanes)

    @T.macro
    def token(v: T.Buffer, s: T.Buffer, v2: T.Buffer, s2: T.Buffer, t: T.int32) -> None:
        for h in T.serial(heads):
            w = T.alloc_buffer((4,), "float32")
            w[0] = T.max(s[t, h], s2[t, h])
            w[1] = exp2(s[t, h] - w[0])
            w[2] = exp2(s2[t, h] - w[0])
            w[3] = w[1] + w[2]  # at least 1: one of the two exponents is 0
            s[t, h] = w[0] + T.log2(w[3])
            w[1] = w[1] / w[3]
            w[2] = w[2] / w[3]
            for o in T.serial(d // lanes):
                for i in T.vectorized(lanes):
                    v[t, h, o * lanes + i] = T.Cast(
                        dtype,
                        w[1] * T.Cast("float32", v[t, h, o * lanes + i])
                        + w[2] * T.Cast("float32", v2[t, h, o * lanes + i]),
                    )

    @T.prim_func(s_tir=True)
    def attn_merge_state(
        var_v: T.handle, var_s: T.handle, var_v2: T.handle, var_s2: T.handle
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int32()
        v = T.match_buffer(var_v, (n, heads, d), dtype)
        s = T.match_buffer(var_s, (n, heads), "float32")
        v2 = T.match_buffer(var_v2, (n, heads, d), dtype)
        s2 = T.match_buffer(var_s2, (n, heads), "float32")
        if n < PARALLEL_TOKENS:
            for t in T.serial(n):
                token(v, s, v2, s2, t)
        else:
            for t in T.parallel(n):
                token(v, s, v2, s2, t)

    return attn_merge_state


def _copy_single_page(spec: KVCacheSpec, tiling: Tiling) -> tirx.PrimFunc:
    heads, d, dtype, page = spec.num_kv_heads, spec.head_dim, spec.dtype, PAGE_SIZE
    size = 2 * heads * page * d

    @T.prim_func(s_tir=True)
    def kv_copy_single_page(
        var_pages: T.handle, source: T.int64, target: T.int64, length: T.int64
    ) -> None:
        # The whole page, as it lies: slots from `length` on are overwritten before they are read.
        T.func_attr({"tirx.is_scheduled": True})
        num_pages = T.int64()
        paged = T.match_buffer(var_pages, (num_pages, 2, heads, page, d), dtype)
        pages = T.decl_buffer((num_pages * size,), dtype, data=paged.data)
        for o in T.serial(size // PAGE_SIZE):
            for i in T.vectorized(PAGE_SIZE):
                pages[target * size + o * PAGE_SIZE + i] = pages[source * size + o * PAGE_SIZE + i]

    return kv_copy_single_page


def _debug_get_kv(spec: KVCacheSpec) -> tirx.PrimFunc:
    """With a sliding window keys come as stored, rotated by their slot in the page."""
    layers, heads, d, dtype = spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.dtype
    page = PAGE_SIZE

    @T.prim_func(s_tir=True)
    def kv_debug_get(
        var_pages: T.handle, var_slot: T.handle, var_k: T.handle, var_v: T.handle, layer: T.int64
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True})
        n = T.int64()
        num_pages = T.int64()
        slot_offset = T.int64()
        paged = T.match_buffer(var_pages, (num_pages, 2, heads, page, d), dtype)
        slot = T.match_buffer(var_slot, (n,), "int32", elem_offset=slot_offset)
        k = T.match_buffer(var_k, (layers, n, heads, d), dtype)
        v = T.match_buffer(var_v, (layers, n, heads, d), dtype)
        pages = T.decl_buffer((num_pages * (2 * heads * page * d),), dtype, data=paged.data)
        for t, h, e in T.grid(n, heads, d):
            base: T.let[T.int64] = (T.Cast("int64", slot[t] // page) * (2 * heads) + h) * (page * d)
            k[layer, t, h, e] = pages[base + e * page + slot[t] % page]
            v[layer, t, h, e] = pages[base + heads * page * d + slot[t] % page * d + e]

    return kv_debug_get


def _compact_copy(spec: KVCacheSpec, tiling: Tiling) -> tirx.PrimFunc:
    """Move accepted tree nodes; sources lie behind targets and are read in ascending order."""
    heads, d, dtype, page = spec.num_kv_heads, spec.head_dim, spec.dtype, PAGE_SIZE
    lanes = lanes_for(d, tiling.lanes)

    @T.prim_func(s_tir=True)
    def kv_compact_copy(
        var_pages: T.handle, var_indptr: T.handle, var_slots: T.handle, batch: T.int32
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True})
        num_pages = T.int64()
        total = T.int32()
        indptr_offset = T.int32()
        slots_offset = T.int32()
        paged = T.match_buffer(var_pages, (num_pages, 2, heads, page, d), dtype)
        indptr = T.match_buffer(var_indptr, (batch + 1,), "int32", elem_offset=indptr_offset)
        slots = T.match_buffer(var_slots, (2, total), "int32", elem_offset=slots_offset)
        pages = T.decl_buffer((num_pages * (2 * heads * page * d),), dtype, data=paged.data)
        for b in T.serial(batch):
            for n in T.serial(indptr[b + 1] - indptr[b]):
                for h in T.serial(heads):
                    source: T.let[T.int32] = slots[0, indptr[b] + n]
                    target: T.let[T.int32] = slots[1, indptr[b] + n]
                    x: T.let[T.int64] = (T.Cast("int64", source // page) * (2 * heads) + h) * (
                        page * d
                    )
                    y: T.let[T.int64] = (T.Cast("int64", target // page) * (2 * heads) + h) * (
                        page * d
                    )
                    for e in T.serial(d):
                        pages[y + e * page + target % page] = pages[x + e * page + source % page]
                    for o in T.serial(d // lanes):
                        for i in T.vectorized(lanes):
                            pages[y + heads * page * d + target % page * d + o * lanes + i] = pages[
                                x + heads * page * d + source % page * d + o * lanes + i
                            ]

    return kv_compact_copy
