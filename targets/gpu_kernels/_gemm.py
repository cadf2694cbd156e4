"""Many rows of x times a packed or plain weight: a tiled product, for prefill.

A group computes a tile of `tile_m` rows by `tile_n` columns, `depth` elements of K at a time: both
operands go to group memory as float32, the weight dequantised, laid out so that a thread reads
vectors of four rows and of four columns; it keeps `thread_m` x `thread_n` sums in registers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from tvm import tirx

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets import codes
from mlc_compile.targets.gpu_kernels._emit import (
    F32,
    Buffer,
    Expr,
    barrier,
    bind,
    cast,
    f32,
    groups,
    i32,
    launch,
    load,
    load_f32,
    loop,
    registers,
    shared,
    store,
    store_float,
    when,
)
from mlc_compile.targets.gpu_kernels._gemv import Operands
from mlc_compile.targets.gpu_kernels._packed import (
    as_f32,
    concat,
    lane,
    lanes_of,
    splat,
    vector,
    view,
    widest,
    zero_of,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice

QUAD = 4  # rows or columns of a vector in group memory
F32X4 = vector(F32, QUAD)


@dataclass(frozen=True)
class GemmConfig:
    """How the product is cut; all multiples of 4.

    tile_m, tile_n: rows of x and of the weight of one group; depth: of K in one turn (packed
    weights: whole words). thread_m, thread_n: sums of one thread.
    """

    tile_m: int = 64
    tile_n: int = 64
    depth: int = 16
    thread_m: int = 8
    thread_n: int = 8

    @property
    def threads(self) -> int:
        return (self.tile_m // self.thread_m) * (self.tile_n // self.thread_n)

    @property
    def shared_bytes(self) -> int:
        return 4 * self.depth * (self.tile_m + self.tile_n)

    @property
    def label(self) -> str:
        """A short name, for tables."""
        return f"{self.tile_m}x{self.tile_n}x{self.depth}_{self.thread_m}x{self.thread_n}"


class _Loader:
    """Shares `count` items of a tile out among the threads of a group."""

    def __init__(self, tx: Expr, threads: int) -> None:
        self.tx, self.threads = tx, threads

    def each(self, count: int) -> list[tuple[Expr, Expr | None]]:
        """(item, whether it exists) for each turn of this thread."""
        found = []
        for start in range(0, count, self.threads):
            item = self.tx if start == 0 else bind(self.tx + i32(start))
            partial = start + self.threads > count
            found.append((item, item < i32(count) if partial else None))
        return found


class Tile(Protocol):
    """The rows that one group computes. What row 4 * quad + r of the tile is, r being constant:"""

    def x_row(self, quad: Expr, r: int) -> Expr:
        """Row of x, of one that exists in any case."""

    def out_row(self, quad: Expr, r: int) -> tuple[Expr, Expr]:
        """Row of out, bound, and whether it is to be stored."""

    def weight_row(self, row: Expr) -> Expr:
        """Row of the weight's buffer that is a row of the weight."""


@dataclass(frozen=True)
class _Dense:
    """Neighbouring rows from `row0` on."""

    row0: Expr
    n_rows: Expr | int

    def x_row(self, quad: Expr, r: int) -> Expr:
        last = i32(self.n_rows - 1) if isinstance(self.n_rows, int) else self.n_rows - i32(1)
        return bind(tirx.min(self.row0 + quad * i32(QUAD) + i32(r), last))

    def out_row(self, quad: Expr, r: int) -> tuple[Expr, Expr]:
        row = bind(self.row0 + quad * i32(QUAD) + i32(r))
        return row, row < self.n_rows

    def weight_row(self, row: Expr) -> Expr:
        return row


class Tiles(Protocol):
    """How rows fall into tiles."""

    count: Expr | int
    """Groups along grid y."""

    def enter(self, tx: Expr, by: Expr) -> AbstractContextManager[Tile]:
        """Emits what all threads of a group do before, and what is inside only if there is work."""


class _DenseTiles:
    """One after the other."""

    def __init__(self, n_rows: Expr | int, tile_m: int) -> None:
        self.count = groups(n_rows, tile_m)
        self._n_rows, self._tile_m = n_rows, tile_m

    @contextmanager
    def enter(self, tx: Expr, by: Expr) -> Iterator[Tile]:
        yield _Dense(bind(by * i32(self._tile_m)), self._n_rows)


def gemm(
    operands: Operands,
    scheme: QuantScheme | None,
    config: GemmConfig,
    tiles: Tiles | None = None,
) -> None:
    """One launch; grid x goes over the columns, so that groups in flight share rows of x.

    tiles: other than neighbouring rows and one weight.
    """
    n, k, out = operands.n, operands.k, operands.out
    tile_m, tile_n, depth = config.tile_m, config.tile_n, config.depth
    quads_m, quads_n = tile_m // QUAD, tile_n // QUAD
    across, down = tile_n // config.thread_n, tile_m // config.thread_m
    tiles = tiles or _DenseTiles(operands.n_rows, tile_m)
    x = _KMajor(operands.x, k)
    weight = _KMajor(operands.weight[0], k) if scheme is None else _Packed(operands, scheme)
    out_lanes = widest(n)
    out_view = view(out, (operands.n_rows, n // out_lanes), out_lanes)
    with (
        launch(config.threads, groups(n, tile_n), tiles.count) as (tx, bx, by),
        tiles.enter(tx, by) as tile,
    ):
        column0 = bind(bx * i32(tile_n))
        thread_n = bind(tirx.truncmod(tx, i32(across)))
        thread_m = bind(tirx.truncdiv(tx, i32(across)))
        a = shared([depth * quads_m], F32X4)
        b = shared([depth * quads_n], F32X4)
        chunks_m, chunks_n = config.thread_m // QUAD, config.thread_n // QUAD
        sums = registers(config.thread_m * chunks_n, F32X4)
        for i in range(config.thread_m * chunks_n):
            store(sums, [i], splat(f32(0.0), QUAD))
        loader = _Loader(tx, config.threads)

        def weight_row(quad: Expr, r: int) -> Expr:
            row = tirx.min(column0 + quad * i32(QUAD) + i32(r), i32(n - 1))
            return bind(tile.weight_row(row))

        with loop(-(-k // depth)) as turn:
            k0 = bind(turn * i32(depth))
            x.fill(a, loader, tile.x_row, k0, tile_m, depth)
            if isinstance(weight, _KMajor):
                weight.fill(b, loader, weight_row, k0, tile_n, depth)
            else:
                weight.fill(b, loader, tile, column0, k0, tile_n, depth)
            barrier()
            with loop(depth) as kk:
                av = [
                    bind(load(a, kk * i32(quads_m) + thread_m + i32(c * down)))
                    for c in range(chunks_m)
                ]
                bv = [
                    bind(load(b, kk * i32(quads_n) + thread_n + i32(c * across)))
                    for c in range(chunks_n)
                ]
                for i in range(config.thread_m):
                    ai = splat(lane(av[i // QUAD], i % QUAD), QUAD)
                    for c in range(chunks_n):
                        at = i * chunks_n + c
                        store(sums, [at], load(sums, at) + ai * bv[c])
            barrier()
        for i in range(config.thread_m):
            row, exists = tile.out_row(thread_m + i32(i // QUAD * down), i % QUAD)
            for c in range(chunks_n):
                column = bind(column0 + (thread_n + i32(c * across)) * i32(QUAD))
                total = bind(load(sums, i * chunks_n + c))
                _store_quad(operands, out_view, row, exists, column, total)


def _store_quad(
    operands: Operands, out: Buffer, row: Expr, exists: Expr, column: Expr, total: Expr
) -> None:
    """out[row, column .. column + 3] = total + bias, as far as they exist."""
    n, bias = operands.n, operands.bias
    lanes = out.dtype.lanes if hasattr(out.dtype, "lanes") else 1
    if lanes == QUAD:
        with when(tirx.all(exists, column < i32(n))):
            if bias is not None:
                offsets = [load_f32(bias, column + i32(j)) for j in range(QUAD)]
                total = total + concat(offsets)
            dtype = vector(str(operands.out.dtype), QUAD)
            store(out, [row, tirx.truncdiv(column, i32(QUAD))], cast(total, dtype))
        return
    for j in range(QUAD):
        at = bind(column + i32(j))
        with when(tirx.all(exists, at < i32(n))):
            value = lane(total, j)
            if bias is not None:
                value = value + load_f32(bias, at)
            store_float(operands.out, [row, at], value)


class _KMajor:
    """A matrix [rows, k] of floats, contiguous along k."""

    def __init__(self, buffer: Buffer, k: int) -> None:
        self.k = k
        self.lanes = widest(k)
        self._vectors = view(buffer, (buffer.shape[0], k // self.lanes), self.lanes)

    def _quad(self, row: Expr, k0: Expr, guarded: bool) -> list[Expr]:
        """Elements k0 .. k0 + 3 as float32, zero beyond k."""
        found = []
        for j in range(0, QUAD, self.lanes):
            index = bind(tirx.truncdiv(k0, i32(self.lanes)) + i32(j // self.lanes))
            value = as_f32(load(self._vectors, row, index))
            if guarded:
                zero = splat(f32(0.0), self.lanes)
                value = tirx.if_then_else(index < i32(self.k // self.lanes), value, zero)
            found += lanes_of(bind(value))
        return found

    def fill(
        self,
        tile: Buffer,
        loader: _Loader,
        row_of: Callable[[Expr, int], Expr],
        k0: Expr,
        rows: int,
        depth: int,
    ) -> None:
        """tile[kk, quad] = the four rows row_of(quad, ..) of column k0 + kk."""
        across, quads = depth // QUAD, rows // QUAD
        for item, exists in loader.each(across * quads):
            _guarded(exists, lambda item=item: self._fill(tile, item, row_of, k0, across, quads))

    def _fill(
        self,
        tile: Buffer,
        item: Expr,
        row_of: Callable[[Expr, int], Expr],
        k0: Expr,
        across: int,
        quads: int,
    ) -> None:
        depth = across * QUAD
        kq, quad = bind(tirx.truncmod(item, i32(across))), bind(tirx.truncdiv(item, i32(across)))
        at = bind(k0 + kq * i32(QUAD))
        rows = [self._quad(row_of(quad, r), at, self.k % depth != 0) for r in range(QUAD)]
        for j in range(QUAD):
            value = concat([row[j] for row in rows])
            store(tile, [(kq * i32(QUAD) + i32(j)) * i32(quads) + quad], value)


class _Packed:
    """A packed weight, dequantised on its way to group memory."""

    def __init__(self, operands: Operands, scheme: QuantScheme) -> None:
        self.scheme, self.n, self.k = scheme, operands.n, operands.k
        self.kn = scheme.layout == "KN"
        words, scales, *_ = self._weight = operands.weight
        self.lanes = widest(self.n) if self.kn else 1
        if self.kn:
            columns = self.n // self.lanes
            words = view(words, (scheme.num_words(self.k), columns), self.lanes)
            scales = view(scales, (scheme.num_groups(self.k), columns), self.lanes)
        self._words, self._scales = words, scales

    def fill(
        self,
        tile: Buffer,
        loader: _Loader,
        rows: Tile,
        column0: Expr,
        k0: Expr,
        columns: int,
        depth: int,
    ) -> None:
        """tile[kk, quad] = the weights of columns column0 + 4 quad .. at k0 + kk."""
        scheme = self.scheme
        words, quads = depth // scheme.elems_per_word, columns // QUAD
        parts = 1
        for count in range(1, scheme.elems_per_word + 1):
            if scheme.elems_per_word % count == 0 and words * quads * count <= loader.threads:
                parts = count
        for item, exists in loader.each(words * quads * parts):
            _guarded(
                exists,
                lambda item=item: self._fill(tile, item, rows, column0, k0, words, quads, parts),
            )

    def _fill(
        self,
        tile: Buffer,
        item: Expr,
        rows: Tile,
        column0: Expr,
        k0: Expr,
        words: int,
        quads: int,
        parts: int,
    ) -> None:
        """A thread takes one word of each of four columns, or the same part of each."""
        scheme = self.scheme
        per_word, per_part = scheme.elems_per_word, scheme.elems_per_word // parts
        part = bind(tirx.truncmod(item, i32(parts)))
        item = bind(tirx.truncdiv(item, i32(parts)))
        if self.kn:  # neighbours read neighbouring columns
            quad, word = tirx.truncmod(item, i32(quads)), tirx.truncdiv(item, i32(quads))
        else:
            word, quad = tirx.truncmod(item, i32(words)), tirx.truncdiv(item, i32(words))
        word, quad = bind(word), bind(quad)
        last_word = scheme.num_words(self.k) - 1
        index = bind(tirx.truncdiv(k0, i32(per_word)) + word)
        if scheme.num_words(self.k) % words:
            index = bind(tirx.min(index, i32(last_word)))  # x is zero there
        group = bind(tirx.truncdiv(index, i32(scheme.words_per_group)))
        loaded, scale, zero = self._load(rows, bind(column0 + quad * i32(QUAD)), index, group)
        first = bind(part * i32(per_part))
        for e in range(per_part):
            position = bind(cast((first + i32(e)) * i32(scheme.bits), "uint32"))
            values = [
                (codes.number(w, position, scheme, bind) - z) * s
                for w, s, z in zip(loaded, scale, zero, strict=True)
            ]
            at = (word * i32(per_word) + first + i32(e)) * i32(quads) + quad
            store(tile, [at], concat(values))

    def _load(
        self, rows: Tile, column: Expr, word: Expr, group: Expr
    ) -> tuple[Sequence[Expr], Sequence[Expr], Sequence[Expr]]:
        """Words, scales and zero points of four columns; columns beyond the last repeat it."""
        if not self.kn:
            last = i32(self.n - 1)
            at = [bind(rows.weight_row(tirx.min(column + i32(j), last))) for j in range(QUAD)]
            return (
                [bind(load(self._words, row, word)) for row in at],
                [bind(load_f32(self._scales, row, group)) for row in at],
                [zero_of(self._weight, row, group, self.scheme) for row in at],
            )
        words, scales = [], []
        for j in range(0, QUAD, self.lanes):
            at = bind(
                tirx.truncdiv(tirx.min(column + i32(j), i32(self.n - self.lanes)), i32(self.lanes))
            )
            words += lanes_of(bind(load(self._words, word, at)))
            scales += lanes_of(bind(as_f32(load(self._scales, group, at))))
        return words, scales, [f32(float(self.scheme.max_int))] * QUAD  # symmetric codes


def _guarded(condition: Expr | None, emit: object) -> None:
    assert callable(emit)
    if condition is None:
        emit()
        return
    with when(condition):
        emit()


def _with_depth(config: GemmConfig, scheme: QuantScheme | None) -> GemmConfig:
    """`config` with a depth of whole words and quads."""
    unit = QUAD if scheme is None else max(scheme.elems_per_word, QUAD)
    while unit % QUAD:
        unit *= 2
    return replace(config, depth=max(config.depth // unit, 1) * unit)


def choose(n: int, k: int, scheme: QuantScheme | None, device: GPUDevice) -> GemmConfig:
    """The configuration for a weight [n, k]."""
    return fit(GemmConfig(), scheme, device)


def fit(config: GemmConfig, scheme: QuantScheme | None, device: GPUDevice) -> GemmConfig:
    """`config` within the limits of `device`, with a depth of whole words."""
    config = _with_depth(config, scheme)
    while config.threads > device.max_threads:
        config = _halved(config)
    while config.shared_bytes > device.shared_bytes:
        shallower = _with_depth(replace(config, depth=config.depth // 2), scheme)
        config = shallower if shallower.depth < config.depth else _halved(config)
    return config


def _halved(config: GemmConfig) -> GemmConfig:
    """Half the longer side of the tile, and of a thread's share where that is all of it."""
    if config.tile_n >= config.tile_m:
        tile = config.tile_n // 2
        return replace(config, tile_n=tile, thread_n=min(config.thread_n, tile))
    tile = config.tile_m // 2
    return replace(config, tile_m=tile, thread_m=min(config.thread_m, tile))
