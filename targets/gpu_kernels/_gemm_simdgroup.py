"""Many rows of x times a weight with Apple's 8x8 simdgroup matrices, for prefill.

A group of SIMD groups (32 threads each) computes a tile of `tile_m` rows by `tile_n` columns,
`depth` elements of K at a time: both operands go to group memory, the weight dequantised, each row
of x and of the weight along K; every SIMD group multiplies its part of the tile in matrices.

- Operands are float16 when x and the weight's model dtype are, else float32; sums always float32.
  A packed float16 weight is thus rounded to float16, as a dequantised checkpoint would be.
- Any n, N and K: rows beyond the last repeat it, x and plain weights are zero beyond K.
- Sums leave through group memory: a matrix can't be stored in part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.quantization.scheme import QuantScheme
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
    shared,
    store,
)
from mlc_compile.targets.gpu_kernels._gemm import QUAD, _guarded, _Loader, _store_quad
from mlc_compile.targets.gpu_kernels._gemv import Operands
from mlc_compile.targets.gpu_kernels._packed import (
    concat,
    fields,
    splat,
    vector,
    view,
    widest,
    zero_of,
)
from mlc_compile.targets.gpu_kernels.device import GPUDevice

SIDE = 8  # of a simdgroup matrix
SIMD = 32  # threads of a SIMD group
PAD_BYTES = 16  # between rows of a tile, so that the rows of a matrix lie in different banks


@dataclass(frozen=True)
class SimdgroupConfig:
    """How the product is cut.

    tile_m, tile_n: rows of x and of the weight of one group. depth: of K in one turn, a multiple of
    8 and of the elements of a word. simds_m, simds_n: SIMD groups across either side; the part of
    each is a multiple of 8.
    """

    tile_m: int = 64
    tile_n: int = 64
    depth: int = 32
    simds_m: int = 2
    simds_n: int = 2

    @property
    def threads(self) -> int:
        return SIMD * self.simds_m * self.simds_n

    def stride(self, dtype: str) -> int:
        """Elements between rows of a tile."""
        return self.depth + PAD_BYTES // _bytes(dtype)

    def shared_bytes(self, dtype: str) -> int:
        """Of the two tiles, and of the sums on their way out."""
        tiles = _bytes(dtype) * self.stride(dtype) * (self.tile_m + self.tile_n)
        return tiles + _bytes(F32) * SIDE * self.simds_m * self.tile_n

    @property
    def label(self) -> str:
        """A short name, for tables."""
        return f"{self.tile_m}x{self.tile_n}x{self.depth}_{self.simds_m}x{self.simds_n}"


def _bytes(dtype: str) -> int:
    return 2 if dtype == "float16" else 4


def operand_dtype(operands: Operands, scheme: QuantScheme | None) -> str:
    """Of the tiles: what holds x and the values of the weight without loss."""
    weight = str(operands.weight[0].dtype) if scheme is None else scheme.model_dtype
    halves = str(operands.x.dtype) == "float16" and weight == "float16"
    return "float16" if halves else F32


def choose(
    operands: Operands, scheme: QuantScheme | None, device: GPUDevice
) -> SimdgroupConfig | None:
    """The configuration; None where the device has no matrices, or too little for the tiles."""
    if not device.simdgroup_matrix:
        return None
    unit = SIDE if scheme is None else math.lcm(SIDE, scheme.elems_per_word)
    config = SimdgroupConfig()
    config = replace(config, depth=max(config.depth // unit, 1) * unit)
    taken = config.shared_bytes(operand_dtype(operands, scheme))
    fits = config.threads <= device.max_threads and taken <= device.shared_bytes
    return config if fits else None


def gemm(operands: Operands, scheme: QuantScheme | None, config: SimdgroupConfig) -> None:
    """One launch; grid x goes over the columns, so that groups in flight share rows of x."""
    n, k = operands.n, operands.k
    dtype = operand_dtype(operands, scheme)
    stride = config.stride(dtype)
    part_m, part_n = config.tile_m // config.simds_m, config.tile_n // config.simds_n
    across, down = part_n // SIDE, part_m // SIDE
    x = _Plain(operands.x, operands.n_rows, k)
    weight = _Plain(operands.weight[0], n, k) if scheme is None else _Packed(operands, scheme)
    out_lanes = widest(n)
    out_view = view(operands.out, (operands.n_rows, n // out_lanes), out_lanes)
    grid = groups(n, config.tile_n), groups(operands.n_rows, config.tile_m)
    with launch(config.threads, *grid) as (tx, bx, by):
        row0, column0 = bind(by * i32(config.tile_m)), bind(bx * i32(config.tile_n))
        simd, lane = bind(tirx.truncdiv(tx, i32(SIMD))), bind(tirx.truncmod(tx, i32(SIMD)))
        part_row = bind(tirx.truncdiv(simd, i32(config.simds_n)) * i32(part_m))
        part_column = bind(tirx.truncmod(simd, i32(config.simds_n)) * i32(part_n))
        x_tile = shared([config.tile_m * stride], dtype)
        w_tile = shared([config.tile_n * stride], dtype)
        staged = shared([config.threads // SIMD * SIDE * part_n], F32)
        # TVM gives arrays that are not alive at once the same memory, and then refuses pointers of
        # the other type: this keeps the staged sums alive from the start.
        store(staged, [tx], f32(0.0))
        a, b = _matrices(down, dtype), _matrices(across, dtype)
        sums = _matrices(down * across, F32)
        for i in range(down * across):
            T.evaluate(T.metal.make_filled_simdgroup_matrix(sums.data, i, f32(0.0), SIDE, SIDE))
        loader = _Loader(tx, config.threads)
        with loop(-(-k // config.depth)) as turn:
            k0 = bind(turn * i32(config.depth))
            x.fill(x_tile, loader, row0, k0, config.tile_m, config.depth, stride)
            weight.fill(w_tile, loader, column0, k0, config.tile_n, config.depth, stride)
            barrier()
            with loop(config.depth // SIDE) as step:
                for i in range(down):
                    at = (part_row + i32(SIDE * i)) * i32(stride) + step * i32(SIDE)
                    _load_matrix(a, i, x_tile, at, stride, transposed=False)
                for j in range(across):
                    at = (part_column + i32(SIDE * j)) * i32(stride) + step * i32(SIDE)
                    _load_matrix(b, j, w_tile, at, stride, transposed=True)
                for i in range(down):
                    for j in range(across):
                        c = i * across + j
                        T.evaluate(
                            T.metal.simdgroup_multiply_accumulate(
                                sums.data, c, a.data, i, b.data, j, sums.data, c
                            )
                        )
            barrier()
        mine = bind(simd * i32(SIDE * part_n))
        quads = part_n // QUAD
        for i in range(down):
            for j in range(across):
                pointer = staged.access_ptr("w", ptr_type=F32, offset=mine + i32(SIDE * j))
                T.evaluate(
                    T.metal.simdgroup_store(
                        sums.data, i * across + j, pointer, part_n, SIDE, SIDE, False
                    )
                )
            barrier()
            for first in range(0, SIDE * quads, SIMD):
                item = bind(lane + i32(first))
                line, quad = tirx.truncdiv(item, i32(quads)), tirx.truncmod(item, i32(quads))
                total = bind(load(staged, _span(mine + item * i32(QUAD), QUAD)))
                row = bind(row0 + part_row + i32(SIDE * i) + line)
                column = bind(column0 + part_column + quad * i32(QUAD))
                exists = row < operands.n_rows
                _store_quad(operands, out_view, row, exists, column, total)
            if i + 1 < down:
                barrier()


def _matrices(count: int, dtype: str) -> Buffer:
    """An array of simdgroup matrices; index it with constants."""
    shape = [i32(count * SIDE * SIDE)]
    return T.alloc_buffer(shape, dtype, scope="metal.simdgroup", layout=None)


def _load_matrix(
    to: Buffer, index: int, tile: Buffer, at: Expr, stride: int, *, transposed: bool
) -> None:
    pointer = tile.access_ptr("r", ptr_type=str(tile.dtype), offset=at)
    T.evaluate(T.metal.simdgroup_load(to.data, index, pointer, stride, SIDE, SIDE, transposed))


def _span(at: Expr, lanes: int) -> Expr:
    """An index of `lanes` elements from `at`."""
    return at if lanes == 1 else tirx.Ramp(at, i32(1), lanes)


class _Plain:
    """A matrix [rows, k] of floats, contiguous along k."""

    def __init__(self, buffer: Buffer, rows: Expr | int, k: int) -> None:
        self.k = k
        self.last = i32(rows - 1) if isinstance(rows, int) else rows - i32(1)
        self.lanes = widest(k)
        self._vectors = view(buffer, (rows, k // self.lanes), self.lanes)

    def fill(
        self,
        tile: Buffer,
        loader: _Loader,
        row0: Expr,
        k0: Expr,
        rows: int,
        depth: int,
        stride: int,
    ) -> None:
        """tile[row, kk] = element (row0 + row, k0 + kk), zero beyond k; rows beyond the last repeat
        it. Neighbours read along k."""
        lanes = self.lanes
        across = depth // lanes
        dtype = vector(str(tile.dtype), lanes)

        def one(item: Expr) -> None:
            row = bind(tirx.truncdiv(item, i32(across)))
            column = bind(tirx.truncmod(item, i32(across)))
            index = bind(tirx.truncdiv(k0, i32(lanes)) + column)
            value = cast(load(self._vectors, tirx.min(row0 + row, self.last), index), dtype)
            if self.k % depth:
                zero = splat(tirx.const(0.0, str(tile.dtype)), lanes)
                value = tirx.if_then_else(index < i32(self.k // lanes), value, zero)
            store(tile, [_span(row * i32(stride) + column * i32(lanes), lanes)], value)

        for item, exists in loader.each(rows * across):
            _guarded(exists, lambda item=item: one(item))


class _Packed:
    """A packed weight, dequantised on its way to group memory."""

    def __init__(self, operands: Operands, scheme: QuantScheme) -> None:
        self.scheme, self.n, self.k = scheme, operands.n, operands.k
        self._weight = operands.weight
        self._words, self._scales, *_ = self._weight

    def fill(
        self,
        tile: Buffer,
        loader: _Loader,
        column0: Expr,
        k0: Expr,
        columns: int,
        depth: int,
        stride: int,
    ) -> None:
        """tile[column, kk] = the weight of column0 + column at k0 + kk, any number beyond K, where
        x is zero; columns beyond the last repeat it. A thread takes a word at a time."""
        scheme = self.scheme
        kn, per_word = scheme.layout == "KN", scheme.elems_per_word
        words, lanes = depth // per_word, widest(per_word)
        dtype = vector(str(tile.dtype), lanes)

        def one(item: Expr) -> None:
            if kn:  # neighbours read neighbouring columns
                column, word = tirx.truncmod(item, i32(columns)), tirx.truncdiv(item, i32(columns))
            else:
                word, column = tirx.truncmod(item, i32(words)), tirx.truncdiv(item, i32(words))
            word, column = bind(word), bind(column)
            index = bind(tirx.truncdiv(k0, i32(per_word)) + word)
            if scheme.num_words(self.k) % words:
                index = bind(tirx.min(index, i32(scheme.num_words(self.k) - 1)))
            group = bind(tirx.truncdiv(index, i32(scheme.words_per_group)))
            row = bind(tirx.min(column0 + column, i32(self.n - 1)))
            packed = bind(load(self._words, *((index, row) if kn else (row, index))))
            scale = bind(load_f32(self._scales, *((group, row) if kn else (row, group))))
            zero = zero_of(self._weight, row, group, scheme)
            values = [(v - zero) * scale for v in fields(packed, scheme, "bytes").values]
            at = bind(column * i32(stride) + word * i32(per_word))
            for e in range(0, per_word, lanes):
                several = values[e : e + lanes]
                value = several[0] if lanes == 1 else concat(several)
                store(tile, [_span(at + i32(e), lanes)], cast(value, dtype))

        for item, exists in loader.each(words * columns):
            _guarded(exists, lambda item=item: one(item))
