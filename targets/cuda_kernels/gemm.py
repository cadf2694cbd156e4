"""Several rows of x times a weight in layout "NK" on tensor cores: which instance, cut how.

- `emit_rows`: 2 to 16 rows (a batched decode step), cuh/gemm_rows.cuh; bound by reading the weight.
- `emit_gemm`: any number of rows (prefill), cuh/gemm_mma.cuh.

How the kernels work stands in the headers; benchmarks/NOTES.md has what the choices here rest on.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels._launch import device_call
from mlc_compile.targets.gpu_kernels._emit import Buffer, Expr, groups, i32
from mlc_compile.targets.kernels import LinearSpec

MAX_ROWS = 16
"""Of `emit_rows`."""
SHARED_BYTES = {75: 64 << 10, 80: 99 << 10}
"""What a block may have, by the oldest architecture: of sm_86 and sm_89 for all from sm_80 on."""
_TYPES = {"float32": "float", "float16": "half", "bfloat16": "__nv_bfloat16"}


WIDTHS = (2048, 4096, 8192)
"""Numbers of weight rows at which the cuts of `emit_rows` change. Narrow weights need small tiles
and many warps that share K out, wide ones have blocks enough for tiles that read x less often."""
_Cuts = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Format:
    """A format of gemm_formats.cuh.

    unit: elements in 16 bytes of a row. cuts: tiles and warps of `RowsPlan` for weights up to each
    of WIDTHS and beyond, for 8 and for 16 rows. depth: k of one turn of gemm_mma. minimum: the
    oldest architecture that has the arithmetic.
    """

    name: str
    unit: int
    cuts: tuple[_Cuts, _Cuts]
    depth: int = 64
    scaled: bool = True
    minimum: int = 75


_PLAIN_CUTS = (((1, 16), (2, 16), (2, 16), (2, 8)), ((1, 16), (2, 16), (2, 8), (2, 8)))
_PACKED = {
    (3, 40): _Format(
        "Q3",
        40,
        (((1, 16), (2, 16), (2, 8), (4, 8)), ((1, 8), (2, 8), (2, 8), (4, 8))),
        depth=80,
    ),
    (4, 32): _Format(
        "Q4", 32, (((1, 16), (1, 16), (1, 8), (2, 8)), ((1, 16), (2, 16), (2, 8), (4, 4)))
    ),
    (8, 32): _Format(
        "Q8", 16, (((1, 16), (1, 16), (2, 16), (2, 8)), ((1, 16), (2, 16), (2, 8), (4, 8)))
    ),
}
"""By bits and group size; codes are symmetric, scales and x float16."""
_PLAIN = {
    "float16": _Format("Plain<half>", 8, _PLAIN_CUTS, scaled=False),
    "bfloat16": _Format("Plain<__nv_bfloat16>", 8, _PLAIN_CUTS, scaled=False, minimum=80),
}


@dataclass(frozen=True)
class RowsPlan:
    """How gemm_rows.cuh cuts the product.

    tiles: of 16 weight rows, of a block. columns: of 8 rows of x. warps: of a block, which share K
    out. span: 16-byte units of a row that a lane takes at a time.
    """

    tiles: int
    columns: int
    warps: int
    span: int

    def shared_bytes(self, form: _Format) -> int:
        """gemm_rows_shared of the header."""
        x = self.warps * 8 * self.columns * self.span * (form.unit // 2) * 16
        sums = self.warps * 8 * self.columns * (16 * self.tiles + 4) * 4
        return max(x, sums)


@dataclass(frozen=True)
class MmaPlan:
    """How gemm_mma.cuh cuts the product.

    block_m, block_n: rows of the weight and of x of a block; warp_m, warp_n: of a warp; warps_k:
    that share k out. stages: of the pipeline of copies.
    """

    block_m: int
    block_n: int
    warp_m: int
    warp_n: int
    warps_k: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * (self.block_m // self.warp_m) * (self.block_n // self.warp_n) * self.warps_k

    def shared_bytes(self, form: _Format) -> int:
        """GemmMmaShape::kSharedBytes of the header."""
        x, weight = self.block_n * form.depth * 2, self.block_m * form.depth // form.unit * 16
        slots = -(-(self.stages - 1) // (4 // self.warps_k)) + 1 if form.scaled else 0
        ring = self.stages * self.warps_k * (x + weight) + slots * self.block_m * 16
        out = self.threads // 32 * 16 * (self.warp_m + 4) * 4
        return max(ring, out, (self.warps_k - 1) * self.block_m * self.block_n * 4)


_Plan = TypeVar("_Plan")


def supports(spec: LinearSpec, archs: CudaArchs | None = None) -> bool:
    """Whether `emit_rows` and `emit_gemm` have kernels for `spec`.

    archs: those of the library; without them, what every architecture can do.
    """
    form = find_format(spec)
    oldest = 75 if archs is None else archs.minimum
    product = spec.norm_eps is None and spec.activation is None
    # Rows of x begin at multiples of 16 bytes.
    return form is not None and form.minimum <= oldest and product and spec.in_features % 8 == 0


def emit_rows(
    spec: LinearSpec, buffers: Mapping[str, Buffer], n: Expr | int, archs: CudaArchs
) -> None:
    """The launch of `spec` for n rows, 1 <= n <= MAX_ROWS; `buffers` has the names of
    `spec.arguments`."""
    form = _required_format(spec)

    def launch(plan: RowsPlan) -> None:
        name = "gemm_rows_dependent" if archs.dependent_launch else "gemm_rows"
        cut = f"{plan.tiles}, {plan.columns}, {plan.warps}, {plan.span}"
        device_call(
            "gemm_rows.cuh",
            f"{name}<mlc::gemm_format::{form.name}, {cut}, {_flags(spec)}>",
            _arguments(spec, buffers, n),
            threads=32 * plan.warps,
            grid=[groups(spec.out_features, 16 * plan.tiles)],
            shared_bytes=plan.shared_bytes(form),
        )

    few, more = (choose_rows(spec, c, dependent=archs.dependent_launch) for c in (1, 2))
    _by_rows(n, [(8, few), (None, more)], launch)


def emit_gemm(
    spec: LinearSpec, buffers: Mapping[str, Buffer], n: Expr | int, archs: CudaArchs
) -> None:
    """The launch of `spec` for any number n of rows; `buffers` as in `emit_rows`."""
    form = _required_format(spec)

    def launch(plan: MmaPlan) -> None:
        tile = f"{plan.block_m}, {plan.block_n}, {plan.warp_m}, {plan.warp_n}"
        cut = f"{tile}, {plan.warps_k}, {plan.stages}"
        device_call(
            "gemm_mma.cuh",
            f"gemm_mma<mlc::gemm_format::{form.name}, {cut}, {_flags(spec)}>",
            _arguments(spec, buffers, n),
            threads=plan.threads,
            # Blocks of one part of the weight run together: it comes from memory once.
            grid=[groups(n, plan.block_n), groups(spec.out_features, plan.block_m)],
            shared_bytes=plan.shared_bytes(form),
        )

    _by_rows(n, choose_gemm(spec, archs), launch)


def choose_rows(spec: LinearSpec, columns: int, *, dependent: bool = False) -> RowsPlan:
    """The cut for up to 8 * columns rows, launched as a dependent or not."""
    form = _required_format(spec)
    width = bisect.bisect_left(WIDTHS, spec.out_features)
    tiles, warps = form.cuts[columns - 1][width]
    if dependent and columns == 1 and (tiles, warps) == (1, 8):
        tiles, warps = 2, 16  # many small blocks that start early share the device out unevenly
    span = 1 if form.scaled else 2
    # No more warps than there are turns to share out.
    turns = -(-spec.in_features // (4 * span * form.unit))
    while warps > 4 and warps >= 2 * turns:
        warps //= 2
    return RowsPlan(tiles, columns, warps, span)


def choose_gemm(spec: LinearSpec, archs: CudaArchs) -> list[tuple[int | None, MmaPlan]]:
    """Cuts, each with the number of rows up to which it is taken; None: any."""
    form = _required_format(spec)
    most = SHARED_BYTES[80 if archs.minimum >= 80 else 75]

    def fit(plan: MmaPlan) -> MmaPlan:
        """With as deep a pipeline, of at most so many stages, as fits."""
        while plan.shared_bytes(form) > most and plan.stages > 2:
            plan = replace(plan, stages=plan.stages - 1)
        return plan

    # With two stages, two blocks share a multiprocessor of an sm_86 or sm_89 as well.
    large = MmaPlan(128, 128, 64, 64, 1, 3 if archs.minimum >= 90 and form.name == "Q4" else 2)
    return [
        (64, fit(MmaPlan(32, 32, 32, 32, 4, 3))),
        (256, fit(MmaPlan(64, 64, 64, 32, 2, 3))),
        (None, large),
    ]


def find_format(spec: LinearSpec) -> _Format | None:
    """The format of the kernels for the weight of `spec`."""
    scheme = spec.scheme
    if scheme is None:
        same = spec.weight_dtype == spec.x_dtype
        return _PLAIN.get(spec.x_dtype) if same else None
    if scheme.layout != "NK" or {scheme.model_dtype, spec.x_dtype} != {"float16"}:
        return None
    if scheme.codes != "symmetric":
        return None
    return _PACKED.get((scheme.bits, scheme.group_size))


def _required_format(spec: LinearSpec) -> _Format:
    form = find_format(spec)
    if form is None:
        raise ValueError(f"no kernel for {spec}")
    return form


def _flags(spec: LinearSpec) -> str:
    """kBias, kResidual, and the types of the output and of the bias."""
    flags = f"{str(spec.has_bias).lower()}, {str(spec.residual).lower()}"
    return f"{flags}, {_TYPES[spec.out_dtype]}, {_TYPES[spec.bias_dtype or spec.x_dtype]}"


def _arguments(spec: LinearSpec, buffers: Mapping[str, Buffer], n: Expr | int) -> list[Expr]:
    """Of either kernel. What the flags don't name is not read: any pointer will do."""
    x, out = buffers["x"], buffers["out"]
    weight = buffers["weight" if spec.scheme is None else "q_weight"]
    return [
        x,
        weight,
        buffers.get("q_scale", x),
        buffers.get("bias", x),
        buffers.get("residual", out),
        out,
        i32(n) if isinstance(n, int) else n,
        i32(spec.out_features),
        i32(spec.in_features),
    ]


def _by_rows(
    n: Expr | int, plans: Sequence[tuple[int | None, _Plan]], launch: Callable[[_Plan], None]
) -> None:
    """Launch the first plan that goes up to n rows; host code chooses where n is symbolic."""
    limit, plan = plans[0]
    if limit is None or (isinstance(n, int) and n <= limit):
        launch(plan)
    elif isinstance(n, int):
        _by_rows(n, plans[1:], launch)
    else:
        with T.If(n <= i32(limit)):
            with T.Then():
                launch(plan)
            with T.Else():
                _by_rows(n, plans[1:], launch)
