"""From some rows of a checkpoint's tensor to what is stored for them.

Rows are encoded by the scheme that their parameter has, on the device that was chosen; rows of a
tensor whose codes the scheme can hold are kept as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlc_compile.models.params import ParamSpec
from mlc_compile.quantization.codec import Scales, decode
from mlc_compile.quantization.compiled import Device, Encoder, encoder
from mlc_compile.quantization.errors import Float64, square_sums
from mlc_compile.quantization.group import narrow
from mlc_compile.quantization.hashing import Hasher
from mlc_compile.quantization.hold import hold, holds, losses, values
from mlc_compile.quantization.policy import is_quantized
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.parts import Part
from mlc_compile.weights.plan import ConversionPlan, ParamPlan

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]

_COMPILED_FROM = 50_000_000  # weights; below, importing TVM may take longer than numpy's packing
_COMPILED_RAM = 640 << 20  # bytes; below, TVM would take too large a part


@dataclass
class Sums:
    """Of some chunks: the squares of what is stored minus the source, and of the source."""

    error: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def add(self, other: Sums) -> None:
        """Takes in the chunks of another."""
        self.error += other.error
        self.weight += other.weight

    @property
    def total(self) -> tuple[float, float]:
        """Both, of all chunks: the same in whatever order they came."""
        return math.fsum(self.error), math.fsum(self.weight)

    @property
    def relative_error(self) -> float:
        """sqrt(sum e^2 / sum w^2), with six digits; 0 of a tensor of zeros."""
        error, weight = self.total
        return float(f"{math.sqrt(error / weight):.6g}") if weight else 0.0


@dataclass(frozen=True)
class Packer:
    """Packs rows of parameters; several threads may call it at once.

    Attributes:
        encoder: of quantization.compiled.
        scales: how a group's scale is chosen, as quantization.codec's.
        importance: of the input channels of a parameter, by its name.
        hasher: of what is written, where TVM is there for it.
    """

    checkpoint: Checkpoint
    scheme: QuantScheme
    encoder: Encoder
    scales: Scales = "auto"
    importance: Mapping[str, Float32] | None = None
    hasher: Hasher | None = None

    def pack(
        self, param: ParamPlan, part: Part, rows: slice, step: int
    ) -> tuple[tuple[Array, ...], Sums]:
        """The stored arrays of some rows, in layout "NK", and how far they are from the source.

        step: rows whose sums are one chunk.
        Raises InputError naming the tensor for a value that cannot be stored.
        """
        spec, name = param.spec, part.source.name
        scheme = self.scheme.of(spec)
        if not is_quantized(spec, self.scheme):
            weight = part.read(self.checkpoint, rows)
            narrowed = narrow(weight, scheme.model_dtype, name=name)
            if narrowed.dtype == weight.dtype:
                return (narrowed,), Sums()
            return (narrowed,), _sums(weight, narrowed, scheme, step)
        if is_held(self.checkpoint, spec, part, scheme):
            info = self.checkpoint.reader.packed[name]
            picked = rows if part.source.rows is None else part.source.rows.indices()[rows]
            packed = self.checkpoint.reader.read_packed(name, picked)
            arrays = hold(packed, info, scheme, layout="NK", name=name)
            if arrays is not None:
                weight = values(packed, info)
                stored = decode(arrays, scheme, weight.shape[1], layout="NK")
                return arrays, _sums(weight, stored, scheme, step)
        weight = part.read(self.checkpoint, rows)
        arrays, error, square = self.encoder.measured(
            weight,
            scheme,
            layout="NK",
            name=name,
            scales=self.scales,
            importance=(self.importance or {}).get(spec.name),
        )
        if not (np.isfinite(error).all() and np.isfinite(square).all()):
            stored = decode(arrays, scheme, weight.shape[1], layout="NK")
            return arrays, _sums(weight, stored, scheme, step)
        return arrays, _chunks(error, square, step)


def _sums(weight: Array, stored: Array, scheme: QuantScheme, step: int) -> Sums:
    """The sums over chunks of `step` rows; a chunk of a vector is one row."""
    if weight.ndim == 1:
        parts = [
            (weight[None, i : i + step], stored[None, i : i + step]) for i in _starts(weight, step)
        ]
        return Sums(
            [float(_squares(w, s, scheme)[0]) for w, s in parts],
            [float(_squares(w, None, scheme)[0]) for w, _ in parts],
        )
    return _chunks(_squares(weight, stored, scheme), _squares(weight, None, scheme), step)


def _squares(weight: Array, stored: Array | None, scheme: QuantScheme) -> Float64:
    """As `square_sums`, in float64 where float32's range is too small."""
    found = square_sums(weight, stored, scheme)
    if np.isfinite(found).all():
        return found
    x = weight.astype(np.float64)
    x = x if stored is None else stored.astype(np.float64) - x
    sums: Float64 = np.sum(np.square(x), axis=1)
    return sums


def _chunks(error: Float64, square: Float64, step: int) -> Sums:
    return Sums(
        [math.fsum(error[i : i + step]) for i in _starts(error, step)],
        [math.fsum(square[i : i + step]) for i in _starts(square, step)],
    )


def _starts(rows: Array, step: int) -> range:
    return range(0, len(rows), step)


def is_held(checkpoint: Checkpoint, spec: ParamSpec, part: Part, scheme: QuantScheme) -> bool:
    """Whether the codes of a part's tensor are kept; known before anything is read."""
    info = checkpoint.reader.packed.get(part.source.name)
    source = part.source
    changed = source.transposed or source.add or source.unit_rows
    return info is not None and not changed and len(part.shape) == 2 and holds(info, scheme)


def lost(plan: ConversionPlan, checkpoint: Checkpoint) -> tuple[str, ...]:
    """What a conversion loses of the source, for the user: the reader's notes and our own."""
    packed = checkpoint.reader.packed
    pairs = [
        (packed[name], plan.scheme.of(param.spec))
        for param in plan.params
        for name in param.spec.sources
        if name in packed and is_quantized(param.spec, plan.scheme)
    ]
    return (*checkpoint.reader.notes, *losses(pairs))


def packer(
    plan: ConversionPlan,
    checkpoint: Checkpoint,
    device: Device | Literal["auto"],
    jobs: int,
    scales: Scales = "auto",
    importance: Mapping[str, Float32] | None = None,
    max_ram: int | None = None,
) -> Packer:
    """The Packer of a conversion. device: "numpy", "cpu", "cuda", or "auto".

    "auto" is numpy for small models: importing TVM takes longer than packing them. So it is where
    little memory is allowed.
    """
    if device == "auto":
        elements = sum(
            param.spec.num_elements
            for param in plan.params
            if is_quantized(param.spec, plan.scheme)
        )
        small = max_ram is not None and max_ram < _COMPILED_RAM
        device = "numpy" if small or elements < _COMPILED_FROM else "cpu"
    hasher = None if device == "numpy" else Hasher(compiled=True)
    return Packer(checkpoint, plan.scheme, encoder(device, jobs), scales, importance, hasher)
