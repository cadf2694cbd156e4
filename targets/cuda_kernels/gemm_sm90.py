"""Many rows of x times a weight in layout "NK" on the `wgmma` units of Hopper: cuh/gemm_sm90.cuh.

Two launches, or three: x is brought into the tiles that the product fetches (in a workspace), the
product, and, where its blocks are too few for the device, so that they share k out, the sum of
their parts. The host chooses the cut at each call; benchmarks/NOTES.md has what it rests on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels._launch import device_call
from mlc_compile.targets.gpu_kernels._emit import Buffer, Expr, bind, groups, i32
from mlc_compile.targets.kernels import LinearSpec

HEADER = "gemm_sm90.cuh"
MULTIPROCESSORS = 132
"""Of an H100 or H200 (SXM)."""
CHUNK = 128
"""k that a block takes at a time."""
MIN_SPLIT = 4
"""Chunks that a part of k has at least."""
MAX_SPLITS = 8

_ELEMENTS = {"float16": "half", "bfloat16": "__nv_bfloat16", "float32": "float"}


@dataclass(frozen=True)
class Plan:
    """How a block cuts the product.

    warpgroups: 64 rows of the weight each. columns: rows of x (128 or 256). stages: tiles of 64 k
    of x in shared memory.
    """

    warpgroups: int
    columns: int
    stages: int

    @property
    def rows(self) -> int:
        """Of the weight."""
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        return 128 * self.warpgroups

    @property
    def shared_bytes(self) -> int:
        """See the header."""
        return 1024 + self.columns * (128 * self.stages + 144 * self.warpgroups)


SMALL = Plan(warpgroups=2, columns=128, stages=4)
"""Two blocks of a multiprocessor."""
LARGE = Plan(warpgroups=2, columns=256, stages=4)
"""One block of a multiprocessor, which reads x half as often."""

# Time (in the same unit) of a multiprocessor for one small block, two at once, and a large one.
ONE_SMALL, TWO_SMALL, ONE_LARGE = 33, 55, 54


def supports(spec: LinearSpec) -> bool:
    """Whether `emit_gemm` has kernels for `spec`: float16, also packed in 4 or 8 bits, and
    bfloat16, also packed in 4 bits, symmetric; outputs of x's dtype or float32; groups of 32 fill
    K."""
    if spec.x_dtype not in ("float16", "bfloat16") or spec.in_features % 32 != 0:
        return False
    if spec.norm_eps is not None or spec.activation is not None:
        return False
    if spec.out_dtype not in (spec.x_dtype, "float32"):
        return False
    if spec.has_bias and spec.bias_dtype not in (None, spec.x_dtype):
        return False
    scheme = spec.scheme
    if scheme is None:
        return spec.weight_dtype == spec.x_dtype
    bits = (4, 8) if spec.x_dtype == "float16" else (4,)
    return (
        scheme.layout == "NK"
        and scheme.codes == "symmetric"
        and scheme.model_dtype == spec.x_dtype
        and scheme.bits in bits
        and scheme.group_size == 32
    )


def emit_gemm(
    spec: LinearSpec, buffers: Mapping[str, Buffer], n: Expr | int, archs: CudaArchs
) -> None:
    """The launches of `spec` for any number n of rows, for a device of capability 9.0 alone;
    `buffers` has the names of `spec.arguments`."""
    n = i32(n) if isinstance(n, int) else n
    # Of any of the cuts below: TVM would keep the workspaces of all of them.
    tiles = T.alloc_buffer(
        [groups(_any(n), LARGE.columns) * i32(LARGE.columns * _chunks(spec) * CHUNK)],
        spec.x_dtype,
        scope="global",
        layout=None,
    )

    def whole(plan: Plan) -> None:
        _product(spec, buffers, n, plan, tiles, _chunks(spec), i32(1), buffers["out"])

    def many() -> None:
        blocks = _blocks(spec, n, SMALL)
        rounds = tirx.truncdiv(blocks, i32(2 * MULTIPROCESSORS))
        rest = blocks - rounds * i32(2 * MULTIPROCESSORS)
        last = tirx.Select(
            rest <= i32(MULTIPROCESSORS),
            tirx.Select(rest == i32(0), i32(0), i32(ONE_SMALL)),
            i32(TWO_SMALL),
        )
        small = rounds * i32(TWO_SMALL) + last
        large = groups(_blocks(spec, n, LARGE), MULTIPROCESSORS) * i32(ONE_LARGE)
        _choose(large <= small, lambda: whole(LARGE), lambda: whole(SMALL))

    few = split_rows(spec)
    if few:
        _choose(n <= i32(few), lambda: _split_product(spec, buffers, n, tiles), many)
    else:
        many()


def split_rows(spec: LinearSpec) -> int:
    """Up to how many rows blocks share k out: while that keeps twice as many of them busy."""
    if _chunks(spec) < 2 * MIN_SPLIT:
        return 0
    return SMALL.columns * (MULTIPROCESSORS // (2 * _weight_tiles(spec, SMALL)))


def _chunks(spec: LinearSpec) -> int:
    return -(-spec.in_features // CHUNK)


def _weight_tiles(spec: LinearSpec, plan: Plan) -> int:
    return -(-spec.out_features // plan.rows)


def _blocks(spec: LinearSpec, n: Expr, plan: Plan) -> Expr:
    return bind(groups(n, plan.columns) * i32(_weight_tiles(spec, plan)))


def _split_product(spec: LinearSpec, buffers: Mapping[str, Buffer], n: Expr, tiles: Buffer) -> None:
    """The product in parts of k, and their sum."""
    any_n = _any(n)
    blocks = groups(tirx.max(any_n, i32(1)), SMALL.columns) * i32(_weight_tiles(spec, SMALL))
    most = min(MAX_SPLITS, _chunks(spec) // MIN_SPLIT)
    wanted = bind(
        tirx.max(tirx.min(tirx.truncdiv(i32(MULTIPROCESSORS), blocks), i32(most)), i32(1))
    )
    chunks = bind(_ceil_div(i32(_chunks(spec)), wanted))
    count = bind(_ceil_div(i32(_chunks(spec)), chunks))
    parts = T.alloc_buffer(
        [count * tirx.min(any_n, i32(split_rows(spec))) * i32(spec.out_features)],
        "float32",
        scope="global",
        layout=None,
    )
    _product(spec, buffers, n, SMALL, tiles, chunks, count, parts)
    device_call(
        HEADER,
        f"sum_splits<{_types(spec, spec.out_dtype)}, {_flags(spec)}>",
        [
            parts,
            buffers.get("bias", buffers["x"]),
            buffers.get("residual", buffers["out"]),
            buffers["out"],
            n,
            i32(spec.out_features),
            count,
        ],
        threads=256,
        grid=[groups(n * i32(spec.out_features), 1024)],
    )


def _any(n: Expr) -> Expr:
    """n, for the extent of a workspace. TVM allocates workspaces where the function begins,
    whatever n is, having simplified their extents by what holds where they stand: extents must be
    sound for every n, and hide where n comes from."""
    return tirx.reinterpret("int32", tirx.reinterpret("float32", n))


def _ceil_div(a: Expr, b: Expr) -> Expr:
    return tirx.truncdiv(a + b - i32(1), b)


def _product(
    spec: LinearSpec,
    buffers: Mapping[str, Buffer],
    n: Expr,
    plan: Plan,
    tiles: Buffer,
    chunks: Expr | int,
    splits: Expr,
    out: Buffer,
) -> None:
    """x into tiles, and the product; with `splits` parts of `chunks` chunks `out` is theirs."""
    k, x = spec.in_features, buffers["x"]
    bits = 16 if spec.scheme is None else spec.scheme.bits
    plain = str(bits == 16).lower()
    columns = bind(groups(n, plan.columns))
    device_call(
        HEADER,
        f"tile_rows<{plan.columns}, {plain}>",
        [x, tiles, n, i32(k)],
        threads=256,
        grid=[_chunks(spec), columns * i32(plan.columns // 64)],
    )
    split = out is not buffers["out"]
    types = _types(spec, "float32" if split else spec.out_dtype)
    cut = f"{plan.warpgroups}, {plan.columns}, {plan.stages}"
    flags = "false, false" if split else _flags(spec)
    device_call(
        HEADER,
        f"gemm_sm90<{types}, {bits}, {cut}, {flags}>",
        [
            tiles,
            buffers["weight" if spec.scheme is None else "q_weight"],
            buffers.get("q_scale", x),
            buffers.get("bias", x),
            out if split else buffers.get("residual", out),
            out,
            n,
            i32(spec.out_features),
            i32(k),
            i32(chunks) if isinstance(chunks, int) else chunks,
        ],
        threads=plan.threads,
        grid=[columns, _weight_tiles(spec, plan), splits],
        shared_bytes=plan.shared_bytes,
    )


def _types(spec: LinearSpec, out_dtype: str) -> str:
    """Half and Out: pointers come without (bfloat16 is an integer type where a device lacks it)."""
    return f"{_ELEMENTS[spec.x_dtype]}, {_ELEMENTS[out_dtype]}"


def _flags(spec: LinearSpec) -> str:
    """Bias and Residual."""
    return f"{str(spec.has_bias).lower()}, {str(spec.residual).lower()}"


def _choose(condition: Expr, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Host-side choice between two sets of launches."""
    with T.If(condition):
        with T.Then():
            then()
        with T.Else():
            otherwise()
