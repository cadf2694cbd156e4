"""Safetensors files, read with our own strict parser.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`
with offsets relative to the end of the header, then the data.
Source: the format section of the safetensors documentation.

- Nothing is executed, nothing is allocated from a number in the file before it is checked.
- Every byte of data belongs to exactly one tensor: gaps, overlaps and a wrong length are errors.
- Tensors are views of the mapped file; bfloat16 and float8 use ml_dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mlc_compile.config import parse_json_strict
from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location, open_file
from mlc_compile.weights.reader import (
    Array,
    TensorInfo,
    numpy_dtype,
    row_range,
)

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "U8": "uint8",
        "I8": "int8",
        "U16": "uint16",
        "I16": "int16",
        "U32": "uint32",
        "I32": "int32",
        "U64": "uint64",
        "I64": "int64",
        "F16": "float16",
        "BF16": "bfloat16",
        "F32": "float32",
        "F64": "float64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E8M0": "float8_e8m0fnu",
    }
)
"""The dtype names of the format that numpy and ml_dtypes can hold."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit on the header."""

_AGAIN = "download the file again"


class SafetensorsFile:
    """One file. `tensors` maps names to TensorInfo; `offsets` to bytes from the file's start."""

    def __init__(self, path: Location) -> None:
        """Raises InputError for a file that is truncated, inconsistent, or not safetensors."""
        self.path = path
        self._file = open_file(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.offsets: dict[str, int] = {}
        self._parse()

    def read(self, name: str, rows: slice | None = None) -> Array:
        """The tensor, or some rows of it, as a read-only view of the mapped file."""
        info = self.tensors[name]
        start, stop = row_range(info, rows)
        dtype, offset = numpy_dtype(info.dtype), self.offsets[name]
        if rows is None:
            return self._file.array(dtype, info.shape, offset)
        row = math.prod(info.shape[1:]) * dtype.itemsize
        return self._file.array(dtype, (stop - start, *info.shape[1:]), offset + start * row)

    def release(self) -> None:
        self._file.release()

    def _parse(self) -> None:
        size = self._file.size
        if size < 8:
            raise InputError(
                f"{self.path} is truncated: a safetensors file starts with 8 bytes of header "
                f"length and this one has {size} bytes",
                hint=_AGAIN,
            )
        header_size = int.from_bytes(self._file.bytes(0, 8), "little")
        if header_size > MAX_HEADER_BYTES:
            raise InputError(
                f"{self.path} is not a safetensors file: it states a header of {header_size} bytes",
                hint="check that this is the weights file and not a pointer or a web page",
            )
        if 8 + header_size > size:
            raise InputError(
                f"{self.path} is truncated: its header needs {8 + header_size} bytes and the file "
                f"has {size}",
                hint=_AGAIN,
            )
        where = f"the header of {self.path}"
        try:
            text = str(self._file.bytes(8, header_size), "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{where} is not UTF-8 text", hint=_AGAIN) from error
        header = parse_json_strict(text, where=where)
        header.pop("__metadata__", None)  # free text about the file; nothing here depends on it
        start = 8 + header_size
        spans = []
        for name, entry in header.items():
            info, begin, end = self._entry(name, entry)
            self.tensors[name] = info
            self.offsets[name] = start + begin
            spans.append((begin, end, name))
        self._check_spans(sorted(spans), size - start)

    def _entry(self, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
        where = f"{self.path}: tensor {name!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise InputError(
                f"{where} must state exactly dtype, shape and data_offsets", hint=_AGAIN
            )
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise InputError(
                f"{where} has the dtype {entry['dtype']!r}, which is not supported",
                hint=f"supported: {', '.join(DTYPES)}",
            )
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _naturals(shape):
            raise InputError(f"{where} has an invalid shape {shape!r}", hint=_AGAIN)
        if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise InputError(f"{where} has invalid data_offsets {offsets!r}", hint=_AGAIN)
        begin, end = offsets
        nbytes = math.prod(shape) * numpy_dtype(dtype).itemsize
        if end - begin != nbytes:
            raise InputError(
                f"{where} takes {end - begin} bytes by its data_offsets, but {nbytes} bytes by its "
                f"shape {shape} and dtype {entry['dtype']}",
                hint=_AGAIN,
            )
        return TensorInfo(name, tuple(shape), dtype, nbytes, self.path.name), begin, end

    def _check_spans(self, spans: Sequence[tuple[int, int, str]], available: int) -> None:
        position, previous = 0, "the header"
        for begin, end, name in spans:
            if begin != position:
                problem = "overlaps" if begin < position else "leaves a gap after"
                raise InputError(
                    f"{self.path}: tensor {name!r} at byte {begin} {problem} {previous!r}, which "
                    f"ends at byte {position}",
                    hint=_AGAIN,
                )
            position, previous = end, name
        if position > available:
            raise InputError(
                f"{self.path} is truncated: its tensors need {position} bytes of data and "
                f"{available} are there",
                hint=_AGAIN,
            )
        if position < available:
            raise InputError(
                f"{self.path} has {available - position} bytes after its last tensor", hint=_AGAIN
            )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
