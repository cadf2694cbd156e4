"""Attention of many rows: tiles of rows against tiles of keys, softmax online, O(rows) memory.

- One generator for the keys of this round (ragged) and cached pages, with causal, window or tree
  masks. A row is one query head of one token: the heads that share a KV head share its tiles.
- A group has 16 x 16 threads; thread (x, y) owns rows y + 16 i and, of these, keys x + 16 j of the
  scores and dimensions x + 16 u of the output, all in registers.
- Query and keys pass through shared memory in pieces of a few dimensions, values in pieces of
  whole rows, so that shared memory does not grow with the head size.
- All 16 threads of a row keep its running maximum; each keeps its own part of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.errors import InputError
from mlc_compile.targets.cpu_kernels._attn_math import NEGATIVE
from mlc_compile.targets.gpu_kernels import _attention_ir as ir
from mlc_compile.targets.gpu_kernels._attention_ir import (
    EMPTY,
    SMALLEST,
    THREADS,
    Expr,
    Span,
    all_of,
    divide,
    hold,
    pieces,
    registers,
    shared,
    window_start,
)
from mlc_compile.targets.gpu_kernels._emit import barrier, bind, f32, i32, launch, when
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kv_cache import PAGE_SIZE, KVCacheSpec

SIDE = 16
"""Threads of a group along the rows, and along keys and dimensions."""

_ROPE = "rotary_mode rope_scale rope_theta sm_scale"
_PAGES = "q qo_indptr pages page_indptr page_indices length_info k_offset q_position out lse"
_RAGGED = "q qo_indptr k v kv_indptr q_position"
ARGUMENTS = {
    "attn_prefill_ragged": f"{_RAGGED} k_offset out lse causal {_ROPE}",
    "attn_prefill_paged": f"{_PAGES} causal {_ROPE}",
    "attn_tree_ragged": f"{_RAGGED} tree_indptr tree_order out lse {_ROPE}",
    "attn_tree_paged": f"{_PAGES} {_ROPE} tree_indptr tree_order",
}


@dataclass(frozen=True)
class Tile:
    """Loop shapes of a prefill group.

    Attributes:
        rows: rows of a thread; a tile has 16 times as many.
        keys: keys of a thread.
        chunk: dimensions of a thread in one piece of query and keys.
        dims: dimensions of a thread in an output row.
    """

    rows: int
    keys: int
    chunk: int
    dims: int

    @staticmethod
    def of(spec: KVCacheSpec, device: GPUDevice) -> Tile:
        """The largest tile that fits.

        Raises:
            InputError: none does.
        """
        dims = -(-spec.head_dim // SIDE)
        table = spec.rotary_dim // 2 if spec.sliding_window is not None else 0
        for rows, keys, chunk in ((4, 4, 1), (4, 2, 2), (4, 2, 1), (2, 2, 1), (1, 1, 1)):
            tile = Tile(rows, keys, chunk, dims)
            taken = tile.staging + tile.weights + tile.partial + table
            if dims % chunk == 0 and 4 * taken <= device.shared_bytes:
                return tile
        raise InputError(f"head_dim {spec.head_dim} is too large for prefill attention on a GPU")

    @property
    def staging(self) -> int:
        """float32 values that hold a piece of query and keys, or 16 or more rows of values."""
        pitch = self.chunk * SIDE + 1
        return max((self.rows + self.keys) * SIDE * pitch, SIDE * SIDE * self.dims)

    @property
    def value_rows(self) -> int:
        """Keys of a thread whose values are staged together."""
        fit = self.staging // (SIDE * SIDE * self.dims)
        return max(n for n in range(1, self.keys + 1) if self.keys % n == 0 and n <= fit)

    @property
    def weights(self) -> int:
        return self.rows * SIDE * (self.keys * SIDE + 1)

    @property
    def partial(self) -> int:
        return self.rows * SIDE * (SIDE + 1)


def prefill(
    spec: KVCacheSpec, device: GPUDevice, *, paged: bool, tree: bool = False, flat_order: bool
) -> tirx.PrimFunc:
    name = f"attn_{'tree' if tree else 'prefill'}_{'paged' if paged else 'ragged'}"
    tile = Tile.of(spec, device)
    rows, keys, chunk, dims = tile.rows, tile.keys, tile.chunk, tile.dims
    d, q_heads, kv_heads = spec.head_dim, spec.num_qo_heads, spec.num_kv_heads
    group, window = spec.group_size, spec.sliding_window is not None
    layered = spec.layer_window is not None
    height, width = rows * SIDE, keys * SIDE
    pitch, pitch_p, pitch_r = chunk * SIDE + 1, width + 1, SIDE + 1
    keys_at = height * pitch  # of the keys' piece in the stage

    def inside(e: Expr) -> Expr:
        """Beyond the head size the last dimension repeats: the query is 0 there."""
        return T.min(e, i32(d - 1)) if d % SIDE else e

    def tile_of(a: SimpleNamespace, index: Expr) -> tuple[Expr, Expr]:
        """(sequence or -1, its first row) of a group's tile; the same in all its threads."""
        found = registers(2, "int32")
        found[0], found[1] = i32(-1), index
        with T.serial(a.extent.ends - 1) as s:
            count = hold(pieces((a.qo_indptr[s + 1] - a.qo_indptr[s]) * group, height))
            found[0] = T.Select(all_of(found[0] < 0, found[1] < count), s, found[0])
            found[1] -= T.Select(found[0] < 0, count, i32(0))
        return bind(found[0]), hold(found[1] * height)

    def lowest_position(a: SimpleNamespace, low: Expr, high: Expr) -> Expr:
        """Of rows `low` to `high`: in a tree, and where sequences share a prefix, in no order."""
        found = registers(1, "int32")
        found[0] = a.q_position[low]
        with T.serial(high - low) as i:
            found[0] = T.min(found[0], a.q_position[low + (i + 1)])
        return bind(found[0])

    def ragged_span(a: SimpleNamespace, b: Expr, ahead: Expr, position: Expr | None) -> Span:
        """Keys of this round for rows from the one with `ahead` keys before it on, or from the one
        of this position on."""
        end = hold(a.kv_indptr[b + 1] - a.kv_indptr[b])
        if layered and tree:  # no argument says where the keys begin, but the first row
            row = bind(a.qo_indptr[b])
            offset = a.q_position[row] + (a.qo_indptr[b + 1] - row) - end
            return ir.layer_span(spec, a, end, position, offset)
        if layered:
            return ir.layer_span(spec, a, end, position, a.k_offset[b])
        if not window:
            return Span(end, end)
        # With sinks from the start: they are the first keys of the whole text.
        skip = 0 if spec.attention_sink else window_start(spec, ahead + end, i32(0), i32(0))
        skip = hold(i32(0) + skip)
        return Span(end - skip, end, sinks=i32(0), gap=skip, shift=bind(a.k_offset[b]))

    def body(a: SimpleNamespace) -> None:
        tiles = divide(a.extent.rows * group, height) + (a.extent.ends - 1)
        causal = a.causal > 0 if hasattr(a, "causal") and not (paged and window) else None
        with launch(THREADS, tiles, kv_heads) as (t, index, h):
            x, y = ir.remainder(t, SIDE), divide(t, SIDE)
            b, first = tile_of(a, index)
            with when(b >= 0):
                tile_body(a, t, x, y, h, b, first, causal)

    def tile_body(
        a: SimpleNamespace,
        t: Expr,
        x: Expr,
        y: Expr,
        h: Expr,
        b: Expr,
        first: Expr,
        causal: Expr | None,
    ) -> None:
        stage, p, meet = shared(tile.staging), shared(tile.weights), shared(tile.partial)
        score, output = registers(rows * keys), registers(rows * dims)
        top, total, alpha = registers(rows), registers(rows), registers(rows)
        left, right = registers(rows), registers(max(keys, dims))
        q_row, low, high = (registers(rows, "int32") for _ in range(3))
        key_row, key_position = registers(keys, "int32"), registers(keys, "int32")
        begin = registers(rows, "int32") if layered else low
        loader = ir.KeyLoader(spec, t)
        k, v = (a.pages, a.pages) if paged else (a.k, a.v)

        q_start = bind(a.qo_indptr[b])
        q_len = hold(a.qo_indptr[b + 1] - q_start)
        last = hold(T.min(first + height, q_len * group) - 1)
        token = hold(divide(first, group))
        key_start = bind(a.page_indptr[b] if paged else a.kv_indptr[b])
        position = None
        if layered:
            position = lowest_position(a, q_start + token, q_start + divide(last, group))
        elif paged and window:
            position = a.q_position[q_start + token]
        if paged:
            span = ir.paged_span(spec, a, b, position)
        else:
            span = ragged_span(a, b, token - q_len, position)
        end, stop = span.end, span.total
        if causal is not None:
            seen = divide(last, group) + 1 + (end - q_len) - span.gap
            stop = T.Select(causal, T.min(seen, stop), stop)
        stop = hold(T.max(stop, 0))
        if tree:
            tree_start = bind(a.tree_indptr[b])
            nodes = hold(a.tree_indptr[b + 1] - tree_start)
            stem = hold(end - nodes)

        def order(node: Expr, which: int) -> Expr:
            # [0]: the node's place in depth-first order, [1]: the end of its subtree
            return a.tree_order[(tree_start + node) * 2 + which]

        def is_above(node: Expr, place: Expr) -> Expr:
            """Whether a node is that in this place, or an ancestor of it."""
            return all_of(order(node, 0) <= place, place < order(node, 1))

        def from_ancestor(a: SimpleNamespace, depth: Expr, place: Expr, otherwise: Expr) -> Expr:
            """The slot of a node's first ancestor within the layer's window; `otherwise` where the
            node lies less deep in the tree than that. Ancestors come in order."""
            reach = spec.layer_window or 0
            deep = hold(T.Select(all_of(a.sm_scale < f32(0), depth >= reach), nodes, i32(0)))
            met, found = registers(1, "int32"), registers(1, "int32")
            met[0], found[0] = i32(0), otherwise
            with T.serial(deep) as i:
                node = hold(nodes - 1 - i)
                above = hold(T.Select(is_above(node, place), i32(1), i32(0)))
                met[0] += above
                found[0] = T.Select(all_of(above > 0, met[0] <= reach), stem + node, found[0])
            return bind(found[0])

        # Row i sees slots low[i] (or its place in the tree) to high[i] - 1, and the sinks; of
        # these, in a layer with a window, from begin[i] on.
        for i in range(rows):
            row = hold(T.min(first + (y + i * SIDE), last))
            at = hold(divide(row, group))
            q_row[i] = ((q_start + at) * q_heads + h * group + (row - at * group)) * d
            ahead = end - q_len + at
            high[i] = end if causal is None else T.Select(causal, T.min(ahead + 1, end), end)
            if tree:
                low[i] = order(nodes - q_len + at, 0)
            elif window:
                where = a.q_position[q_start + at] - span.shift if paged else ahead
                low[i] = window_start(spec, where, i32(0), span.begin + i32(0))
            if layered:
                position = bind(a.q_position[q_start + at])
                begin[i] = ir.layer_start(spec, a, position, span.shift)
                if tree:
                    below_root = position - span.shift - stem
                    begin[i] = from_ancestor(a, below_root, low[i], begin[i])
        top.fill(rows, EMPTY)
        total.fill(rows, 0)
        output.fill(rows * dims, 0)

        def visible(n: Expr, slot: Expr, i: int) -> Expr:
            sees = all_of(n < stop, slot < high[i])
            if layered:
                sees = all_of(sees, slot >= begin[i])
            if tree:
                node = T.max(T.min(slot - stem, nodes - 1), 0)
                return all_of(sees, tirx.any(slot < stem, is_above(node, low[i])))
            if not window:
                return sees
            first_keys = n < span.sinks if paged else span.shift + slot < spec.attention_sink
            return all_of(sees, tirx.any(first_keys, slot >= low[i]))

        with T.serial(pieces(stop, width)) as step:
            for j in range(keys):  # beyond the end the last: masked keys must be finite
                n = hold(T.min(step * width + (y + j * SIDE), stop - 1))
                slot = hold(span.slot(n))
                key_position[j] = span.position(n, slot)
                if paged:
                    page = a.page_indices[key_start + divide(slot, PAGE_SIZE)]
                    key_row[j] = ir.page_element(spec, page, h, slot)
                else:
                    key_row[j] = ((key_start + slot) * kv_heads + h) * d

            score.fill(rows * keys, 0)
            with T.serial(dims // chunk) as c:
                barrier()
                for u in range(chunk):
                    e = c * (chunk * SIDE) + (x + u * SIDE)
                    for i in range(rows):
                        value = a.q[q_row[i] + inside(e)] * ir.score_scale(spec, a.sm_scale)
                        if d % SIDE:
                            value = T.Select(e < d, value, f32(0))
                        stage[(y + i * SIDE) * pitch + (x + u * SIDE)] = value
                    for j in range(keys):
                        value = loader.one(k, key_row[j], inside(e), key_position[j])
                        stage[(y + j * SIDE) * pitch + (x + (keys_at + u * SIDE))] = value
                barrier()
                with T.serial(chunk * SIDE) as e:
                    for i in range(rows):
                        left[i] = stage[(y + i * SIDE) * pitch + e]
                    for j in range(keys):
                        right[j] = stage[(x + j * SIDE) * pitch + (e + keys_at)]
                    for i in range(rows):
                        for j in range(keys):
                            score[i * keys + j] += left[i] * right[j]

            for j in range(keys):
                n = hold(step * width + (x + j * SIDE))
                slot = hold(span.slot(n))
                for i in range(rows):
                    at = i * keys + j
                    value = ir.capped(spec, score[at])
                    score[at] = T.Select(visible(n, slot, i), value, f32(NEGATIVE))
            for i in range(rows):
                best = score[i * keys]
                for j in range(1, keys):
                    best = T.max(best, score[i * keys + j])
                meet[(y + i * SIDE) * pitch_r + x] = best
            barrier()
            for i in range(rows):
                alpha[i] = top[i]
                with T.serial(SIDE) as z:
                    top[i] = T.max(top[i], meet[(y + i * SIDE) * pitch_r + z])
                alpha[i] = T.exp2(alpha[i] - top[i])
                total[i] *= alpha[i]
                for j in range(keys):
                    weight = hold(T.exp2(score[i * keys + j] - top[i]))
                    total[i] += weight
                    p[(y + i * SIDE) * pitch_p + (x + j * SIDE)] = weight
                for u in range(dims):
                    output[i * dims + u] *= alpha[i]

            for start in range(0, keys, tile.value_rows):
                if start:
                    barrier()
                for j in range(tile.value_rows):
                    at = key_row[start + j] + (ir.value_distance(spec) if paged else 0)
                    for u in range(dims):
                        e = x + u * SIDE
                        stage[(y + j * SIDE) * (dims * SIDE) + e] = v[at + inside(e)]
                barrier()
                with T.serial(tile.value_rows * SIDE) as n:
                    for i in range(rows):
                        left[i] = p[(y + i * SIDE) * pitch_p + (n + start * SIDE)]
                    for u in range(dims):
                        right[u] = stage[n * (dims * SIDE) + (x + u * SIDE)]
                    for i in range(rows):
                        for u in range(dims):
                            output[i * dims + u] += left[i] * right[u]

        for i in range(rows):
            meet[(y + i * SIDE) * pitch_r + x] = total[i]
        barrier()
        for i in range(rows):
            total[i] = 0
            with T.serial(SIDE) as z:
                total[i] += meet[(y + i * SIDE) * pitch_r + z]
            with when(first + (y + i * SIDE) <= last):
                inverse = hold(f32(1) / T.max(total[i], f32(SMALLEST)))
                for u in range(dims):
                    with when(x + u * SIDE < d):  # always, and so no condition, but at the edge
                        a.out[q_row[i] + (x + u * SIDE)] = output[i * dims + u] * inverse
                with when(x == 0):
                    value = top[i] + T.log2(T.max(total[i], f32(SMALLEST)))
                    a.lse[divide(q_row[i], d)] = value

    return ir.build(name, spec, ARGUMENTS[name], body, flat_order=flat_order)
