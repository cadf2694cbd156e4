"""The GGUF container: metadata, tensors and what their blocks mean.

It is read by our own bounds-checked parser. The `gguf` package's reader follows counts in the file
without checking them, so a damaged file can make it loop for hours, and it takes seconds where
this takes a tenth of one. What the blocks mean is the package's: its `dequantize` is the reference
implementation of every block type.

Source of the layout: the GGUF specification in the ggml repository.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.weights.files import GGUF_MAGIC as MAGIC
from mlc_compile.weights.files import Location, TensorFile, open_file
from mlc_compile.weights.reader import Array, numpy_dtype

VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
DOWNLOAD_AGAIN = "download the file again"
USE_HF = "convert from the model's Hugging Face directory instead"

# GGUF metadata value types by number: struct code, or one of the two composed kinds.
_SCALARS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
_STRING, _ARRAY = 8, 9

# GGML types that numpy holds as they are; all others are blocks.
PLAIN_TYPES = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
    }
)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the file has it: GGUF name, shape outermost first, type name, bytes."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class _Cursor:
    """Reads little-endian values one after another; the end of the file is an InputError."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self.position = 0

    def corrupt(self, what: str) -> InputError:
        return InputError(
            f"{self._file.path} is not a valid GGUF file: {what} (at byte {self.position})",
            hint=DOWNLOAD_AGAIN,
        )

    def need(self, nbytes: int, what: str) -> None:
        left = self._file.size - self.position
        if nbytes > left:
            raise InputError(
                f"{self._file.path} is truncated or corrupt: {what} needs {nbytes} bytes at byte "
                f"{self.position} and {left} are left",
                hint=DOWNLOAD_AGAIN,
            )

    def scalar(self, code: str, what: str) -> Any:
        nbytes = struct.calcsize(f"<{code}")
        self.need(nbytes, what)
        (value,) = struct.unpack(f"<{code}", self._file.bytes(self.position, nbytes))
        self.position += nbytes
        return value

    def text(self, what: str) -> str:
        nbytes = self.scalar("Q", what)
        self.need(nbytes, what)
        raw = self._file.bytes(self.position, nbytes)
        try:
            value = str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} is not UTF-8 text") from error
        self.position += nbytes
        return value

    def value(self, kind: int, what: str) -> Any:
        """A metadata value; arrays become lists."""
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.corrupt(f"{what} has the unknown type {kind}")
        item, count = self.scalar("I", what), self.scalar("Q", what)
        if item == _STRING:
            self.need(8 * count, what)  # before looping: the count is not to be trusted
            return [self.text(what) for _ in range(count)]
        if item not in _SCALARS:
            raise self.corrupt(f"{what} is an array of the unsupported type {item}")
        code = _SCALARS[item]
        nbytes = struct.calcsize(f"<{code}") * count
        self.need(nbytes, what)
        dtype = np.dtype(code).newbyteorder("<")
        values = np.frombuffer(self._file.bytes(self.position, nbytes), dtype, count).tolist()
        self.position += nbytes
        return values


class GgufFile:
    """The container: `metadata` (plain Python values) and `raw_tensors` by GGUF name."""

    def __init__(self, path: Location) -> None:
        """Raises InputError for anything that is not a whole, consistent GGUF file."""
        self.path = path
        self.file = open_file(path)
        self._types = ggml_types()
        cursor = _Cursor(self.file)
        cursor.need(24, "the header")
        if bytes(self.file.bytes(0, 4)) != MAGIC:
            raise InputError(f"{path} is not a GGUF file: it doesn't start with 'GGUF'")
        cursor.position = 4
        version = cursor.scalar("I", "the version")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise InputError(
                f"{path} is a GGUF file "
                + ("for big-endian machines" if big_endian else f"of version {version}")
                + ", which is not supported",
                hint="convert the model with a current llama.cpp on a little-endian machine",
            )
        tensor_count = cursor.scalar("Q", "the tensor count")
        key_count = cursor.scalar("Q", "the key count")
        self.metadata: dict[str, Any] = self._read_metadata(cursor, key_count)
        self.raw_tensors: dict[str, GgufTensor] = self._read_tensors(cursor, tensor_count)

    def _read_metadata(self, cursor: _Cursor, count: int) -> dict[str, Any]:
        cursor.need(13 * count, f"metadata of {count} keys")
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = cursor.text(f"metadata key {index}")
            if key in metadata:
                raise cursor.corrupt(f"the key {key!r} is there twice")
            metadata[key] = cursor.value(cursor.scalar("I", key), f"the value of {key!r}")
        return metadata

    def _read_tensors(self, cursor: _Cursor, count: int) -> dict[str, GgufTensor]:
        cursor.need(24 * count, f"a list of {count} tensors")
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            raise cursor.corrupt(f"general.alignment is {alignment!r}, not a power of two >= 8")
        tensors: dict[str, GgufTensor] = {}
        for index in range(count):
            tensor = self._read_tensor(cursor, index, alignment)
            if tensor.name in tensors:
                raise cursor.corrupt(f"the tensor {tensor.name!r} is there twice")
            tensors[tensor.name] = tensor
        start = -(-cursor.position // alignment) * alignment
        end, previous = start, "the header"
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            begin = start + tensor.offset
            if begin < end:
                raise cursor.corrupt(f"tensor {tensor.name!r} overlaps {previous!r}")
            end, previous = begin + tensor.nbytes, tensor.name
            if end > self.file.size:
                raise InputError(
                    f"{self.path} is truncated: tensor {tensor.name!r} ends at byte {end} and the "
                    f"file has {self.file.size}",
                    hint=DOWNLOAD_AGAIN,
                )
        return {
            t.name: GgufTensor(t.name, t.shape, t.type, start + t.offset, t.nbytes)
            for t in tensors.values()
        }

    def _read_tensor(self, cursor: _Cursor, index: int, alignment: int) -> GgufTensor:
        name = cursor.text(f"the name of tensor {index}")
        what = f"tensor {name!r}"
        rank = cursor.scalar("I", what)
        if not 1 <= rank <= 4:
            raise cursor.corrupt(f"{what} has {rank} dimensions")
        # GGUF writes the innermost dimension first.
        shape = tuple(cursor.scalar("Q", what) for _ in range(rank))[::-1]
        if not all(shape):
            raise cursor.corrupt(f"{what} has an empty dimension: {list(shape)}")
        number, offset = cursor.scalar("I", what), cursor.scalar("Q", what)
        if number not in self._types:
            raise InputError(
                f"{self.path}: {what} has the GGML type {number}, which is not supported",
                hint=USE_HF,
            )
        type_name, elements, nbytes = self._types[number]
        if shape[-1] % elements:
            raise cursor.corrupt(
                f"{what} has rows of {shape[-1]} elements, not whole {type_name} blocks"
            )
        if offset % alignment:
            raise cursor.corrupt(f"{what} starts at {offset}, not a multiple of {alignment}")
        return GgufTensor(name, shape, type_name, offset, math.prod(shape) // elements * nbytes)

    def read(self, tensor: GgufTensor, start: int, stop: int, order: Array | None = None) -> Array:
        """Rows `start:stop` of a tensor, or the rows `order` names where it is given.

        Plain types come as they are (a view of the mapped file unless rows are reordered), block
        types as float32. Only the blocks of the wanted rows are decoded.
        """
        if len(tensor.shape) == 1 and tensor.type not in PLAIN_TYPES:
            vector: Array = dequantize(self.rows(tensor, 0, 1), tensor.type)[0]  # one row
            return vector[start:stop] if order is None else vector[order]
        if order is not None:
            start, stop = (int(order.min()), int(order.max()) + 1) if order.size else (0, 0)
        found = self.rows(tensor, start, stop)
        if order is not None:
            found = found[order - start]
        if tensor.type in PLAIN_TYPES:
            return found
        if stop == start:
            return np.empty((0, *tensor.shape[1:]), np.float32)
        return dequantize(found, tensor.type)

    def rows(self, tensor: GgufTensor, start: int, stop: int) -> Array:
        """Rows start to stop as they are stored, nothing else of the file being read: of a plain
        type its numbers, of blocks the bytes of each row. A vector of blocks is one row."""
        if tensor.type in PLAIN_TYPES:
            dtype, inner = numpy_dtype(PLAIN_TYPES[tensor.type]), tensor.shape[1:]
            nbytes = math.prod(inner) * dtype.itemsize
        else:
            lead = tensor.shape[:-1] if len(tensor.shape) > 1 else (1,)
            dtype = np.dtype(np.uint8)
            inner = (*lead[1:], tensor.nbytes // math.prod(lead))
            nbytes = math.prod(inner)
        found: Array = self.file.array(
            dtype, (stop - start, *inner), tensor.offset + start * nbytes
        )
        return found


def gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise EnvironmentLacksError(
            f"reading GGUF needs the gguf package: {error}", hint="pip install gguf"
        ) from error
    return gguf


def ggml_types() -> dict[int, tuple[str, int, int]]:
    """GGML type number -> name, elements and bytes of one block."""
    gguf = gguf_package()
    return {
        int(kind): (kind.name, int(elements), int(nbytes))
        for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items()
    }


def dequantize(blocks: Array, type_name: str) -> Array:
    gguf = gguf_package()
    with np.errstate(all="ignore"):  # a block with an infinite scale decodes to what it says
        decoded: Array = gguf.dequantize(blocks, gguf.GGMLQuantizationType[type_name])
    return decoded.astype(np.float32, copy=False)
