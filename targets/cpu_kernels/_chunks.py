"""A tile of a product cut along K: what `_gemm.py` does at once, by and by.

For experts that have few rows. There, unpacking a tile is no longer small beside multiplying with
it, and both are faster where the tile stays in the first-level cache.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx

from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.targets.cpu_kernels import _vector as vec
from mlc_compile.targets.cpu_kernels._gemm import STEP, Blocking, emit_group
from mlc_compile.targets.cpu_kernels._gemv import block_start
from mlc_compile.targets.cpu_kernels._packed import Groups, words_of_run
from mlc_compile.targets.cpu_kernels._vector import Buffer, Expr

CHUNK = 128
"""Elements of K, about: a chunk of a tile fits the first-level cache (128 x 48 floats: 24 KiB)."""


PREFETCH = 2  # chunks


class Chunks:
    """How the tiles of a weight with rows of `k` elements are cut.

    count: of chunks; depth: elements of each. A last one that would overhang is moved back, and
    then multiplied only from where the one before ended.
    """

    def __init__(self, k: int, scheme: QuantScheme | None, block: Blocking) -> None:
        self.k, self.scheme, self.block = k, scheme, block
        lanes = block.lanes
        if scheme is None:
            self._units, self._per_unit = k, 1
            unit = lanes
        else:
            self._units, self._per_unit = scheme.num_words(k), scheme.elems_per_word
            group = scheme.words_per_group
            if words_of_run(scheme, self._units, lanes) is None:
                unit = group
            elif group >= self._units:
                unit = lanes
            else:
                unit = max(lanes, group)
        wanted = max(CHUNK // (unit * self._per_unit), 1) * unit
        self._chunk = min(wanted, self._units)  # words, or elements of a plain weight
        self.count, self.depth = -(-self._units // self._chunk), self._chunk * self._per_unit

    def fill(self, weight: tuple[Buffer, ...], tile: Buffer, column: Expr, chunk: Expr) -> None:
        """The chunk of the output columns `column`.. -> tile [depth, width] in float32."""
        start = vec.bind(block_start(chunk, self._chunk, self._units))
        with vec.serial(self.block.vectors) as v:
            offset = vec.bind(v * vec.i64(self.block.lanes))
            first = vec.bind(column + offset)
            if self.scheme is None:
                self._plain(weight[0], tile, first, start, offset)
            else:
                self._packed(weight, tile, first, start, offset, self.scheme)

    def _plain(self, weight: Buffer, tile: Buffer, first: Expr, start: Expr, offset: Expr) -> None:
        lanes = self.block.lanes
        if self.depth >= lanes:
            with vec.serial(self.depth // lanes) as square:
                at = vec.bind(square * vec.i64(lanes))
                rows = [
                    vec.bind(vec.load_float(weight, [first + vec.i64(r), start + at], lanes))
                    for r in range(lanes)
                ]
                for i, value in enumerate(vec.transpose(rows, lanes)):
                    vec.store(tile, [at + vec.i64(i), offset], value, lanes)
        if self.depth % lanes:
            with vec.serial(self.depth % lanes) as i:
                at = vec.bind(i + vec.i64(self.depth - self.depth % lanes))
                value = vec.load_float_rows(weight, first, start + at, lanes)
                vec.store(tile, [at, offset], value, lanes)

    def _packed(
        self,
        weight: tuple[Buffer, ...],
        tile: Buffer,
        first: Expr,
        start: Expr,
        offset: Expr,
        scheme: QuantScheme,
    ) -> None:
        q_weight, groups = weight[0], Groups(weight, scheme)
        lanes, per_group = self.block.lanes, scheme.words_per_group
        run = words_of_run(scheme, self._units, lanes)

        def unpack_run(word: Expr, count: int, words: Callable[[Expr], Expr]) -> None:
            group = vec.bind(tirx.floordiv(start + word, vec.i64(per_group)))
            scale, zero = groups.of_rows(first, group, lanes)
            emit_group(words, count, scale, zero, tile, (word, offset), scheme, lanes)

        if run is None or self._chunk % lanes:
            with vec.serial(self._chunk // per_group) as g:
                word = vec.bind(g * vec.i64(per_group))
                unpack_run(
                    word,
                    per_group,
                    lambda w: vec.load_rows(q_weight, first, start + word + w, lanes),
                )
            return
        square = vec.buffer((lanes, lanes), "uint32")
        with vec.serial(self._chunk // lanes) as i:
            begin = vec.bind(i * vec.i64(lanes))
            for r in range(lanes):
                # Rows are too many streams for the hardware's prefetchers.
                ahead = start + begin + vec.i64(PREFETCH * self._chunk)
                vec.prefetch(q_weight, [first + vec.i64(r), ahead])
            rows = [
                vec.bind(vec.load(q_weight, [first + vec.i64(r), start + begin], lanes))
                for r in range(lanes)
            ]
            for r, value in enumerate(vec.transpose(rows, lanes)):
                vec.store(square, [r, 0], value, lanes)
            with vec.serial(lanes // run) as g:
                at = vec.bind(g * vec.i64(run))
                unpack_run(begin + at, run, lambda w: vec.load(square, [at + w, 0], lanes))

    def multiply(
        self,
        panels: Buffer,
        padded: int,
        panel: Expr,
        height: int,
        tile: Buffer,
        chunk: Expr,
        totals: Buffer,
        row: Expr,
    ) -> None:
        """totals[row .., :] += the panel's first `height` rows times the chunk."""
        lanes, rows = self.block.lanes, self.block.rows
        sums = [vec.accumulators(self.block.vectors, lanes) for _ in range(height)]
        places = [(r, v) for r in range(height) for v in range(self.block.vectors)]
        for r, v in places:
            value = vec.load(totals, [row + vec.i64(r), v * lanes], lanes)
            vec.put(sums[r][v], value, lanes)
        done = chunk * vec.i64(self._chunk)
        start = block_start(chunk, self._chunk, self._units)
        skipped = vec.bind((done - start) * vec.i64(self._per_unit))
        base = vec.bind(panel * vec.i64(padded * rows))

        def add(depth: Expr, first: Expr) -> None:
            """What row `depth` of the tile adds; `first`: the panel's element there."""
            columns = [
                vec.bind(vec.load(tile, [depth, v * lanes], lanes))
                for v in range(self.block.vectors)
            ]
            for r, per_row in enumerate(sums):
                activation = vec.load(panels, [first + vec.i64(r * STEP)], 1)
                activation = vec.bind(vec.splat(activation, lanes))
                for total, value in zip(per_row, columns, strict=True):
                    vec.put(total, vec.get(total, lanes) + activation * value, lanes)

        if self._per_unit * self._units % STEP == 0 and self.depth % STEP == 0:
            begin = vec.bind(base + start * vec.i64(self._per_unit * rows))
            steps = tirx.floordiv(skipped, vec.i64(STEP))
            with vec.serial(vec.i64(self.depth // STEP) - steps) as i:
                step = vec.bind(i + steps)
                with vec.serial(STEP) as lane:
                    depth = vec.bind(step * vec.i64(STEP) + lane)
                    add(depth, vec.bind(begin + step * vec.i64(STEP * rows) + lane))
        else:
            with vec.serial(vec.i64(self.depth) - skipped) as i:
                depth = vec.bind(i + skipped)
                at = vec.bind(start * vec.i64(self._per_unit) + depth)
                step = tirx.floordiv(at, vec.i64(STEP)) * vec.i64(STEP * rows)
                add(depth, vec.bind(base + step + tirx.floormod(at, vec.i64(STEP))))
        for r, v in places:
            at = [row + vec.i64(r), v * lanes]
            vec.store(totals, at, vec.get(sums[r][v], lanes), lanes)
