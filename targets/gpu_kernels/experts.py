"""Products with the chosen of many experts' weights on a GPU, as scheduled TIR PrimFuncs.

- An expert's weight is N more rows of one long matrix: the linear kernels' code with another first
  row (`_gemv.Choice`, `_gemm.Tile`).
- Few pairs of a token and an expert: each is a GEMV, side by side along grid y.
- Many: one launch sorts the pairs by expert, then each tile of the product has rows of one expert,
  whose weights are so read once for every tile of rows. An expert's tiles stand at a place that
  depends on nothing but the number of pairs before its own, so that all experts are sorted at once
  and without atomics; between them are some empty tiles.
- Experts are not checked to be in 0..experts-1: what a router gives is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.gpu_kernels import _gemm, _gemv
from mlc_compile.targets.gpu_kernels._emit import (
    I32,
    Argument,
    Buffer,
    Cell,
    Expr,
    barrier,
    bind,
    build_kernel,
    group_size,
    groups,
    i32,
    launch,
    load,
    loop,
    shared,
    store,
    symbol,
    when,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kernels import ExpertLinearSpec

ROWS_OF_AN_EXPERT = 2
"""Up to so many pairs for each expert, were they spread evenly, each pair is a GEMV."""
LARGEST_INDEX = 2**31 - 1


@dataclass(frozen=True)
class _Pairs:
    """What a pair p has: the expert experts[p // k, p % k] and a row of x."""

    spec: ExpertLinearSpec
    experts: Buffer

    def expert(self, pair: Expr) -> Expr:
        k = i32(self.spec.per_token)
        return bind(load(self.experts, tirx.truncdiv(pair, k), tirx.truncmod(pair, k)))

    def weight_begin(self, pair: Expr) -> Expr:
        return bind(self.expert(pair) * i32(self.spec.out_features))

    def x_row(self, pair: Expr) -> Expr:
        if not self.spec.shared_x:
            return pair
        return bind(tirx.truncdiv(pair, i32(self.spec.per_token)))


def expert_kernel(
    spec: ExpertLinearSpec,
    *,
    device: GPUDevice,
    gemm: _gemm.GemmConfig | None = None,
) -> tirx.PrimFunc | None:
    """The kernel for `spec`: its `arguments`, with any number of rows its `workspace` behind them.

    gemm: instead of what `_gemm.choose` finds.
    None where the device lacks a dtype of `spec` (bfloat16), and for weights that 32-bit indices do
    not reach.
    """
    weights = spec.arguments(1)[2:-1]
    dtypes = {spec.x_dtype, spec.out_dtype, *(dtype for _, _, dtype in weights)}
    if "bfloat16" in dtypes and not device.bfloat16:
        return None
    if any(count * rows * width > LARGEST_INDEX for _, (count, rows, width), _ in weights):
        return None
    rows = 1 if spec.rows == 1 else symbol("n")
    pairs = rows * spec.per_token
    arguments: list[Argument] = list(spec.arguments(rows))
    if spec.rows is None:
        arguments.append(spec.workspace(rows))

    def body(x: Buffer, experts: Buffer, *others: Buffer) -> None:
        *weight, out = others[: len(weights) + 1]
        matrices = [_matrix(w) for w in weight]
        choice = _Pairs(spec, experts)
        n, k, scheme = spec.out_features, spec.in_features, spec.scheme
        operands = _gemv.Operands(x, matrices, None, out, n, k, pairs, 1, choice=choice)

        def few() -> None:
            busy = n * spec.per_token
            config = _gemv.fit(_gemv.choose(busy, k, scheme, 1, device), 1, device)
            _gemv.gemv_nk(operands, scheme, config, device)

        def many() -> None:
            config = gemm or _gemm.choose(n, k, scheme, device)
            # two more arrays of a number for each row
            left = replace(device, shared_bytes=device.shared_bytes - 8 * config.tile_m)
            config = _gemm.fit(config, scheme, left)
            tiles = _Tiles(choice, others[-1], pairs, config.tile_m, config.threads)
            tiles.sort(device)
            _gemm.gemm(operands, scheme, config, tiles)

        if spec.rows == 1:
            few()
            return
        with T.If(pairs <= i32(ROWS_OF_AN_EXPERT * spec.experts)):
            with T.Then():
                few()
            with T.Else():
                many()

    return build_kernel("expert_linear", arguments, body)


def _matrix(weight: Buffer) -> Buffer:
    """[experts, N, ...] as [experts * N, ...]."""
    experts, n, width = weight.shape
    rows = i32(int(experts) * int(n))
    return T.decl_buffer([rows, width], str(weight.dtype), data=weight.data, layout=None)


class _Tiles:
    """Pairs sorted by expert, and cut into tiles of at most `tile` of the same expert.

    table: order [pairs], those of one expert side by side and in order; then for every tile its
    expert, its first place in `order`, and how many pairs it has, perhaps none.

    Expert e with c pairs, after s pairs of those before it, has the tiles s // tile + e and
    following: (s + c) // tile + e + 1 - (s // tile + e) >= ceil(c / tile), so they are enough.
    """

    def __init__(self, choice: _Pairs, table: Buffer, pairs: Expr, tile: int, threads: int) -> None:
        self.choice, self.table, self.pairs = choice, table, pairs
        self.tile, self.threads = tile, threads
        self.count = tirx.truncdiv(pairs, i32(tile)) + i32(choice.spec.experts)

    def _entry(self, tile: Expr, field: int) -> Expr:
        return self.pairs + tile * i32(3) + i32(field)

    def sort(self, device: GPUDevice) -> None:
        """Fill the table: one group for each expert, whose threads have stretches of pairs."""
        threads = group_size(device)
        with launch(threads, self.choice.spec.experts) as (tx, expert, _):
            stretch = bind(groups(self.pairs, threads))
            begin = bind(tx * stretch)
            end = bind(tirx.min(begin + stretch, self.pairs))

            def each(use: Callable[[Expr, Expr], None]) -> None:
                with loop(stretch) as i:
                    pair = bind(begin + i)
                    with when(pair < end):
                        use(pair, self.choice.expert(pair))

            own, before = Cell(I32, 0), Cell(I32, 0)

            def count(pair: Expr, e: Expr) -> None:
                own.set(own.value + tirx.Cast(I32, e == expert))
                before.set(before.value + tirx.Cast(I32, e < expert))

            each(count)
            owns, befores = shared([threads], I32), shared([threads], I32)
            store(owns, [tx], own.value)
            store(befores, [tx], before.value)
            barrier()
            total, place = Cell(I32, 0), Cell(I32, 0)
            start = Cell(I32, 0)
            with loop(threads) as j:
                theirs = bind(load(owns, j))
                total.set(total.value + theirs)
                place.set(place.value + tirx.Select(j < tx, theirs, i32(0)))
                start.set(start.value + load(befores, j))
            place.set(place.value + start.value)

            def put(pair: Expr, e: Expr) -> None:
                with when(e == expert):
                    store(self.table, [place.value], pair)
                    place.set(place.value + i32(1))

            each(put)
            rows, first = bind(total.value), bind(start.value)
            tile = i32(self.tile)
            base = bind(tirx.truncdiv(first, tile) + expert)
            following = bind(tirx.truncdiv(first + rows, tile) + expert + i32(1))
            with loop(groups(following - base, threads)) as turn:
                i = bind(turn * i32(threads) + tx)
                with when(base + i < following):
                    left = tirx.max(tirx.min(rows - i * tile, tile), i32(0))
                    store(self.table, [self._entry(base + i, 0)], expert)
                    store(self.table, [self._entry(base + i, 1)], first + i * tile)
                    store(self.table, [self._entry(base + i, 2)], left)

    @contextmanager
    def enter(self, tx: Expr, by: Expr) -> Iterator[_gemm.Tile]:
        expert, first, rows = (bind(load(self.table, self._entry(by, f))) for f in range(3))
        with when(rows > i32(0)):
            out_rows, x_rows = shared([self.tile], I32), shared([self.tile], I32)
            for start in range(0, self.tile, self.threads):
                place = bind(tx + i32(start))
                with when(place < i32(self.tile)):
                    pair = bind(load(self.table, first + tirx.min(place, rows - i32(1))))
                    store(out_rows, [place], pair)
                    store(x_rows, [place], self.choice.x_row(pair))
            barrier()
            begin = bind(expert * i32(self.choice.spec.out_features))
            yield _Tile(out_rows, x_rows, rows, begin)


@dataclass(frozen=True)
class _Tile:
    """`_gemm.Tile` of one expert: rows of out and x by their place in the tile, in group memory."""

    out_rows: Buffer
    x_rows: Buffer
    rows: Expr
    begin: Expr

    def x_row(self, quad: Expr, r: int) -> Expr:
        return bind(load(self.x_rows, quad * i32(_gemm.QUAD) + i32(r)))

    def out_row(self, quad: Expr, r: int) -> tuple[Expr, Expr]:
        place = bind(quad * i32(_gemm.QUAD) + i32(r))
        return bind(load(self.out_rows, place)), place < self.rows

    def weight_row(self, row: Expr) -> Expr:
        return self.begin + row
