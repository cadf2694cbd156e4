"""One row of x times a weight in layout "NK": which instance of cuh/gemv.cuh, cut how.

How the kernel works stands in the header; benchmarks/NOTES.md has what the choices here rest on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels._launch import device_call
from mlc_compile.targets.gpu_kernels._emit import Buffer, f32, i32
from mlc_compile.targets.kernels import LinearSpec

_HEADER = "gemv.cuh"
_NORM, _BIAS, _RESIDUAL, _GATED = 1, 2, 4, 8  # kGemv... of the header

_SHARED_BYTES = {75: 64 << 10, 80: 99 << 10, 90: 227 << 10}
"""Shared memory of a block, by the oldest architecture of a library: what every device has that
runs its code (sm_86 and sm_89 run sm_80's)."""
_ALONE_BYTES = 116 << 10
"""With this much a block has a Hopper's multiprocessor to itself. Where two fit, those of the next
kernel are placed while blocks of this one end here and there, and some get a neighbour: measured,
the whole chain then takes 1.4 times as long."""
_STATIC_BYTES = 64
"""Of which the kernel declares this much itself."""


@dataclass(frozen=True)
class Format:
    """A format of gemv.cuh. piece: elements in 16 bytes of a row; x_bytes: of one of x.

    minimum: the oldest architecture that has the arithmetic. scale_bytes: of a row and step. raw:
    codes are multiplied with what they have too much, which is taken off their sums.
    """

    name: str
    piece: int
    x_bytes: int = 2
    minimum: int = 75
    scale_bytes: int = 0
    raw: bool = False


_PACKED = {
    (3, 40, "float16"): Format("packed3", 40, scale_bytes=32),
    (4, 32, "float16"): Format("packed4", 32, scale_bytes=32, raw=True),
    (8, 32, "float16"): Format("packed8", 16, scale_bytes=16),
    (4, 32, "bfloat16"): Format("packed4_bfloat16", 32, minimum=80, scale_bytes=32),
    (4, 32, "float32"): Format("packed4_float32", 32, 4, scale_bytes=64),
    (8, 32, "float32"): Format("packed8_float32", 16, 4, scale_bytes=32),
}
"""By bits, group size and dtype of the scales and of x; codes are symmetric."""
_PLAIN = {
    "float16": Format("float16", 8),
    "bfloat16": Format("bfloat16", 8, minimum=80),
    "float32": Format("float32", 4, 4),
}


@dataclass(frozen=True)
class GemvPlan:
    """How a product is cut; any choice is correct that fits the shared memory.

    warps: of a block. depth: steps of a warp under way at a time; ahead: of them, those that a
    dependent block asks for before its turn. team: warps that share a tile (a divisor of `warps`).
    blocks: of the grid.
    """

    warps: int
    depth: int
    ahead: int
    team: int
    blocks: int

    @property
    def resident(self) -> int:
        """Blocks of a multiprocessor: 1024 threads, which leaves each 64 registers."""
        return 32 // self.warps

    def shared_bytes(self, spec: LinearSpec, form: Format) -> int:
        """As laid out in gemv.cuh: weights under way, x, a vector of zeros for each of a piece,
        what codes have too much, the norm's weight, the sums of every team and tile."""
        along_k = steps(spec.in_features, form)
        x = along_k * 16 * form.piece * form.x_bytes
        zeros = 8 * form.piece * form.x_bytes
        sums = -(-tiles(spec) // self.blocks) * self.team * 8 * 4
        ring = self.warps * self.depth * 8 * (256 + form.scale_bytes)
        excess = along_k * 16 * 4 if form.raw else 0
        return ring + x * (1 if spec.norm_eps is None else 2) + zeros + excess + sums


def supports(spec: LinearSpec, archs: CudaArchs | None = None) -> bool:
    """Whether `emit_gemv` has a kernel for one row of `spec`.

    archs: those of the library; without them, what every architecture can do.
    """
    form = find_format(spec)
    if form is None:
        return False
    archs = archs or CudaArchs((75,))
    plan = choose(spec, archs)
    return form.minimum <= archs.minimum and plan.shared_bytes(spec, form) <= _limit(archs)


def emit_gemv(spec: LinearSpec, buffers: Mapping[str, Buffer], archs: CudaArchs) -> None:
    """The launch of `spec` for the first row of x; `buffers` has the names of `spec.arguments`."""
    form = find_format(spec)
    if form is None:
        raise ValueError(f"no one-row kernel for {spec}")
    plan = choose(spec, archs)
    x, out = buffers["x"], buffers["out"]
    weight = buffers["weight" if spec.scheme is None else "q_weight"]
    name = "gemv_dependent" if archs.dependent_launch else "gemv"
    groups = 0 if spec.scheme is None else spec.scheme.num_groups(spec.in_features)
    device_call(
        _HEADER,
        f"{name}<mlc::gemv_format::{form.name}, {plan.warps}, {plan.depth}, {plan.ahead}, "
        f"{_flags(spec)}>",
        [
            # What the flags do not name is not read: any pointer will do.
            x,
            buffers.get("norm_weight", x),
            weight,
            buffers.get("q_scale", x),
            buffers.get("bias", x),
            buffers.get("residual", out),
            out,
            i32(spec.out_features),
            i32(spec.in_features),
            i32(groups),
            f32(spec.norm_eps or 0.0),
            i32(plan.team),
        ],
        threads=32 * plan.warps,
        grid=[plan.blocks],
        shared_bytes=max(
            plan.shared_bytes(spec, form), _ALONE_BYTES if archs.dependent_launch else 0
        ),
        min_blocks=plan.resident,
    )


_CUTS = ((16, 3, 1), (16, 2, 1), (16, 1, 1), (8, 1, 1))
"""Warps, depth and steps ahead, the fastest first; the others take less shared memory."""
_HOPPER_SMS = 132


def choose(spec: LinearSpec, archs: CudaArchs) -> GemvPlan:
    """The cut of a product whose format has a kernel."""
    form = find_format(spec)
    assert form is not None
    # Where launches depend on each other one block a multiprocessor, else two.
    dependent = archs.dependent_launch
    cuts = _CUTS if dependent else _CUTS[2:]
    most = _HOPPER_SMS if dependent else 2 * _HOPPER_SMS
    count = tiles(spec)
    blocks = max(min(most, count), -(-count // _TILES))
    plans = [
        GemvPlan(warps, depth, ahead, team, blocks)
        for warps, depth, ahead in cuts
        for team in _teams(count, steps(spec.in_features, form), warps, blocks)
    ]
    fitting = (p for p in plans if p.shared_bytes(spec, form) <= _limit(archs))
    return next(fitting, plans[-1])


_TILES = 128
"""Tiles of a block at most: each has its sums."""


def _teams(count: int, along_k: int, warps: int, blocks: int) -> list[int]:
    """Sizes of teams, best first: those with the fewest steps for the slowest warp, within 5 %."""
    turns = {
        team: -(-count // (blocks * (warps // team))) * -(-along_k // team) for team in (8, 4, 2, 1)
    }
    return [team for team, n in turns.items() if n <= 1.05 * min(turns.values())]


def find_format(spec: LinearSpec) -> Format | None:
    scheme = spec.scheme
    if scheme is None:
        form = _PLAIN.get(spec.weight_dtype or "")
        same = spec.weight_dtype == spec.x_dtype
        # Rows of whole vectors, so that each begins at a multiple of 16 bytes.
        return form if form and same and spec.in_features % form.piece == 0 else None
    if scheme.layout != "NK" or scheme.model_dtype != spec.x_dtype:
        return None
    if scheme.codes != "symmetric":
        return None
    return _PACKED.get((scheme.bits, scheme.group_size, scheme.model_dtype))


def _flags(spec: LinearSpec) -> int:
    return (
        (_NORM if spec.norm_eps is not None else 0)
        | (_BIAS if spec.has_bias else 0)
        | (_RESIDUAL if spec.residual else 0)
        | (_GATED if spec.activation is not None else 0)
    )


def steps(k: int, form: Format) -> int:
    """Turns of a warp along K: 16 pieces each."""
    return -(-k // (16 * form.piece))


def tiles(spec: LinearSpec) -> int:
    """8 weight rows each; of a gated product 4 and 4."""
    rows = 4 if spec.activation is not None else 8
    return -(-spec.out_width // rows)


def _limit(archs: CudaArchs) -> int:
    oldest = max(arch for arch in _SHARED_BYTES if arch <= max(archs.minimum, 75))
    return _SHARED_BYTES[oldest] - _STATIC_BYTES
