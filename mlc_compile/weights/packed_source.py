"""Quantised checkpoints, seen as the plain ones that they stand for.

`wrap` goes by config.json's `quantization_config`. Its reader has a weight `X.weight` for each
module X that is packed, dequantised as the format's own reference does when it is read, or given
as the codes and scales that it is (`packed`, `read_packed`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from mlc_compile.config import ConfigReader
from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location
from mlc_compile.weights.on_demand import on_demand
from mlc_compile.weights.packed_layers import UNQUANTISED, Layers, section_of
from mlc_compile.weights.reader import (
    QUANTISATION_KEYS,
    Array,
    Packed,
    PackedInfo,
    Rows,
    TensorInfo,
    TensorReader,
    row_numbers,
    row_range,
)

__all__ = ["METHODS", "PackedReader", "wrap"]

METHODS: Mapping[str, Callable[[TensorReader, ConfigReader], Layers]] = MappingProxyType(
    {
        "awq": on_demand("mlc_compile.weights.awq:layers"),
        "gptq": on_demand("mlc_compile.weights.gptq:layers"),
        "compressed-tensors": on_demand("mlc_compile.weights.compressed_tensors:layers"),
        "fp8": on_demand("mlc_compile.weights.fp8_blocks:layers"),
        "fbgemm_fp8": on_demand("mlc_compile.weights.fp8_blocks:layers"),
    }
)
"""The readers by `quant_method`."""

# Methods that exist and are not read, with what to do.
_REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "bitsandbytes": "its tables need its own kernels; " + UNQUANTISED,
        "mxfp4": "dequantise it first (transformers: Mxfp4Config(dequantize=True)), then convert",
    }
)


def wrap(reader: TensorReader, config: Mapping[str, Any]) -> tuple[TensorReader, dict[str, Any]]:
    """The reader and the config.json of the plain checkpoint that a quantised one stands for.

    Both as they are where config.json says nothing of quantisation.

    Raises:
        InputError: a method, a version or a setting that isn't read, or tensors that don't fit it.
    """
    stated = [key for key in QUANTISATION_KEYS if config.get(key) is not None]
    if not stated:
        return reader, dict(config)
    if len(stated) > 1 and config[stated[0]] != config[stated[1]]:
        raise InputError(f"config.json has both {' and '.join(stated)}, and they differ")
    section = section_of(config[stated[0]], "quantization_config")
    method = section.optional_text("quant_method")
    if method is None and stated[0] == "compression_config":
        method = "compressed-tensors"
    if method is None or method not in METHODS:
        raise InputError(
            f"config.json: quantization_config.quant_method is {method!r}, which is not read",
            hint=_REFUSED.get(str(method), f"{UNQUANTISED}; read are: {', '.join(METHODS)}"),
        )
    found = METHODS[method](reader, section)
    return PackedReader(reader, found), {
        k: v for k, v in config.items() if k not in QUANTISATION_KEYS
    }


class PackedReader:
    """A reader of stored tensors, with those of packed weights replaced by the weights."""

    def __init__(self, reader: TensorReader, layers: Layers) -> None:
        """Raises InputError where a weight is there both packed and plain."""
        self._reader = reader
        self._matrices = layers.matrices
        self.files: tuple[Location, ...] = reader.files
        self.notes: tuple[str, ...] = (*reader.notes, *layers.notes)
        owner = {part: name for name, m in layers.matrices.items() for part in m.sources}
        tensors: dict[str, TensorInfo] = {}
        for stored, info in reader.tensors.items():
            name = owner.get(stored, stored)
            if stored in owner:
                tensors.setdefault(name, self._info(name))
            elif stored in layers.matrices:
                raise InputError(f"{stored} is there both packed and as it is", hint=UNQUANTISED)
            elif stored not in layers.dropped:
                tensors[stored] = info
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.packed: Mapping[str, PackedInfo] = MappingProxyType(
            dict(reader.packed)
            | {n: m.info for n, m in layers.matrices.items() if m.column_groups is None}
        )

    def _info(self, name: str) -> TensorInfo:
        matrix = self._matrices[name]
        stored = [self._reader.tensors[part] for part in matrix.sources]
        nbytes = sum(info.nbytes for info in stored)
        return TensorInfo(name, matrix.shape, "float32", nbytes, stored[0].file)

    def read(self, name: str, rows: slice | None = None) -> Array:
        """A tensor or some of its rows; those of a packed weight dequantised, in float32."""
        if name not in self._matrices:
            return self._reader.read(name, rows)
        return self._matrices[name].values(*row_range(self.tensors[name], rows))

    def read_packed(self, name: str, rows: Rows = None) -> Packed:
        """Codes and scales of a weight of `packed`."""
        if name not in self._matrices:
            return self._reader.read_packed(name, rows)
        matrix, info = self._matrices[name], self.tensors[name]
        if matrix.column_groups is not None:
            raise ValueError(f"the groups of {name} are not in order")
        if rows is None or isinstance(rows, slice):
            return matrix.load(*row_range(info, rows))
        order = row_numbers(info, rows)
        if not order.size:
            return matrix.load(0, 0)
        first = int(order.min())
        found = matrix.load(first, int(order.max()) + 1)
        zeros = None if found.zeros is None else found.zeros[order - first]
        return Packed(found.codes[order - first], found.scales[order - first], zeros)

    def release(self) -> None:
        self._reader.release()
