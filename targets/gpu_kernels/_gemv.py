"""One to a few rows of x times a packed or plain weight: what decode runs.

A group of threads is `teams` x `lanes`. Layout "NK" (and plain weights): the lanes of a team share
`rows` weight rows and take turns along K, so that neighbours read neighbouring words; what a thread
loads of x serves all its rows. Layout "KN": neighbours own neighbouring columns, teams share out K.

Partial sums meet in group memory once, after the loops: one barrier, or two (`Split.halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tvm import tirx

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.gpu_kernels._emit import (
    F32,
    Buffer,
    Expr,
    barrier,
    bind,
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
from mlc_compile.targets.gpu_kernels._packed import (
    Decode,
    as_f32,
    fields,
    lanes_of,
    load_or_zero,
    view,
    widest,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice


@dataclass(frozen=True)
class GemvConfig:
    """How a GEMV is cut; any choice is correct that `check` accepts.

    lanes: threads that share a dot product along K (layout "NK"), or own columns ("KN").
    teams: sets of `lanes` threads in a group; in layout "KN" they share out K.
    rows: weight rows ("NK", any number) or columns ("KN": 1, 2 or 4) of a thread.
    words: words (plain weights: elements) in one load: 1, 2 or 4; layout "NK" only.
    unroll: loads of a thread's row in flight in one turn of the loop; layout "NK" only.
    stage: x is copied to group memory first, in the order in which lanes read it; "NK" only.
    decode: how a code becomes a number.
    """

    lanes: int = 32
    teams: int = 4
    rows: int = 4
    words: int = 1
    unroll: int = 1
    stage: bool = False
    decode: Decode = "bytes"

    @property
    def threads(self) -> int:
        return self.lanes * self.teams

    @property
    def label(self) -> str:
        """A short name, for tables."""
        stage = "s" if self.stage else ""
        return (
            f"l{self.lanes}t{self.teams}r{self.rows}w{self.words}u{self.unroll}{stage}"
            f"{self.decode[0]}"
        )


@dataclass(frozen=True)
class Operands:
    """The buffers of a product, as the function's parameters.

    n_rows: rows of x; m: those that one group of threads computes (grid y covers the others).
    """

    x: Buffer
    weight: Sequence[Buffer]
    bias: Buffer | None
    out: Buffer
    n: int
    k: int
    n_rows: Expr | int
    m: int

    def row_index(self, by: Expr, m: int) -> Expr:
        """Row of x for loading: the last one again where there is none."""
        if self.m == 1 and isinstance(self.n_rows, int):
            return i32(0)
        return bind(tirx.min(by * i32(self.m) + i32(m), self.n_rows - i32(1)))

    def store(self, by: Expr, m: Expr | int, column: Expr, total: Expr) -> None:
        """out[m-th row of the group, column] = total + bias, where both exist."""
        row = bind(by * i32(self.m) + m)
        inside = column < i32(self.n)
        if not (self.m == 1 and isinstance(self.n_rows, int)):
            inside = tirx.all(inside, row < self.n_rows)
        with when(inside):
            if self.bias is not None:
                total = total + load_f32(self.bias, column)
            store_float(self.out, [row, column], total)


class _Sums:
    """m x rows running sums of one thread, and their total over the lanes of a team."""

    def __init__(self, m: int, rows: int) -> None:
        self.m, self.rows = m, rows
        self._cells = registers(m * rows)
        for i in range(m * rows):
            store(self._cells, [i], f32(0.0))

    def add(self, m: int, row: int, value: Expr) -> None:
        i = m * self.rows + row
        store(self._cells, [i], load(self._cells, i) + value)

    def get(self, m: int, row: int) -> Expr:
        return load(self._cells, m * self.rows + row)


def _reduce(
    slots: Buffer,
    tx: Expr,
    *,
    threads: int,
    outputs: int,
    terms: int,
    at: Callable[[Expr, Expr | int], Expr],
    finish: Callable[[Expr, Expr], None],
) -> None:
    """finish(q, sum over j < terms of slots[at(q, j)]) for q < outputs; slots are written before,
    without a barrier.

    With many terms, helpers first sum some each: a second barrier, but shorter chains.
    """

    def total(q: Expr, first: Expr | int, count: int, stride: int) -> Expr:
        parts = [load(slots, at(q, first + i32(stride * j))) for j in range(count)]
        while len(parts) > 1:
            parts = [
                parts[i] + parts[i + 1] if i + 1 < len(parts) else parts[i]
                for i in range(0, len(parts), 2)
            ]
        return parts[0]

    barrier()
    helpers = 1
    while terms > 32 and terms // helpers > 8 and 2 * helpers * outputs <= threads:
        helpers *= 2
    if helpers > 1:
        cell = registers(1)
        share = terms // helpers
        q, h = bind(tirx.truncdiv(tx, i32(helpers))), bind(tirx.truncmod(tx, i32(helpers)))
        with when(tx < i32(outputs * helpers)):
            store(cell, [0], total(q, h, share, helpers))
        barrier()
        with when(tx < i32(outputs * helpers)):
            store(slots, [at(q, h)], load(cell, 0))
        barrier()
        terms = helpers

    def one(q: Expr) -> None:
        finish(q, bind(total(q, i32(0), terms, 1)))

    if outputs <= threads:
        with when(tx < i32(outputs)):
            one(tx)
    else:
        with loop(-(-outputs // threads)) as turn:
            q = bind(turn * i32(threads) + tx)
            with when(q < i32(outputs)):
                one(q)


class _Rows:
    """Weight rows that are contiguous along K, read in pieces of `size` elements.

    pieces: of one row. Piece p of row r is `load(r, p)`; `add` adds its product with x.
    """

    def __init__(self, operands: Operands, scheme: QuantScheme | None, config: GemvConfig) -> None:
        self.scheme, self.decode = scheme, config.decode
        n, k = operands.n, operands.k
        if scheme is None:
            self.lanes = widest(k, most=config.words)
            self.size, self.pieces = self.lanes, k // self.lanes
            self._words = view(operands.weight[0], (n, self.pieces), self.lanes)
            return
        self.lanes = widest(scheme.words_per_group, most=config.words)
        self.size = self.lanes * scheme.elems_per_word
        self.pieces = scheme.num_words(k) // self.lanes
        self.per_group = scheme.words_per_group // self.lanes
        self._words = view(operands.weight[0], (n, self.pieces), self.lanes)
        self._scales = operands.weight[1]

    def load(self, row: Expr, piece: Expr) -> tuple[Expr, Expr | None]:
        """The words of a piece, and its scale."""
        words = bind(load(self._words, row, piece))
        if self.scheme is None:
            return words, None
        group = tirx.truncdiv(piece, i32(self.per_group)) if self.per_group > 1 else piece
        return words, bind(load_f32(self._scales, row, group))

    def add(
        self,
        loaded: Sequence[tuple[Expr, Expr | None]],
        xs: Sequence[Sequence[Expr]],
        sums: _Sums,
    ) -> None:
        """sums[m][r] += piece r times xs[m] (`size` bound float32)."""
        if self.scheme is None:
            for r, (words, _) in enumerate(loaded):
                values = lanes_of(bind(as_f32(words)))
                for m, x in enumerate(xs):
                    sums.add(m, r, _dot(values, x))
            return
        totals = [bind(_sum(x)) for x in xs]
        for r, (words, scale) in enumerate(loaded):
            found = [fields(w, self.scheme, self.decode) for w in map(bind, lanes_of(words))]
            values = [v for f in found for v in f.values]
            if len(xs) > 1:
                values = [bind(v) for v in values]
            factor, centre = found[0].factor, found[0].centre(self.scheme)
            if factor != 1.0:
                scale = bind(scale * f32(factor))
            for m, x in enumerate(xs):
                sums.add(m, r, scale * (_dot(values, x) - f32(centre) * totals[m]))


def _dot(values: Sequence[Expr], xs: Sequence[Expr]) -> Expr:
    total = values[0] * xs[0]
    for value, x in zip(values[1:], xs[1:], strict=True):
        total = total + value * x
    return total


def _sum(xs: Sequence[Expr]) -> Expr:
    total = xs[0]
    for x in xs[1:]:
        total = total + x
    return total


class _X:
    """Rows of x, read in pieces of `size` elements as bound float32 scalars."""

    def __init__(self, operands: Operands, size: int) -> None:
        self.k, self.size = operands.k, size
        self.lanes = widest(self.k, size)
        self._vectors = view(operands.x, (operands.n_rows, self.k // self.lanes), self.lanes)

    def vector(self, row: Expr, index: Expr, padded: bool) -> Expr:
        """padded: the index may lie beyond K, where x counts as zero."""
        valid = index < i32(self.k // self.lanes) if padded else None
        return load_or_zero(self._vectors, [row, index], valid)

    def load(self, row: Expr, piece: Expr, padded: bool) -> list[Expr]:
        found = []
        count = self.size // self.lanes
        for j in range(count):
            index = bind(piece * i32(count) + i32(j))
            found += lanes_of(bind(self.vector(row, index, padded)))
        return found


def gemv_nk(
    operands: Operands, scheme: QuantScheme | None, config: GemvConfig, device: GPUDevice
) -> None:
    """One launch over a weight that is contiguous along K: packed "NK", or plain."""
    weight = _Rows(operands, scheme, config)
    x = _X(operands, weight.size)
    lanes, teams, rows, m = config.lanes, config.teams, config.rows, operands.m
    tile = teams * rows
    outputs = tile * m
    padded = weight.pieces * weight.size > operands.k
    grid_y = 1 if isinstance(operands.n_rows, int) else groups(operands.n_rows, m)
    with launch(config.threads, groups(operands.n, tile), grid_y) as (tx, bx, by):
        team, lane = bind(tirx.truncdiv(tx, i32(lanes))), bind(tirx.truncmod(tx, i32(lanes)))
        first = bind(bx * i32(tile) + team * i32(rows))
        last = i32(operands.n - 1)
        at = [bind(tirx.min(first + i32(r), last)) for r in range(rows)]
        x_rows = [operands.row_index(by, i) for i in range(m)]
        sums = _Sums(m, rows)

        def pieces(indices: Sequence[Expr], read: Callable[[Expr, Expr], list[Expr]]) -> None:
            loaded = [[weight.load(row, piece) for row in at] for piece in indices]
            for words, piece in zip(loaded, indices, strict=True):
                weight.add(words, [read(row, piece) for row in x_rows], sums)

        def walk(begin: Expr | int, count: int, read: Callable[[Expr, Expr], list[Expr]]) -> None:
            """Pieces begin .. begin + count - 1 as far as they exist, shared out among the lanes.

            One copy of the body, as a browser compiles it at every load of the model.
            """
            partial = count % lanes or weight.pieces % count
            unroll = 1 if partial else config.unroll
            while count % (lanes * unroll) and not partial:
                unroll -= 1
            turn = lanes * unroll
            with loop(-(-count // turn)) as i:
                start = bind(i * i32(turn) + (lane + begin))
                if partial:
                    with when(start < i32(weight.pieces)):
                        pieces([start], read)
                else:
                    pieces([bind(start + i32(u * lanes)) for u in range(unroll)], read)

        pitch = lanes + 1  # threads that sum neighbouring outputs meet no common bank
        slots = shared([outputs * pitch], F32)
        stage = None
        if config.stage and m == 1 and x.lanes == 4:
            spare = (device.shared_bytes - 4 * outputs * pitch) // (4 * weight.size) - 1
            stage = _stage(x, weight.pieces, lanes * config.unroll, spare)
        if stage is None:
            walk(i32(0), weight.pieces, lambda row, piece: x.load(row, piece, padded))
        else:
            # TVM gives one place to arrays that do not live at once, also where their types differ
            # (invalid WGSL) and no barrier lies between: this store makes the two overlap.
            store(slots, [tx], f32(0.0))
            turns = -(-weight.pieces // stage.pieces)
            with loop(turns) as i:
                begin = bind(i * i32(stage.pieces))
                stage.fill(tx, config.threads, begin, weight.pieces * weight.size)
                barrier()
                walk(begin, stage.pieces, lambda _, piece: stage.load(piece - begin))
                if turns > 1:
                    barrier()

        def finish(q: Expr, total: Expr) -> None:
            # q = (m * teams + team) * rows + r
            column = bind(bx * i32(tile) + tirx.truncmod(q, i32(tile)))
            operands.store(by, tirx.truncdiv(q, i32(tile)), column, total)

        for i in range(m):
            for r in range(rows):
                q = i32(i * tile) + team * i32(rows) + i32(r)
                store(slots, [q * i32(pitch) + lane], sums.get(i, r))
        _reduce(
            slots,
            tx,
            threads=config.threads,
            outputs=outputs,
            terms=lanes,
            at=lambda q, j: q * i32(pitch) + j,
            finish=finish,
        )


class _Stage:
    """A stretch of x as float32 in group memory, where lanes that take neighbouring pieces read
    neighbouring vectors; from x itself they would read `size` elements apart."""

    def __init__(self, x: _X, pieces: int) -> None:
        self.x, self.pieces = x, pieces
        self.vectors = x.size // 4  # of a piece
        self.pitch = pieces + 1
        self._slots = shared([self.vectors * self.pitch], "float32x4")

    def fill(self, tx: Expr, threads: int, begin: Expr, padded_k: int) -> None:
        """Copy `pieces` pieces from `begin` on, zeros beyond K."""
        total = self.pieces * self.vectors
        padded = padded_k > self.x.k or padded_k % (4 * total) != 0
        with loop(-(-total // threads)) as turn:
            i = bind(turn * i32(threads) + tx)
            with when(i < i32(total)):
                value = bind(self.x.vector(i32(0), begin * i32(self.vectors) + i, padded))
                slot = tirx.truncmod(i, i32(self.vectors)) * i32(self.pitch)
                store(self._slots, [slot + tirx.truncdiv(i, i32(self.vectors))], value)

    def load(self, piece: Expr) -> list[Expr]:
        """The elements of a piece, counted from the stretch's begin, as bound scalars."""
        found = []
        for j in range(self.vectors):
            found += lanes_of(bind(load(self._slots, piece + i32(j * self.pitch))))
        return found


def _stage(x: _X, pieces: int, turn: int, most: int) -> _Stage | None:
    """Group memory for x, `most` pieces at a time at most; None where that is too little."""
    if pieces > most:
        turns = -(-pieces // (most // turn * turn)) if most >= turn else 0
        pieces = -(-pieces // (turns * turn)) * turn if turns else 0
    return _Stage(x, pieces) if pieces else None


def gemv_kn(operands: Operands, scheme: QuantScheme, config: GemvConfig) -> None:
    """One launch over a packed weight whose columns are contiguous along N."""
    n, k, m = operands.n, operands.k, operands.m
    columns = widest(n, most=config.rows)
    lanes, teams = config.lanes, config.teams
    tile = lanes * columns
    num_groups, per_group = scheme.num_groups(k), scheme.words_per_group
    words = view(operands.weight[0], (scheme.num_words(k), n // columns), columns)
    scales = view(operands.weight[1], (num_groups, n // columns), columns)
    x = _X(operands, scheme.elems_per_word)
    padded = scheme.num_words(k) * scheme.elems_per_word > k
    grid_y = 1 if isinstance(operands.n_rows, int) else groups(operands.n_rows, m)
    with launch(config.threads, groups(n, tile), grid_y) as (tx, bx, by):
        team, lane = bind(tirx.truncdiv(tx, i32(lanes))), bind(tirx.truncmod(tx, i32(lanes)))
        column = bind(tirx.min(bx * i32(lanes) + lane, i32(n // columns - 1)))
        x_rows = [operands.row_index(by, i) for i in range(m)]
        sums = _Sums(m, columns)

        def group(g: Expr) -> None:
            partial = _Sums(m, columns)
            totals = _Sums(m, 1)
            scale = [bind(s) for s in lanes_of(bind(as_f32(load(scales, g, column))))]
            found = None
            for w in range(per_group):
                index = bind(g * i32(per_group) + i32(w))
                loaded = bind(load(words, index, column))
                xs = [x.load(row, index, padded) for row in x_rows]
                for i in range(m):
                    totals.add(i, 0, _sum(xs[i]))
                for c, word in enumerate(map(bind, lanes_of(loaded))):
                    found = fields(word, scheme, config.decode)
                    values = [bind(v) for v in found.values] if m > 1 else found.values
                    for i in range(m):
                        partial.add(i, c, _dot(values, xs[i]))
            assert found is not None
            centre, factor = found.centre(scheme), found.factor
            for c in range(columns):
                by_scale = scale[c] if factor == 1.0 else scale[c] * f32(factor)
                for i in range(m):
                    difference = partial.get(i, c) - f32(centre) * totals.get(i, 0)
                    sums.add(i, c, by_scale * difference)

        with loop(-(-num_groups // teams)) as i:
            g = bind(i * i32(teams) + team)
            if num_groups % teams:
                with when(g < i32(num_groups)):
                    group(g)
            else:
                group(g)

        def finish(q: Expr, total: Expr) -> None:
            column = bind(bx * i32(tile) + tirx.truncmod(q, i32(tile)))
            operands.store(by, tirx.truncdiv(q, i32(tile)), column, total)

        outputs = tile * m
        slots = shared([outputs * teams], F32)
        for i in range(m):
            for c in range(columns):
                q = i32(i * tile + c) + lane * i32(columns)
                store(slots, [team * i32(outputs) + q], sums.get(i, c))
        _reduce(
            slots,
            tx,
            threads=config.threads,
            outputs=outputs,
            terms=teams,
            at=lambda q, j: j * i32(outputs) + q,
            finish=finish,
        )


BUSY_THREADS = 1 << 17
"""Threads that a large GPU needs in flight to keep its memory busy."""
TURNS = 8
"""Loads along K for each row of a thread: software adapters pay for every thread, about as much as
for 500 weights, and more in groups of more than 64."""
GROUP = 64
LONG_ROW = 256
"""Words of a row from which many lanes with 16-byte loads pay, with float16 activations: the best
or within 2 % of it over the shapes of Llama-3.2-1B and 3.1-8B (benchmarks/NOTES.md)."""


def choose(n: int, k: int, scheme: QuantScheme | None, m: int, device: GPUDevice) -> GemvConfig:
    """The configuration for a weight [n, k] and m rows of x."""
    if scheme is not None and scheme.layout == "KN":
        return fit(GemvConfig(lanes=16, teams=16, rows=2 if m == 1 else 1), m, device)
    if m == 1 and scheme is not None and _is_long(scheme, k):
        return fit(GemvConfig(lanes=128, teams=1, rows=4, words=4), m, device)
    words = 4 if scheme is None else 1
    pieces = -(-k // words) if scheme is None else scheme.num_words(k)
    lanes = 8
    while lanes < GROUP and 2 * lanes * TURNS <= pieces:
        lanes *= 2
    config = GemvConfig(lanes, GROUP // lanes, rows=4, words=words, unroll=2)
    # A weight of a large model, but too few rows of it: take fewer of them in a thread.
    if lanes >= 32 and _threads(n, config) < BUSY_THREADS:
        config = replace(config, rows=2)
    return fit(config, m, device)


def _is_long(scheme: QuantScheme, k: int) -> bool:
    return scheme.model_dtype == "float16" and scheme.num_words(k) >= LONG_ROW


def _threads(n: int, config: GemvConfig) -> int:
    return -(-n // config.rows) * config.lanes


def fit(config: GemvConfig, m: int, device: GPUDevice) -> GemvConfig:
    """`config` within the limits of `device`, for m rows of x."""
    while config.threads > device.max_threads:
        if config.teams > 1:
            config = replace(config, teams=config.teams // 2)
        else:
            config = replace(config, lanes=config.lanes // 2)

    def sums_bytes() -> int:
        return 4 * config.teams * config.rows * m * (config.lanes + 1)

    while sums_bytes() > device.shared_bytes and config.rows > 1:
        config = replace(config, rows=config.rows // 2)
    while sums_bytes() > device.shared_bytes and config.teams > 1:
        config = replace(config, teams=config.teams // 2)
    return config
