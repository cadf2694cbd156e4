"""Attention of one row of each sequence to its cached pages, cut along the keys.

- A group serves one sequence, one KV head (its query heads together) and one range of keys. A
  second launch merges the ranges; with one range the first launch writes the result.
- `lanes` threads share a key, each with every `lanes`-th dimension, so that neighbours read
  neighbours; a query row and a partial output row stay in registers.
- A block of keys is scored in rounds (partial sums meet in shared memory), then its softmax is
  taken once, then its values are summed without a barrier.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels._attn_math import NEGATIVE
from mlc_compile.targets.gpu_kernels import _attention_ir as ir
from mlc_compile.targets.gpu_kernels._attention_ir import (
    EMPTY,
    SMALLEST,
    THREADS,
    Expr,
    divide,
    hold,
    registers,
    remainder,
    shared,
)
from mlc_compile.targets.gpu_kernels._emit import barrier, bind, f32, i32, launch, when
from mlc_compile.targets.kv_cache import PAGE_SIZE, KVCacheSpec

BLOCK = THREADS
"""Keys of one softmax block: one thread each."""

SPLIT_PAGES = 4
"""Pages of a range: fewer leave too little work beside the merge."""

MAX_SPLITS = 32

TOGETHER = 8
"""Ranges that the merge loads at a time: one by one, it would wait for each of them."""

FOLD = 16
"""Threads that fold a block's maximum or sum, each a sixteenth of it."""

ARGUMENTS = (
    "q pages page_indptr page_indices length_info k_offset q_position out lse "
    "rotary_mode rope_scale rope_theta sm_scale"
)


@dataclass(frozen=True)
class Shape:
    """Loop shapes of a decode group.

    Attributes:
        lanes: threads that share a key.
        dims: dimensions of a thread.
        heads: query heads of a group, a divisor of the heads that share a KV head.
        batch: keys that a thread loads in a row.
    """

    lanes: int
    dims: int
    heads: int
    batch: int

    @staticmethod
    def of(spec: KVCacheSpec) -> Shape:
        # Query and output take heads x dims registers each; 32 leaves room on every GPU.
        lanes = 16 if min(spec.group_size, 8) * spec.head_dim <= 16 * 32 else 32
        dims = -(-spec.head_dim // lanes)
        divisors = [n for n in range(1, 9) if spec.group_size % n == 0]
        heads = max(n for n in divisors if n == 1 or n * dims <= 32)
        # A rotated key is long code, and enough work, by itself.
        many = (4, 2, 1) if spec.sliding_window is None else (1,)
        keys = THREADS // lanes
        batch = next(n for n in many if n == 1 or n * keys * heads * (lanes + 1) <= 3328)
        return Shape(lanes, dims, heads, batch)


def decode(spec: KVCacheSpec) -> tirx.PrimFunc:
    shape = Shape.of(spec)
    lanes, dims, heads, batch = shape.lanes, shape.dims, shape.heads, shape.batch
    d, q_heads, kv_heads = spec.head_dim, spec.num_qo_heads, spec.num_kv_heads
    blocks, side, width = spec.group_size // heads, THREADS // lanes, lanes * dims
    turn, pitch = batch * side, lanes + 1  # keys of a round; partial sums of a key and a gap
    windows = spec.sliding_window is not None or spec.layer_window is not None
    part_size = d + 2  # of a range: output before division, maximum, sum

    def body(a: SimpleNamespace) -> None:
        rows = a.extent.rows
        share = tirx.truncdiv(a.extent.id_count + (SPLIT_PAGES - 1), T.max(rows, 1) * SPLIT_PAGES)
        splits = bind(T.max(T.min(share, MAX_SPLITS), 1))
        workspace = (rows * splits * (q_heads * part_size),)
        if spec.layer_window is not None:  # the host knows all pages, a window has few of them
            fit = min(max(spec.layer_window // (SPLIT_PAGES * PAGE_SIZE), 1), MAX_SPLITS)
            few = T.Select(a.sm_scale < f32(0), i32(fit), i32(MAX_SPLITS))
            splits = bind(T.min(splits, few))
        part = ir.Cells(T.alloc_buffer(workspace, "float32", layout=None))

        with launch(THREADS, rows * (kv_heads * blocks), splits) as (t, x, split):
            meet = shared(max(turn * heads * pitch, side * width, heads * THREADS))
            score, folded = shared(heads * BLOCK), shared(heads * (FOLD + 1))
            query, output = registers(heads * dims), registers(heads * dims)
            top, total, alpha, sums = (registers(heads) for _ in range(4))
            whole = registers(1)
            keys = ir.KeyLoader(spec, t)
            b = hold(divide(x, kv_heads * blocks))
            unit = hold(x - b * (kv_heads * blocks))
            head, h = hold(b * q_heads + unit * heads), hold(divide(unit, blocks))
            lane, key_lane = remainder(t, lanes), divide(t, lanes)
            first_page = bind(a.page_indptr[b])
            span = ir.paged_span(spec, a, b, a.q_position[b] if windows else None)
            # Whole pages: two ranges would both read a page that they share.
            share = tirx.truncdiv(ir.pieces(span.total, PAGE_SIZE) + (splits - 1), splits)
            begin = hold(split * share * PAGE_SIZE)
            end = hold(T.min(span.total, begin + share * PAGE_SIZE))
            # Beyond the head size the last dimension repeats, with a query of 0.
            columns = [T.min(lane + i * lanes, d - 1) if width > d else lane + i * lanes
                       for i in range(dims)]  # fmt: skip

            top.fill(heads, EMPTY)
            total.fill(heads, 0)
            output.fill(heads * dims, 0)
            for g in range(heads):
                for i, e in enumerate(columns):
                    value = a.q[(head + g) * d + e] * ir.score_scale(spec, a.sm_scale)
                    if width > d:
                        value = T.Select(lane + i * lanes < d, value, f32(0))
                    query[g * dims + i] = value
            barrier()

            with T.serial(ir.pieces(T.max(end - begin, 0), BLOCK)) as block:
                first = hold(begin + block * BLOCK)
                rounds = hold(ir.pieces(T.min(end - first, BLOCK), turn))
                used = hold(rounds * turn)

                def key_of(r: Expr, u: int) -> tuple[Expr, Expr]:
                    """(element, position) of a key of this thread; beyond the end the last one."""
                    n = hold(T.min(first + r * turn + (key_lane + u * side), end - 1))
                    slot = hold(span.slot(n))
                    page = a.page_indices[first_page + divide(slot, PAGE_SIZE)]
                    return hold(ir.page_element(spec, page, h, slot)), span.position(n, slot)

                with T.serial(rounds) as r:
                    for u, (at, where) in enumerate([key_of(r, u) for u in range(batch)]):
                        sums.fill(heads, 0)
                        for i, value in keys.some(a.pages, at, columns, lanes, where):
                            value = hold(value)
                            for g in range(heads):
                                sums[g] += query[g * dims + i] * value
                        for g in range(heads):
                            meet[(key_lane + (g * turn + u * side)) * pitch + lane] = sums[g]
                    barrier()
                    for w in range(-(-turn * heads // THREADS)):
                        item = t + w * THREADS
                        with when(item < turn * heads):
                            whole[0] = 0
                            with T.serial(lanes) as j:
                                whole[0] += meet[item * pitch + j]
                            key = hold(r * turn + remainder(item, turn))
                            value = ir.capped(spec, whole[0])
                            value = T.Select(first + key < end, value, f32(NEGATIVE))
                            score[divide(item, turn) * BLOCK + key] = value
                    barrier()

                fold = divide(t, FOLD) * (FOLD + 1) + remainder(t, FOLD)
                with when(t < heads * FOLD):
                    whole[0] = EMPTY
                    with T.serial(ir.pieces(used, FOLD)) as y:
                        at = hold(y * FOLD + remainder(t, FOLD))
                        seen = T.Select(at < used, score[divide(t, FOLD) * BLOCK + at], f32(EMPTY))
                        whole[0] = T.max(whole[0], seen)
                    folded[fold] = whole[0]
                barrier()
                for g in range(heads):
                    alpha[g] = top[g]
                    with T.serial(FOLD) as j:
                        top[g] = T.max(top[g], folded[g * (FOLD + 1) + j])
                    alpha[g] = T.exp2(alpha[g] - top[g])
                    weight = T.exp2(score[g * BLOCK + t] - top[g])
                    sums[g] = T.Select(t < used, weight, f32(0))
                    total[g] = total[g] * alpha[g] + sums[g]
                    for i in range(dims):
                        output[g * dims + i] *= alpha[g]
                for g in range(heads):  # apart from the reads: TVM puts a barrier between the two
                    score[g * BLOCK + t] = sums[g]
                barrier()
                with T.serial(rounds) as r:
                    for u, (at, _) in enumerate([key_of(r, u) for u in range(batch)]):
                        key = hold(r * turn + (key_lane + u * side))
                        for g in range(heads):
                            sums[g] = score[g * BLOCK + key]
                        for i, e in enumerate(columns):
                            value = bind(a.pages[at + ir.value_distance(spec) + e])
                            for g in range(heads):
                                output[g * dims + i] += sums[g] * value

            # The threads' shares come together: of the weights, then of each head's output.
            for g in range(heads):
                meet[g * THREADS + t] = total[g]
            barrier()
            with when(t < heads * FOLD):
                whole[0] = 0
                with T.serial(FOLD) as y:
                    at = divide(t, FOLD) * THREADS + y * FOLD + remainder(t, FOLD)
                    whole[0] += meet[at]
                folded[fold] = whole[0]
            barrier()
            for g in range(heads):
                total[g] = 0
                with T.serial(FOLD) as j:
                    total[g] += folded[g * (FOLD + 1) + j]
                for i in range(dims):
                    meet[key_lane * width + (lane + i * lanes)] = output[g * dims + i]
                barrier()
                at = hold(((head + g) * splits + split) * part_size)
                with when(t < d):
                    whole[0] = 0
                    with T.serial(side) as y:
                        whole[0] += meet[y * width + t]
                    with when(splits == 1):
                        a.out[(head + g) * d + t] = whole[0] / T.max(total[g], f32(SMALLEST))
                    with when(splits > 1):
                        part[at + t] = whole[0]
                with when(t == 0):
                    with when(splits == 1):
                        a.lse[head + g] = top[g] + T.log2(T.max(total[g], f32(SMALLEST)))
                    with when(splits > 1):
                        part[at + d] = top[g]
                        part[at + (d + 1)] = total[g]
                barrier()

        with when(splits > 1), launch(-(-d // 32) * 32, rows * q_heads) as (e, head, _):
            top, total, output = (registers(1) for _ in range(3))
            tops, totals, outputs = (registers(TOGETHER) for _ in range(3))
            top[0], total[0], output[0] = EMPTY, 0, 0
            with T.serial(ir.pieces(splits, TOGETHER)) as c:
                ranges = [c * TOGETHER + i for i in range(TOGETHER)]
                for i, s in enumerate(ranges):
                    at = hold((head * splits + T.min(s, splits - 1)) * part_size)
                    tops[i], totals[i] = part[at + d], part[at + (d + 1)]
                    outputs[i] = part[at + T.min(e, i32(d - 1))]
                best = top[0]
                for i in range(TOGETHER):
                    best = T.max(best, tops[i])
                best = hold(best)
                old = hold(T.exp2(top[0] - best))
                top[0], total[0], output[0] = best, total[0] * old, output[0] * old
                for i, s in enumerate(ranges):
                    weight = hold(T.Select(s < splits, T.exp2(tops[i] - best), f32(0)))
                    total[0] += weight * totals[i]
                    output[0] += weight * outputs[i]
            with when(e < d):
                a.out[head * d + e] = output[0] / T.max(total[0], f32(SMALLEST))
            with when(e == 0):
                a.lse[head] = top[0] + T.log2(T.max(total[0], f32(SMALLEST)))

    return ir.build("attn_decode", spec, ARGUMENTS, body)
