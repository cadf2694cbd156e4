"""Many rows times a weight: dequantise a tile of columns once, then multiply it with all rows.

- x is first rewritten as float32 panels of a few rows, so that a tile reads one contiguous stream.
- Each task takes `width` output columns: it dequantises (or converts) their weights into a float32
  tile [K, width] that stays in the core's own cache, transposing in registers, then runs over the
  panels.
- The micro-kernel keeps a block of rows x vectors of the output in registers. Rows that do not fill
  a panel go through smaller blocks of the same code, so 2 rows don't cost 8.
- Loops are left rolled wherever LLVM needs no unrolling for speed: TVM's passes, not LLVM, dominate
  the compile time of unrolled code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._gemv import block_start
from mlc_compile.targets.cpu_kernels._packed import Groups, places, unpack, words_of_run
from mlc_compile.targets.cpu_kernels._vector import F32, Buffer, Expr

STEP = 4  # elements of K per step of the micro-kernel
MAX_PARTS = 8
PANELS_ON_ONE_CORE = 2  # waking the other cores costs more than packing this many panels


class Blocking(NamedTuple):
    """rows x vectors of the output live in registers; lanes are float32 elements of a vector."""

    rows: int
    vectors: int
    lanes: int

    @property
    def width(self) -> int:
        return self.vectors * self.lanes


def blocking(n: int, vector_bits: int) -> Blocking:
    """Sized for the registers: 32 with AVX-512, else 16 (true of SSE and AVX2; NEON has 32)."""
    rows, vectors = (8, 3) if vector_bits >= 512 else (4, 3)
    lanes = min(vector_bits // 32, vec.power_of_two(n))
    return Blocking(rows, min(vectors, n // lanes), lanes)


WithRow = Callable[[Expr, Callable[[Expr], None]], None]
"""Emits a use of the r-th row of a panel, given its number, if there is such a row."""


def pack_panel(
    x: Buffer,
    panels: Buffer,
    panel: Expr,
    with_row: WithRow,
    k: int,
    padded: int,
    rows: int,
    lanes: int,
) -> None:
    """The panel's rows of x as float32 [K / STEP][rows][STEP]; missing rows are not written."""
    base = vec.bind(panel * vec.i64(padded * rows))

    def put(at: Expr, r: Expr, value: Expr, width: int, lane: int = 0) -> None:
        step = base + at * vec.i64(rows)
        vec.store(panels, [step + r * vec.i64(STEP) + vec.i64(lane)], value, width)

    def pack(r: Expr, row: Expr) -> None:
        if k >= lanes:
            with vec.serial(k // lanes) as i:
                at = vec.bind(i * vec.i64(lanes))
                value = vec.bind(vec.load_float(x, [row, at], lanes))
                for part in range(0, lanes, STEP):
                    quarter = (
                        value if lanes == STEP else vec.shuffle([value], range(part, part + STEP))
                    )
                    put(at + vec.i64(part), r, quarter, STEP)
        for at in range(k - k % lanes, padded, STEP):
            if at + STEP <= k:
                put(vec.i64(at), r, vec.load_float(x, [row, at], STEP), STEP)
                continue
            put(vec.i64(at), r, vec.const(0.0, F32, STEP), STEP)
            for i in range(at, k):
                value = vec.load_float(x, [row, i], 1)
                put(vec.i64(at), r * vec.i64(1) + vec.i64(0), value, 1) if i == at else vec.store(
                    panels, [base + vec.i64(at * rows + i - at) + r * vec.i64(STEP)], value, 1
                )

    with vec.serial(rows) as r:
        with_row(r, lambda row: pack(r, row))


def _tile_packed_nk(
    weight: tuple[Buffer, ...],
    tile: Buffer,
    column: Expr,
    k: int,
    scheme: QuantScheme,
    block: Blocking,
) -> None:
    """Rows column.. of the packed weight -> tile[:, :] in float32, transposed square by square."""
    lanes, per_group = block.lanes, scheme.words_per_group
    words = scheme.num_words(k)
    q_weight, groups = weight[0], Groups(weight, scheme)
    run = words_of_run(scheme, words, lanes)

    with vec.serial(block.vectors) as v:
        first = vec.bind(column + v * vec.i64(lanes))
        offset = vec.bind(v * vec.i64(lanes))

        def unpack_run(word: Expr, count: int, words: Callable[[Expr], Expr]) -> None:
            group = vec.bind(tirx.floordiv(word, vec.i64(per_group)))
            scale, zero = groups.of_rows(first, group, lanes)
            emit_group(words, count, scale, zero, tile, (word, offset), scheme, lanes)

        # Squares begin and end where runs do; a last one that would overhang is moved back.
        if run is not None:
            square = vec.buffer((lanes, lanes), "uint32")
            with vec.serial(-(-words // lanes)) as chunk:
                start = block_start(chunk, lanes, words)
                done = vec.bind(tirx.floordiv(chunk * vec.i64(lanes) - start, vec.i64(run)))
                rows = [
                    vec.bind(vec.load(q_weight, [first + vec.i64(r), start], lanes))
                    for r in range(lanes)
                ]
                for r, value in enumerate(vec.transpose(rows, lanes)):
                    vec.store(square, [r, 0], value, lanes)
                with vec.serial(vec.i64(lanes // run) - done) as g:
                    at = vec.bind((g + done) * vec.i64(run))

                    def word_of(w: Expr, at: Expr = at) -> Expr:
                        return vec.load(square, [at + w, 0], lanes)

                    unpack_run(vec.bind(start + at), run, word_of)
        else:
            with vec.serial(words // per_group) as group:
                word = vec.bind(group * vec.i64(per_group))
                unpack_run(
                    word, per_group, lambda w: vec.load_rows(q_weight, first, word + w, lanes)
                )


def emit_group(
    words: Callable[[Expr], Expr],
    count: int,
    scale: Expr,
    zero: Expr | None,
    tile: Buffer,
    at: tuple[Expr, Expr],
    scheme: QuantScheme,
    lanes: int,
) -> None:
    """Unpack `count` words of one group, vectors along N, into the tile from (word, column) `at`
    on."""
    word, offset = at
    scale = vec.bind(scale)
    zero = None if zero is None else vec.bind(zero)
    scales = {
        position: vec.bind(scale * vec.const(2.0**-position, F32, lanes))
        for position in sorted({field.position for field in places(scheme)})
    }
    with vec.serial(count) as w:
        row = vec.bind((word + w) * vec.i64(scheme.elems_per_word))
        for field, weight in unpack(words(w), scheme, lanes, zero):
            scaled = weight * scales[field.position]
            vec.store(tile, [row + vec.i64(field.element), offset], scaled, lanes)


def _tile_packed_kn(
    weight: tuple[Buffer, ...],
    tile: Buffer,
    column: Expr,
    k: int,
    scheme: QuantScheme,
    block: Blocking,
) -> None:
    """Columns column.. of the packed weight, stored [words, N] -> tile[:, :] in float32. Codes are
    symmetric."""
    q_weight, q_scale = weight
    lanes, per_group = block.lanes, scheme.words_per_group
    with vec.serial(scheme.num_groups(k)) as group, vec.serial(block.vectors) as v:
        offset = vec.bind(v * vec.i64(lanes))
        first = vec.bind(column + offset)
        word = vec.bind(group * vec.i64(per_group))
        emit_group(
            lambda w: vec.load(q_weight, [word + w, first], lanes),
            per_group,
            vec.load_float(q_scale, [group, first], lanes),
            None,
            tile,
            (word, offset),
            scheme,
            lanes,
        )


def _tile_plain_nk(
    weight: Buffer, tile: Buffer, column: Expr, k: int, padded: int, block: Blocking
) -> None:
    lanes = block.lanes
    with vec.serial(block.vectors) as v:
        first = vec.bind(column + v * vec.i64(lanes))
        offset = vec.bind(v * vec.i64(lanes))
        if k >= lanes:
            with vec.serial(k // lanes) as chunk:
                at = vec.bind(chunk * vec.i64(lanes))
                rows = [
                    vec.bind(vec.load_float(weight, [first + vec.i64(r), at], lanes))
                    for r in range(lanes)
                ]
                for i, value in enumerate(vec.transpose(rows, lanes)):
                    vec.store(tile, [at + vec.i64(i), offset], value, lanes)
        if k % lanes:
            with vec.serial(k % lanes) as i:
                at = vec.bind(i + vec.i64(k - k % lanes))
                value = vec.load_float_rows(weight, first, at, lanes)
                vec.store(tile, [at, offset], value, lanes)
        if padded > k:
            with vec.serial(padded - k) as i:
                vec.store(tile, [i + vec.i64(k), offset], vec.const(0.0, F32, lanes), lanes)


def padded_depth(k: int, scheme: QuantScheme | None) -> int:
    """K in whole groups and steps."""
    padded = k if scheme is None else scheme.num_words(k) * scheme.elems_per_word
    return -(-padded // STEP) * STEP


def x_lanes(vector_bits: int) -> int:
    """Lanes in which `pack_panel` reads x."""
    return max(STEP, vector_bits // 32)


def fill_tile(
    weight: tuple[Buffer, ...],
    tile: Buffer,
    column: Expr,
    k: int,
    padded: int,
    scheme: QuantScheme | None,
    block: Blocking,
) -> None:
    """The output columns `column`.. of the weight -> tile [padded, width] in float32."""
    if scheme is None:
        _tile_plain_nk(weight[0], tile, column, k, padded, block)
    elif scheme.layout == "NK":
        _tile_packed_nk(weight, tile, column, k, scheme, block)
    else:
        _tile_packed_kn(weight, tile, column, k, scheme, block)


def multiply(
    panels: Buffer,
    tile: Buffer,
    panel: Expr,
    height: int,
    with_row: WithRow,
    *,
    out: Buffer,
    column: Expr,
    bias: Buffer | None,
    block: Blocking,
    padded: int,
) -> None:
    """out[rows of a panel, column ..] = the panel's first `height` rows times the tile, + bias."""
    lanes, rows = block.lanes, block.rows
    sums = [vec.accumulators(block.vectors, lanes) for _ in range(height)]
    for v in range(block.vectors):
        first = vec.const(0.0, F32, lanes)
        if bias is not None:
            first = vec.bind(vec.load_float(bias, [column + vec.i64(v * lanes)], lanes))
        for per_row in sums:
            vec.put(per_row[v], first, lanes)
    base = vec.bind(panel * vec.i64(padded * rows))
    with vec.serial(padded // STEP) as step, vec.serial(STEP) as i:
        depth = vec.bind(step * vec.i64(STEP) + i)
        columns = [
            vec.bind(vec.load(tile, [depth, v * lanes], lanes)) for v in range(block.vectors)
        ]
        start = vec.bind(base + step * vec.i64(STEP * rows) + i)
        for r, per_row in enumerate(sums):
            activation = vec.load(panels, [start + vec.i64(r * STEP)], 1)
            activation = vec.bind(vec.splat(activation, lanes))
            for total, value in zip(per_row, columns, strict=True):
                vec.put(total, vec.get(total, lanes) + activation * value, lanes)

    def put(row: Expr, totals: Sequence[Buffer]) -> None:
        for v, total in enumerate(totals):
            at = column + vec.i64(v * lanes)
            vec.store_float(out, [row, at], vec.get(total, lanes), lanes)

    for r, per_row in enumerate(sums):
        with_row(vec.i64(r), partial(put, totals=per_row))


def partial_heights(count: Expr, block: Blocking) -> tuple[Expr, Expr, list[tuple[int, Expr]]]:
    """How `count` rows fall into panels: (panels to multiply whole, rows left, [(height, whether
    those are for a block of this height)]): a last panel that is at most half full goes through a
    smaller block."""
    rows = block.rows
    heights = (rows // 2, rows // 4)
    full = vec.bind(tirx.floordiv(count + vec.i64(rows - 1 - heights[0]), vec.i64(rows)))
    left = vec.bind(count - full * vec.i64(rows))
    fits = [
        (height, tirx.all(left > vec.i64(smaller), left <= vec.i64(height)))
        for height, smaller in zip(heights, (heights[1], 0), strict=True)
    ]
    return full, left, fits


def gemm(
    x: Buffer,
    weight: tuple[Buffer, ...],
    bias: Buffer | None,
    out: Buffer,
    *,
    n_rows: Expr,
    shape: tuple[int, int],
    scheme: QuantScheme | None,
    vector_bits: int,
    num_cores: int,
) -> None:
    """x [n, K] times (q_weight, q_scale) or a plain [N, K] -> out [n, N]; shape is (N, K)."""
    n, k = shape
    block = blocking(n, vector_bits)
    rows, width, padded = block.rows, block.width, padded_depth(k, scheme)

    count = vec.bind(tirx.floordiv(n_rows + vec.i64(rows - 1), vec.i64(rows)))
    panels = vec.buffer((count * vec.i64(padded * rows),), F32)

    def rows_of(panel: Expr) -> WithRow:
        def with_row(r: Expr, use: Callable[[Expr], None]) -> None:
            row = vec.bind(panel * vec.i64(rows) + r)
            with T.If(row < n_rows), T.Then():
                use(row)

        return with_row

    def pack(panel: Expr) -> None:
        pack_panel(x, panels, panel, rows_of(panel), k, padded, rows, x_lanes(vector_bits))

    with T.If(count <= vec.i64(PANELS_ON_ONE_CORE)):
        with T.Then(), vec.serial(count) as panel:
            pack(panel)
        with T.Else(), vec.parallel(count) as panel:
            pack(panel)

    full, _, fits = partial_heights(n_rows, block)

    # Few tiles for many cores: also split the panels. Each part dequantises for itself.
    tiles = -(-n // width)
    parts = max(1, min(MAX_PARTS, 2 * num_cores // tiles))
    with vec.parallel(tiles * parts) as task:
        column = block_start(tirx.floordiv(task, vec.i64(parts)), width, n)
        part = vec.bind(tirx.floormod(task, vec.i64(parts)))
        begin = vec.bind(tirx.floordiv(count * part, vec.i64(parts)))
        end = vec.bind(tirx.floordiv(count * (part + vec.i64(1)), vec.i64(parts)))

        def product(tile: Buffer, panel: Expr, height: int) -> None:
            operands = {"out": out, "column": column, "bias": bias}
            multiply(
                panels, tile, panel, height, rows_of(panel), block=block, padded=padded, **operands
            )

        with T.If(begin < end), T.Then():
            tile = vec.buffer((padded, width), F32)
            fill_tile(weight, tile, column, k, padded, scheme, block)
            with vec.serial(tirx.min(end, full) - begin) as i:
                product(tile, begin + i, rows)
            for height, fit in fits:
                with T.If(tirx.all(end > full, fit)), T.Then():
                    product(tile, full, height)
