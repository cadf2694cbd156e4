"""One to a few rows of x times a packed or plain weight: what decode runs.

A group of threads is `teams` x `lanes`. Layout "NK" (and plain weights): the lanes of a team share
`rows` weight rows and take turns along K, so that neighbours read neighbouring words; what a thread
loads of x serves all its rows. Layout "KN": neighbours own neighbouring columns, teams share out K.

Partial sums meet in group memory once, after the loops: one barrier, or two (`Split.halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets import codes
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
    u32,
    when,
)
from mlc_compile.targets.gpu_kernels._packed import (
    Decode,
    as_f32,
    fields,
    halves,
    lanes_of,
    load_or_zero,
    splat,
    view,
    widest,
    zero_of,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.gpu_kernels.elementwise import ACTIVATIONS


@dataclass(frozen=True)
class GemvConfig:
    """How a GEMV is cut; any choice is correct that `check` accepts.

    lanes: threads that share a dot product along K (layout "NK"), or own columns ("KN").
    teams: sets of `lanes` threads in a group; in layout "KN" they share out K.
    rows: weight rows ("NK", any number) or columns ("KN": 1, 2 or 4) of a thread.
    words: words (plain weights: elements) in one load: 1, 2 or 4; layout "NK" only.
    unroll: loads of a thread's row in flight in one turn of the loop; layout "NK" only.
    decode: how a code becomes a number.
    """

    lanes: int = 32
    teams: int = 4
    rows: int = 4
    words: int = 1
    unroll: int = 1
    decode: Decode = "bytes"

    @property
    def threads(self) -> int:
        return self.lanes * self.teams

    @property
    def label(self) -> str:
        """A short name, for tables."""
        return f"l{self.lanes}t{self.teams}r{self.rows}w{self.words}u{self.unroll}{self.decode[0]}"


class Choice(Protocol):
    """Whose weight a row of the output is of, where there are many; see experts.py."""

    def weight_begin(self, by: Expr) -> Expr:
        """The first row of that weight."""

    def x_row(self, by: Expr) -> Expr:
        """The row of x."""


@dataclass(frozen=True)
class Operands:
    """The buffers of a product, as the function's parameters.

    n_rows: rows of x; m: those that one group of threads computes (grid y covers the others).
    norm, norm_eps, residual, gated: what LinearSpec calls so (norm_weight, activation); for one row
    and weights in layout "NK".
    choice: of experts; then `weight` has the rows of all, n_rows are those of out, and m is 1.
    """

    x: Buffer
    weight: Sequence[Buffer]
    bias: Buffer | None
    out: Buffer
    n: int
    k: int
    n_rows: Expr | int
    m: int
    norm: Buffer | None = None
    norm_eps: float = 0.0
    residual: Buffer | None = None
    gated: bool = False
    choice: Choice | None = None

    @property
    def width(self) -> int:
        """Columns of the output."""
        return self.n // 2 if self.gated else self.n

    def row_index(self, by: Expr, m: int) -> Expr:
        """Row of x for loading: the last one again where there is none."""
        if self.choice is not None:
            return self.choice.x_row(by)
        if self.m == 1 and isinstance(self.n_rows, int):
            return i32(0)
        return bind(tirx.min(by * i32(self.m) + i32(m), self.n_rows - i32(1)))


class _Output:
    """What happens to a finished sum: bias, activation and residual, then the store.

    With one row, thread q of a group stores its q-th result, and `prepare` loads what that takes
    before the weights are read: after them, each load would be waited for alone.
    """

    def __init__(self, operands: Operands, results: int, tx: Expr) -> None:
        self.operands, self._tx, self._results = operands, tx, results
        self._held: dict[str, Expr] = {}

    def prepare(self, column: Expr, threads: int) -> None:
        """column: of result `tx`; for one row, called once."""
        if self._results > threads:
            return
        loads = self._loads(column)
        cells = registers(len(loads)) if loads else None
        with when(tirx.all(self._tx < i32(self._results), column < i32(self.operands.width))):
            for i, value in enumerate(loads.values()):
                store(cells, [i], value)
        self._held = {name: load(cells, i) for i, name in enumerate(loads)}

    def _loads(self, column: Expr) -> dict[str, Expr]:
        o = self.operands
        found = {}
        if o.bias is not None:
            found["bias"] = load_f32(o.bias, column)
            if o.gated:
                found["up_bias"] = load_f32(o.bias, column + i32(o.width))
        if o.residual is not None:
            found["residual"] = load_f32(o.residual, i32(0), column)
        return found

    def store(self, row: Expr, column: Expr, totals: Sequence[Expr]) -> None:
        """out[row, column] from the sum, or for a gated product from those of gate and up."""
        o = self.operands
        inside = column < i32(o.width)
        if not (o.m == 1 and isinstance(o.n_rows, int)):
            inside = tirx.all(inside, row < o.n_rows)
        with when(inside):
            others = self._held or self._loads(column)
            value, *up = totals
            if "bias" in others:
                value = value + others["bias"]
                up = [up[0] + others["up_bias"]] if up else []
            if up:
                value = ACTIVATIONS["silu"](bind(value)) * up[0]
            if "residual" in others:
                value = value + others["residual"]
            store_float(o.out, [row, column], value)


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
    results: int,
    finish: Callable[[Expr, Callable[[Expr], Expr]], None],
) -> None:
    """finish(p, total) for p < results, where total(q), q < outputs, is the sum over j < terms of
    slots[at(q, j)]; slots are written before, without a barrier.

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
    while (
        terms > 32
        and terms // helpers > 8
        and terms % (2 * helpers) == 0
        and 2 * helpers * outputs <= threads
    ):
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

    def one(p: Expr) -> None:
        finish(p, lambda q: bind(total(q, i32(0), terms, 1)))

    if results <= threads:
        with when(tx < i32(results)):
            one(tx)
    else:
        with loop(-(-results // threads)) as turn:
            p = bind(turn * i32(threads) + tx)
            with when(p < i32(results)):
                one(p)


class _Piece(NamedTuple):
    """Of a row: words, their scale, and their zero point unless that is constant."""

    words: Expr
    scale: Expr | None = None
    zero: Expr | None = None


class _Rows:
    """Weight rows that are contiguous along K, read in pieces of `size` elements.

    pieces: of one row. Piece p of row r is `load(r, p)`; `add` adds its product with x.
    """

    def __init__(
        self,
        operands: Operands,
        scheme: QuantScheme | None,
        config: GemvConfig,
        device: GPUDevice,
    ) -> None:
        self.scheme, self.decode, self.device = scheme, config.decode, device
        rows, k = operands.weight[0].shape[0], operands.k
        if scheme is None:
            self.lanes = widest(k, most=config.words)
            self.size, self.pieces = self.lanes, k // self.lanes
            self._words = view(operands.weight[0], (rows, self.pieces), self.lanes)
            return
        self.lanes = widest(scheme.words_per_group, most=config.words)
        self.size = self.lanes * scheme.elems_per_word
        self.pieces = scheme.num_words(k) // self.lanes
        self.per_group = scheme.words_per_group // self.lanes
        self._words = view(operands.weight[0], (rows, self.pieces), self.lanes)
        self._weight = operands.weight

    def load(self, row: Expr, piece: Expr) -> _Piece:
        words = bind(load(self._words, row, piece))
        if self.scheme is None:
            return _Piece(words)
        if self.per_group >= self.pieces:
            group = i32(0)
        else:
            group = tirx.truncdiv(piece, i32(self.per_group)) if self.per_group > 1 else piece
        scale = bind(load_f32(self._weight[1], row, group))
        if codes.constant_zero(self.scheme) is not None:
            return _Piece(words, scale)
        return _Piece(words, scale, zero_of(self._weight, row, group, self.scheme))

    def add(
        self,
        loaded: Sequence[_Piece],
        xs: Sequence[Sequence[Expr]],
        sums: _Sums,
    ) -> None:
        """sums[m][r] += piece r times xs[m] (`size` bound float32)."""
        if self.scheme is None:
            for r, (words, *_) in enumerate(loaded):
                values = lanes_of(bind(as_f32(words)))
                for m, x in enumerate(xs):
                    sums.add(m, r, _dot(values, x))
            return
        totals = [bind(_sum(x)) for x in xs]
        for r, (words, scale, zero) in enumerate(loaded):
            found = [
                fields(w, self.scheme, self.decode, self.device) for w in map(bind, lanes_of(words))
            ]
            values = [v for f in found for v in f.values]
            if len(xs) > 1:
                values = [bind(v) for v in values]
            factor, centre = found[0].factor, found[0].centre(self.scheme, zero)
            if factor != 1.0:
                scale = bind(scale * f32(factor))
            for m, x in enumerate(xs):
                product = _dot(values, x)
                if centre is not None:
                    product = product - centre * totals[m]
                sums.add(m, r, scale * product)


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
    """Rows of K numbers, read in pieces of `size` elements as bound float32 scalars, as few loads
    as there can be: neighbouring threads read `size` elements apart, and each load takes the time
    of all the cache lines that it touches."""

    def __init__(
        self, buffer: Buffer, rows: Expr | int, k: int, size: int, device: GPUDevice
    ) -> None:
        self.k, self.size, self.device = k, size, device
        self.halves = str(buffer.dtype) == "float16" and k % 8 == 0 and size % 8 == 0
        self.lanes = 8 if self.halves else widest(k, size)
        shape = (rows, k // self.lanes)
        if self.halves:
            self._vectors = view(buffer, shape, 4, "uint32")
        else:
            self._vectors = view(buffer, shape, self.lanes)

    def load(self, row: Expr, piece: Expr, padded: bool) -> list[Expr]:
        """padded: the piece may lie beyond K, where the numbers count as zero."""
        count = self.size // self.lanes
        indices = [bind(piece * i32(count) + i32(j)) for j in range(count)]
        valid = [index < i32(self.k // self.lanes) if padded else None for index in indices]
        if not self.halves:
            found = [
                bind(load_or_zero(self._vectors, [row, i], v))
                for i, v in zip(indices, valid, strict=True)
            ]
            return [value for vector in found for value in lanes_of(vector)]
        words = []
        for index, inside in zip(indices, valid, strict=True):
            word = load(self._vectors, row, index)
            if inside is not None:
                word = tirx.if_then_else(inside, word, splat(u32(0), 4))
            words.append(bind(word))
        return [
            value
            for word in words
            for part in lanes_of(word)
            for value in halves(bind(part), self.device)
        ]


def gemv_nk(
    operands: Operands, scheme: QuantScheme | None, config: GemvConfig, device: GPUDevice
) -> None:
    """One launch over a weight that is contiguous along K: packed "NK", or plain.

    A norm of x costs no pass of its own: a team meets all of x, so that the sum of its squares is
    one more sum, and the products, with x times the norm's weight, are scaled at the end.
    """
    weight = _Rows(operands, scheme, config, device)
    k, width = operands.k, operands.width
    x = _X(operands.x, operands.x.shape[0], k, weight.size, device)
    norm = None if operands.norm is None else _X(_row(operands.norm), 1, k, weight.size, device)
    lanes, teams, rows, m = config.lanes, config.teams, config.rows, operands.m
    unroll = 1 if weight.pieces % lanes else config.unroll
    while weight.pieces % lanes == 0 and weight.pieces % (lanes * unroll):
        unroll -= 1
    turn = lanes * unroll
    own = rows // 2 if operands.gated else rows  # results of a team
    tile = teams * own
    results, outputs = tile * m, teams * rows * m
    padded = weight.pieces * weight.size > k
    grid_y = groups(operands.n_rows, m)
    with launch(config.threads, groups(width, tile), grid_y) as (tx, bx, by):
        team, lane = bind(tirx.truncdiv(tx, i32(lanes))), bind(tirx.truncmod(tx, i32(lanes)))
        x_rows = [operands.row_index(by, i) for i in range(m)]
        output = _Output(operands, results, tx)
        if m == 1:
            output.prepare(bind(bx * i32(tile) + tx), config.threads)
        pitch = lanes + 1  # threads that sum neighbouring outputs meet no common bank
        slots = shared([(outputs + (teams if norm is not None else 0)) * pitch], F32)
        squares = _Sums(1, 1)

        def weight_rows() -> list[Expr]:
            """Those of the team."""
            first = bind(bx * i32(tile) + team * i32(own))
            at = [bind(tirx.min(first + i32(r), i32(width - 1))) for r in range(own)]
            if operands.gated:
                at += [bind(row + i32(width)) for row in at]
            if operands.choice is not None:
                begin = operands.choice.weight_begin(by)
                at = [bind(begin + row) for row in at]
            return at

        def load_x(row: Expr, piece: Expr) -> list[Expr]:
            values = x.load(row, piece, padded)
            if norm is not None:
                squares.add(0, 0, _dot(values, values))
                factors = norm.load(i32(0), piece, padded)
                values = [bind(v * f) for v, f in zip(values, factors, strict=True)]
            return values

        sums, at = _Sums(m, rows), weight_rows()

        def pieces(indices: Sequence[Expr]) -> None:
            loaded = [[weight.load(row, piece) for row in at] for piece in indices]
            for words, piece in zip(loaded, indices, strict=True):
                weight.add(words, [load_x(row, piece) for row in x_rows], sums)

        # One copy of the body, as a browser compiles it at every load of the model.
        with loop(-(-weight.pieces // turn)) as i:
            start = bind(i * i32(turn) + lane)
            if weight.pieces % lanes:
                with when(start < i32(weight.pieces)):
                    pieces([start])
            else:
                pieces([bind(start + i32(u * lanes)) for u in range(unroll)])
        for i in range(m):
            for r in range(rows):
                q = i32(i * teams * rows + r) + team * i32(rows)
                store(slots, [q * i32(pitch) + lane], sums.get(i, r))
        if norm is not None:
            store(slots, [(team + i32(outputs)) * i32(pitch) + lane], squares.get(0, 0))

        def finish(p: Expr, total: Callable[[Expr], Expr]) -> None:
            # p = m * tile + u; u = team * own + r; its sums are of q = p, or, gated, of
            # q = team * rows + r and q + own.
            u = bind(tirx.truncmod(p, i32(tile))) if m > 1 else p
            its_team = tirx.truncdiv(u, i32(own))
            if operands.gated:
                q = bind(its_team * i32(own) + u)
                totals = [total(q), total(bind(q + i32(own)))]
            else:
                totals = [total(p)]
            if norm is not None:
                mean = total(bind(its_team + i32(outputs))) * f32(1 / k)
                scale = bind(f32(1) / tirx.sqrt(mean + f32(operands.norm_eps)))
                totals = [bind(value * scale) for value in totals]
            row = bind(by * i32(m) + tirx.truncdiv(p, i32(tile))) if m > 1 else by
            output.store(row, bind(bx * i32(tile) + u), totals)

        _reduce(
            slots,
            tx,
            threads=config.threads,
            outputs=outputs + (teams if norm is not None else 0),
            terms=lanes,
            at=lambda q, j: q * i32(pitch) + j,
            results=results,
            finish=finish,
        )


def _row(vector: Buffer) -> Buffer:
    """A vector as the only row of a matrix."""
    (k,) = vector.shape
    return T.decl_buffer([i32(1), k], str(vector.dtype), data=vector.data, layout=None)


def gemv_kn(operands: Operands, scheme: QuantScheme, config: GemvConfig, device: GPUDevice) -> None:
    """One launch over a packed weight whose columns are contiguous along N. Codes are symmetric."""
    n, k, m = operands.n, operands.k, operands.m
    columns = widest(n, most=config.rows)
    lanes, teams = config.lanes, config.teams
    tile = lanes * columns
    num_groups, per_group = scheme.num_groups(k), scheme.words_per_group
    words = view(operands.weight[0], (scheme.num_words(k), n // columns), columns)
    scales = view(operands.weight[1], (num_groups, n // columns), columns)
    x = _X(operands.x, operands.n_rows, k, scheme.elems_per_word, device)
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
                    found = fields(word, scheme, config.decode, device)
                    values = [bind(v) for v in found.values] if m > 1 else found.values
                    for i in range(m):
                        partial.add(i, c, _dot(values, xs[i]))
            assert found is not None
            centre, factor = found.centre(scheme, None), found.factor
            for c in range(columns):
                by_scale = scale[c] if factor == 1.0 else scale[c] * f32(factor)
                for i in range(m):
                    difference = partial.get(i, c) - centre * totals.get(i, 0)
                    sums.add(i, c, by_scale * difference)

        with loop(-(-num_groups // teams)) as i:
            g = bind(i * i32(teams) + team)
            if num_groups % teams:
                with when(g < i32(num_groups)):
                    group(g)
            else:
                group(g)

        output = _Output(operands, tile * m, tx)

        def finish(q: Expr, total: Callable[[Expr], Expr]) -> None:
            row = bind(by * i32(m) + tirx.truncdiv(q, i32(tile)))
            output.store(row, bind(bx * i32(tile) + tirx.truncmod(q, i32(tile))), [total(q)])

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
            results=outputs,
            finish=finish,
        )


BUSY_THREADS = 1 << 17
"""Threads that a large GPU needs in flight to keep its memory busy."""
TURNS = 8
"""Loads along K for each row of a thread: software adapters pay for every thread, about as much as
for 500 weights, and more in groups of more than 64."""
GROUP = 64
LONG_ROW = 256
"""Words of a row from which many lanes with wide loads pay, with float16 activations."""
SMALL_WEIGHT = 20 << 20
LARGE_WEIGHT = 64 << 20
HUGE_WEIGHT = 256 << 20
"""Elements of a weight. What is chosen by them is the best or within 3 % of it over the products of
Llama-3.2-1B and 3.1-8B on an H200 (benchmarks/NOTES.md): small ones want many threads at once,
large ones few instructions for x."""
FEW_ROWS = 3072
"""Weight rows up to which a thread takes two of them, for codes of eight bits."""
NORMED_WEIGHT = HUGE_WEIGHT
"""Elements up to which a norm is better inside: every group of threads then takes it again."""


def choose(
    n: int,
    k: int,
    scheme: QuantScheme | None,
    m: int,
    device: GPUDevice,
    *,
    normed: bool = False,
) -> GemvConfig:
    """The configuration for a weight [n, k] and m rows of x; normed: with a norm of x inside."""
    if scheme is not None and scheme.layout == "KN":
        return fit(GemvConfig(lanes=16, teams=16, rows=2 if m == 1 else 1), m, device)
    if m == 1 and scheme is not None and _is_long(scheme, k):
        return fit(_long(n, k, scheme, normed), m, device)
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


def _long(n: int, k: int, scheme: QuantScheme, normed: bool) -> GemvConfig:
    """For one row and weights whose rows are long."""
    pieces = scheme.num_words(k) // 4
    if scheme.bits != 4:
        return _long_wide(n, k, pieces, normed)
    # As many lanes as leave none idle in the last turn.
    whole = [lanes for lanes in range(256, 48, -16) if pieces % lanes == 0]
    lanes = whole[0] if whole else 128
    config = GemvConfig(lanes, 2 if lanes <= 64 else 1, rows=4, words=4, decode="halves")
    if normed and n * k < LARGE_WEIGHT:
        config = replace(config, words=2, unroll=2)
    elif normed:
        config = replace(config, teams=1, rows=8)
    elif n * k < SMALL_WEIGHT and pieces <= 128:
        config = replace(config, lanes=min(2 * lanes, 128), teams=1, rows=2, words=2, unroll=2)
    elif n * k >= HUGE_WEIGHT:
        config = replace(config, lanes=min(lanes, 64), teams=1, rows=8)
    elif pieces > lanes:
        config = replace(config, unroll=2)
    return config


def _long_wide(n: int, k: int, pieces: int, normed: bool) -> GemvConfig:
    """The same for codes that fill more than four bits; pieces: loads of four words in a row."""
    config = GemvConfig(lanes=128, teams=1, rows=4, words=4)
    if n * k >= SMALL_WEIGHT and (normed or pieces <= 128):
        return replace(config, lanes=64, teams=2)
    if n <= FEW_ROWS:
        return replace(config, rows=2, words=2 if pieces <= 128 else 4, unroll=2)
    return replace(config, unroll=2) if pieces <= 256 else config


def _threads(n: int, config: GemvConfig) -> int:
    return -(-n // config.rows) * config.lanes


def fit(config: GemvConfig, m: int, device: GPUDevice, gated: bool = False) -> GemvConfig:
    """`config` within the limits of `device`, for m rows of x."""
    least = 2 if gated else 1
    if config.rows % least:
        config = replace(config, rows=config.rows + 1)
    while config.threads > device.max_threads:
        if config.teams > 1:
            config = replace(config, teams=config.teams // 2)
        else:
            config = replace(config, lanes=config.lanes // 2)

    while _sums_bytes(config, m) > device.shared_bytes and config.rows > least:
        config = replace(config, rows=max(config.rows // 4 * 2, least))
    while _sums_bytes(config, m) > device.shared_bytes and config.teams > 1:
        config = replace(config, teams=config.teams // 2)
    return config


def _sums_bytes(config: GemvConfig, m: int) -> int:
    """Group memory of the partial sums, one more of a team for a norm."""
    return 4 * config.teams * (config.rows * m + 1) * (config.lanes + 1)
