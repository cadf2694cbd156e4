"""Products with the chosen of many experts' weights on the CPU, as TIR PrimFuncs.

- An expert's weight is N more rows of one long matrix, and everything is the linear kernels' code
  at an offset into it.
- One token: a GEMV for each of its experts, all of them in one parallel region, which streams their
  weights near the memory's own speed.
- More tokens: the pairs of a token and an expert are sorted by expert. While an expert has few, its
  weights are read once, a few rows at a time, for one GEMV after the other; else they are unpacked
  tile by tile and multiplied with all its rows. Tasks go over columns first and experts second, so
  that threads share out the work evenly also where one expert has most of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cpu_kernels import _gemm, _gemv
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._chunks import Chunks
from mlc_compile.targets.cpu_kernels._packed import word_lanes
from mlc_compile.targets.cpu_kernels._vector import F32, Buffer, Expr
from mlc_compile.targets.kernels import ExpertLinearSpec

ROWS_OF_AN_EXPERT = 24
"""Up to so many pairs for each expert, were they spread evenly, products are GEMVs: unpacking a
weight into a tile takes as long as so many."""
TASK_BYTES = 128 << 10
"""Weights of a task of GEMVs: much more than is prefetched beyond its end."""


class _Operands:
    """The buffers of a kernel; weights as matrices [experts * N, ...]."""

    def __init__(self, spec: ExpertLinearSpec) -> None:
        self.rows = vec.i64(1) if spec.rows == 1 else T.int64()
        self.per_token = vec.i64(spec.per_token)
        self.pairs = self.rows * self.per_token
        buffers = [vec.argument(*entry) for entry in spec.arguments(self.rows)]
        self.x, self.experts, *weights, self.out = buffers
        self.weight = tuple(_matrix(weight, spec) for weight in weights)
        self.x_rows = self.rows if spec.shared_x else self.pairs
        self._shared_x = spec.shared_x

    def expert(self, pair: Expr) -> Expr:
        """The number of a pair's expert."""
        token = tirx.floordiv(pair, self.per_token)
        found = vec.load(self.experts, [token, tirx.floormod(pair, self.per_token)], 1)
        return vec.bind(vec.cast(found, "int64", 1))

    def x_row(self, pair: Expr) -> Expr:
        """The row of x that is a pair's."""
        return vec.bind(tirx.floordiv(pair, self.per_token)) if self._shared_x else pair


def _matrix(weight: Buffer, spec: ExpertLinearSpec) -> Buffer:
    """[experts, N, ...] as [experts * N, ...]."""
    shape = [vec.i64(spec.experts * spec.out_features), weight.shape[2]]
    return T.decl_buffer(shape, str(weight.dtype), data=weight.data, layout=None)


def expert_kernel(spec: ExpertLinearSpec, *, vector_bits: int) -> tirx.PrimFunc:
    """The kernel for `spec`: its `arguments`. Experts are not checked to be in 0..experts-1.

    vector_bits: widest vector registers of the target (512, 256 or 128).
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("expert_linear")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
        operands = _Operands(spec)
        lanes = max(vector_bits // 32, 1)
        if spec.rows == 1:
            _gemvs(spec, operands, None, lanes)
        else:
            height = _gemm.blocking(spec.out_features, vector_bits).rows
            groups = _Groups(operands, spec.experts, height)
            with T.If(operands.pairs <= vec.i64(ROWS_OF_AN_EXPERT * spec.experts)):
                with T.Then():
                    _gemvs(spec, operands, groups, lanes)
                with T.Else():
                    _grouped(spec, operands, groups, vector_bits)
    return builder.get()


def _gemvs(spec: ExpertLinearSpec, operands: _Operands, groups: _Groups | None, lanes: int) -> None:
    """Every pair by itself; with `groups`, those of an expert one after the other."""
    scheme, n, k = spec.scheme, spec.out_features, spec.in_features
    rows = min(_gemv.ROWS, n)
    blocks = -(-n // rows)
    words = 0 if scheme is None else scheme.num_words(k)
    most = tirx.min(operands.x_rows, vec.i64(max(ROWS_OF_AN_EXPERT * spec.experts, spec.per_token)))
    if scheme is None:
        width = k
        staged = vec.buffer((most * vec.i64(width),), F32)
        with vec.serial(operands.x_rows) as row:
            _gemv.stage(operands.x, row, k, k, lanes, staged, row * vec.i64(width))
    else:
        lanes, x_lanes = word_lanes(scheme, lanes, words), lanes
        width, padded = _gemv.slots(scheme, words), words * scheme.elems_per_word
        staged = vec.buffer((most * vec.i64(width),), F32)
        one = vec.buffer((padded,), F32)
        with vec.serial(operands.x_rows) as row:
            _gemv.stage(operands.x, row, k, padded, x_lanes, one, None)
            _gemv.by_field(one, scheme, words, lanes, staged, row * vec.i64(width))

    def product(pair: Expr, column: Expr, row: Expr) -> None:
        base = vec.bind(operands.x_row(pair) * vec.i64(width))
        if scheme is None:
            (weight,) = operands.weight
            sums = _gemv.plain_sums(staged, base, weight, row, rows=rows, k=k, lanes=lanes)
        else:
            sizes = {"rows": rows, "words": words, "lanes": lanes}
            sums = _gemv.packed_sums(staged, base, operands.weight, row, scheme=scheme, **sizes)
        _gemv.finish(sums, lanes, column, None, operands.out, pair)

    if groups is None:
        with vec.parallel(operands.pairs * vec.i64(blocks)) as task:
            pair = vec.bind(tirx.floordiv(task, vec.i64(blocks)))
            column = _gemv.block_start(tirx.floormod(task, vec.i64(blocks)), rows, n)
            product(pair, column, vec.bind(operands.expert(pair) * vec.i64(n) + column))
        return
    block_bytes = rows * (4 * words or k * operands.weight[0].dtype.bits // 8)
    each = max(TASK_BYTES // block_bytes, 1)
    with vec.parallel(groups.count * vec.i64(-(-blocks // each))) as task:
        begin = vec.bind(tirx.floordiv(task, groups.count) * vec.i64(each))
        expert, first, count = groups.pairs_of(tirx.floormod(task, groups.count))
        with vec.serial(tirx.min(vec.i64(blocks) - begin, vec.i64(each))) as block:
            column = vec.bind(_gemv.block_start(begin + block, rows, n))
            row = vec.bind(expert * vec.i64(n) + column)
            with vec.serial(count) as i:
                product(vec.bind(groups.load(groups.order, first + i)), column, row)


class _Groups:
    """Pairs sorted by expert, and cut into panels of `height` of the same expert.

    order [pairs]: the pairs, those of one expert side by side and in order.
    panel_first, panel_rows [panels]: the first place in `order` of a panel, and how many it has.
    used, used_rows, used_panel [count]: the experts that have pairs, how many, their first panel.
    """

    def __init__(self, operands: _Operands, experts: int, height: int) -> None:
        def integers(extent: Expr | int) -> Buffer:
            return vec.buffer((extent,), "int64")

        def at(buffer: Buffer, index: Expr | int) -> Expr:
            return vec.load(buffer, [index], 1)

        def put(buffer: Buffer, index: Expr | int, value: Expr) -> None:
            vec.store(buffer, [index], value, 1)

        self.load, self._operands = at, operands
        pairs = operands.pairs
        # Each used expert has at most one panel that is not full. A bound and not the number, as
        # TVM moves allocations to before any value is read.
        most = tirx.floordiv(pairs, vec.i64(height)) + tirx.min(pairs, vec.i64(experts))
        self.most_panels = most
        self.order = integers(pairs)
        self.panel_first, self.panel_rows = integers(most), integers(most)
        self.used, self.used_rows, self.used_panel = (integers(experts) for _ in range(3))
        following = integers(experts)  # a count, then the place in `order` of the next pair
        totals = integers(3)  # places in `order`, panels and experts so far
        for i in range(3):
            put(totals, i, vec.i64(0))
        with vec.serial(experts) as e:
            put(following, e, vec.i64(0))
        with vec.serial(pairs) as pair:
            e = operands.expert(pair)
            put(following, e, at(following, e) + vec.i64(1))
        with vec.serial(experts) as e:
            rows = vec.bind(at(following, e))
            first, panel = vec.bind(at(totals, 0)), vec.bind(at(totals, 1))
            put(following, e, first)
            with T.If(rows > vec.i64(0)), T.Then():
                number = vec.bind(at(totals, 2))
                put(self.used, number, e)
                put(self.used_rows, number, rows)
                put(self.used_panel, number, panel)
                panels = vec.bind(tirx.floordiv(rows + vec.i64(height - 1), vec.i64(height)))
                with vec.serial(panels) as i:
                    start = vec.bind(i * vec.i64(height))
                    put(self.panel_first, panel + i, first + start)
                    put(self.panel_rows, panel + i, tirx.min(rows - start, vec.i64(height)))
                put(totals, 0, first + rows)
                put(totals, 1, panel + panels)
                put(totals, 2, number + vec.i64(1))
        with vec.serial(pairs) as pair:
            e = operands.expert(pair)
            place = vec.bind(at(following, e))
            put(self.order, place, pair)
            put(following, e, place + vec.i64(1))
        self.panels, self.count = vec.bind(at(totals, 1)), vec.bind(at(totals, 2))

    def pairs_of(self, number: Expr) -> tuple[Expr, Expr, Expr]:
        """Of the used expert with this number: itself, its first place in `order`, its pairs."""
        number = vec.bind(number)
        panel = vec.bind(self.load(self.used_panel, number))
        first = vec.bind(self.load(self.panel_first, panel))
        expert, rows = self.load(self.used, number), self.load(self.used_rows, number)
        return vec.bind(expert), first, vec.bind(rows)

    def rows_of(self, panel: Expr) -> _gemm.WithRow:
        """The rows of x of a panel."""
        first = vec.bind(self.load(self.panel_first, panel))
        rows = vec.bind(self.load(self.panel_rows, panel))

        def with_row(r: Expr, use: Callable[[Expr], None]) -> None:
            with T.If(r < rows), T.Then():
                pair = vec.bind(self.load(self.order, first + r))
                use(self._operands.x_row(pair))

        return with_row


def _grouped(
    spec: ExpertLinearSpec, operands: _Operands, groups: _Groups, vector_bits: int
) -> None:
    """Each expert's pairs as one product."""
    scheme, n, k = spec.scheme, spec.out_features, spec.in_features
    block = _gemm.blocking(n, vector_bits)
    height, width, padded = block.rows, block.width, _gemm.padded_depth(k, scheme)
    panels = vec.buffer((groups.most_panels * vec.i64(padded * height),), F32)
    with vec.parallel(groups.panels) as panel:
        with_row, x_lanes = groups.rows_of(panel), _gemm.x_lanes(vector_bits)
        _gemm.pack_panel(operands.x, panels, panel, with_row, k, padded, height, x_lanes)

    chunks = Chunks(k, scheme, block)
    with vec.parallel(groups.count * vec.i64(-(-n // width))) as task:
        column = _gemv.block_start(tirx.floordiv(task, groups.count), width, n)
        number = vec.bind(tirx.floormod(task, groups.count))
        first = vec.bind(groups.load(groups.used_panel, number))
        expert, begin, rows_here = groups.pairs_of(number)
        weight_row = vec.bind(expert * vec.i64(n) + column)
        tile = vec.buffer((chunks.depth, width), F32)
        totals = vec.buffer((operands.pairs + vec.i64(height), width), F32)
        with vec.serial(rows_here + vec.i64(height)) as r, vec.serial(block.vectors) as v:
            at = v * vec.i64(block.lanes)
            vec.store(totals, [r, at], vec.const(0.0, F32, block.lanes), block.lanes)
        full, left, fits = _gemm.partial_heights(rows_here, block)
        with vec.serial(chunks.count) as chunk:
            chunks.fill(operands.weight, tile, weight_row, chunk)

            def product(i: Expr, rows: int, chunk: Expr = chunk) -> None:
                row = vec.bind(i * vec.i64(height))
                chunks.multiply(panels, padded, first + i, rows, tile, chunk, totals, row)

            with vec.serial(full) as i:
                product(i, height)
            for rows, fit in fits:
                with T.If(tirx.all(left > vec.i64(0), fit)), T.Then():
                    product(full, rows)
        with vec.serial(rows_here) as r:
            pair = vec.bind(groups.load(groups.order, begin + r))
            for v in range(block.vectors):
                total = vec.load(totals, [r, v * block.lanes], block.lanes)
                at = column + vec.i64(v * block.lanes)
                vec.store_float(operands.out, [pair, at], total, block.lanes)
