"""Checkpoints written by `torch.save`, in both of its formats, without PyTorch and without pickle.

- The zip format (PyTorch 1.6 on): an uncompressed archive of `NAME/data.pkl`, which describes the
  tensors (torch_pickle.py), and one record `NAME/data/KEY` for each storage. The archive is read
  strictly: stored records only, inside the file, not overlapping, directory and records agreeing.
- The legacy format: five pickles one after another, then the storages with their lengths.
- Tensors are views of the mapped file, also transposed ones and those that share a storage.

A file holds a dict of tensors, or one such dict under a usual name ("state_dict", "model").

Sources: the zip format (PKWARE's APPNOTE), torch/serialization.py's `_save` and `_legacy_save`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location, TensorFile, open_file
from mlc_compile.weights.reader import Array, TensorInfo, numpy_dtype, row_range
from mlc_compile.weights.torch_pickle import MAX_PICKLE_BYTES, TorchStorage, TorchTensor, unpickle

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys that checkpoints of training frameworks keep the model's tensors under."""

_AGAIN = "download the file again"
_CONVERT = "convert the checkpoint to safetensors where it comes from"

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_FIRST_WINDOW = 64 << 10
_MAX_RECORDS = 1_000_000
_MAX_DIRECTORY_BYTES = 128 << 20
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_ENTRY, _LOCAL = b"PK\x01\x02", b"PK\x03\x04"


@dataclass(frozen=True)
class _Record:
    """A file of the archive: where its bytes are."""

    name: str
    offset: int
    nbytes: int


class TorchFile:
    """One file. `tensors` maps names to TensorInfo."""

    def __init__(self, path: Location) -> None:
        """Raises InputError for a file that is damaged, no checkpoint, or would run code."""
        self.path = path
        self._file = open_file(path)
        self._storages: dict[str, _Record] = {}
        if self._file.size >= 4 and bytes(self._file.bytes(0, 4)) == _LOCAL:
            state = self._open_zip()
        else:
            state = self._open_legacy()
        self._stored = _state_dict(state, str(path))
        self.tensors: dict[str, TensorInfo] = {
            name: self._checked(name, tensor) for name, tensor in self._stored.items()
        }

    def read(self, name: str, rows: slice | None = None) -> Array:
        """The tensor, or some rows of it, read-only; a view of the mapped file."""
        tensor, info = self._stored[name], self.tensors[name]
        start, stop = row_range(info, rows)
        dtype = numpy_dtype(tensor.dtype)
        shape, offset = tensor.shape, tensor.offset
        if shape:
            shape = (stop - start, *shape[1:])
            offset += start * tensor.stride[0]
        if 0 in shape:
            return np.empty(shape, dtype)
        begin = self._storages[tensor.storage.key].offset + offset * dtype.itemsize
        if _is_contiguous(shape, tensor.stride):
            return self._file.array(dtype, shape, begin)
        flat = self._file.array(dtype, (_reach(shape, tensor.stride),), begin)
        strides = [step * dtype.itemsize for step in tensor.stride]
        return np.lib.stride_tricks.as_strided(flat, shape, strides, writeable=False)

    def release(self) -> None:
        self._file.release()

    def _checked(self, name: str, tensor: TorchTensor) -> TensorInfo:
        """Its TensorInfo; InputError where it doesn't lie inside its storage."""
        itemsize, storage = numpy_dtype(tensor.dtype).itemsize, tensor.storage
        available = storage.numel if storage.dtype is not None else storage.numel // itemsize
        elements = math.prod(tensor.shape)
        reach = tensor.offset + _reach(tensor.shape, tensor.stride) if elements else 0
        # Fewer elements than the shape has: an expanded tensor, which no weight is and which
        # makes terabytes out of a byte.
        if reach > available or elements > available:
            raise InputError(
                f"{self.path}: tensor {name!r} of shape {list(tensor.shape)} does not lie in its "
                f"storage of {available} elements",
                hint=_AGAIN,
            )
        self._check_storage(storage)
        return TensorInfo(name, tensor.shape, tensor.dtype, elements * itemsize, self.path.name)

    def _check_storage(self, storage: TorchStorage) -> None:
        record = self._storages.get(storage.key)
        if record is None:
            raise InputError(f"{self.path} lacks the storage {storage.key[:40]!r}", hint=_AGAIN)
        itemsize = 1 if storage.dtype is None else numpy_dtype(storage.dtype).itemsize
        if record.nbytes != storage.numel * itemsize:
            raise InputError(
                f"{self.path}: the storage {storage.key[:40]!r} has {record.nbytes} bytes, its "
                f"tensors say {storage.numel * itemsize}",
                hint=_AGAIN,
            )

    # --- the zip format

    def _open_zip(self) -> Any:
        records = _Zip(self._file).records()
        roots = [name.removesuffix("/data.pkl") for name in records if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(
                f"{self.path} is a zip archive that torch.save has not written", hint=_CONVERT
            )
        root = roots[0]
        if f"{root}/constants.pkl" in records:
            raise InputError(
                f"{self.path} is a TorchScript program, not a checkpoint", hint=_CONVERT
            )
        order = records.get(f"{root}/byteorder")
        if order is not None and (
            order.nbytes > 16 or bytes(self._file.bytes(order.offset, order.nbytes)) != b"little"
        ):
            raise InputError(f"{self.path} was not written by a little-endian machine")
        prefix = f"{root}/data/"
        self._storages = {
            name.removeprefix(prefix): record
            for name, record in records.items()
            if name.startswith(prefix)
        }
        pickled, where = records[f"{root}/data.pkl"], f"{self.path}: data.pkl"
        if pickled.nbytes > MAX_PICKLE_BYTES:
            raise InputError(f"{where} has {pickled.nbytes} bytes", hint=_CONVERT)
        state, length = unpickle(self._file.bytes(pickled.offset, pickled.nbytes), where)
        if length != pickled.nbytes:
            raise InputError(f"{where} has something after its end", hint=_AGAIN)
        return state

    # --- the legacy format

    def _open_legacy(self) -> Any:
        position = 0

        def next_pickle() -> Any:
            nonlocal position
            left, window = min(MAX_PICKLE_BYTES, self._file.size - position), _FIRST_WINDOW
            while True:  # nothing says how long a pickle is
                try:
                    data = self._file.bytes(position, min(left, window))
                    found, length = unpickle(data, str(self.path))
                except InputError:
                    if window >= left:
                        raise
                    window *= 32
                else:
                    position += length
                    return found

        first = bytes(self._file.bytes(0, min(2, self._file.size)))
        if first[:1] != b"\x80" or next_pickle() != _LEGACY_MAGIC:
            raise InputError(
                f"{self.path} is not a file that torch.save has written",
                hint="check that this is the weights file and not a pointer or a web page",
            )
        version, system, state, keys = (next_pickle() for _ in range(4))
        if version != _LEGACY_VERSION or not isinstance(system, dict):
            raise InputError(f"{self.path} has the unknown version {version!r:.40}", hint=_CONVERT)
        if system.get("little_endian") is not True:
            raise InputError(f"{self.path} was not written by a little-endian machine")
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise InputError(f"{self.path} has no list of its storages", hint=_AGAIN)
        itemsizes = {
            tensor.storage.key: 1
            if tensor.storage.dtype is None
            else numpy_dtype(tensor.storage.dtype).itemsize
            for tensor in _tensors_in(state)
        }
        for key in keys:
            if key not in itemsizes:
                raise InputError(f"{self.path} has a storage that no tensor uses", hint=_CONVERT)
            if self._file.size - position < 8:
                raise InputError(f"{self.path} is truncated: a storage is missing", hint=_AGAIN)
            (numel,) = struct.unpack("<q", self._file.bytes(position, 8))
            position += 8
            nbytes = numel * itemsizes[key]
            if numel < 0 or key in self._storages or nbytes > self._file.size - position:
                raise InputError(
                    f"{self.path} is truncated or damaged: a storage of {numel} elements at byte "
                    f"{position} of {self._file.size}",
                    hint=_AGAIN,
                )
            self._storages[key] = _Record(key, position, nbytes)
            position += nbytes
        if position != self._file.size:
            raise InputError(f"{self.path} has something after its last storage", hint=_AGAIN)
        return state


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def _reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last of a tensor that isn't empty, both included."""
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _tensors_in(state: Any) -> list[TorchTensor]:
    """All tensors of nested dicts and lists. Each container is looked at once."""
    found, seen, queue = [], set[int](), [state]
    while queue:
        value = queue.pop()
        if type(value) is TorchTensor:
            found.append(value)
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            queue.extend(value.values() if isinstance(value, dict) else value)
    return found


def _state_dict(state: Any, where: str) -> Mapping[str, TorchTensor]:
    """The dict of tensors in what the file holds; InputError unless there is exactly one."""
    found = state
    if isinstance(state, dict) and not any(type(v) is TorchTensor for v in state.values()):
        inner = [key for key, value in state.items() if isinstance(value, dict) and value]
        inner = [key for key in inner if any(type(v) is TorchTensor for v in state[key].values())]
        if len(inner) > 1:
            raise InputError(
                f"{where} holds several sets of tensors: {', '.join(map(repr, inner[:5]))}",
                hint="save the one to be converted as a file of its own",
            )
        if inner and inner[0] not in WRAPPERS:
            raise InputError(
                f"{where} holds its tensors under {inner[0]!r:.80}",
                hint=f"save them as a file of their own, or under {' or '.join(WRAPPERS)}",
            )
        found = state[inner[0]] if inner else state
    if not isinstance(found, dict) or not found:
        raise InputError(f"{where} holds no dict of tensors", hint=_CONVERT)
    for key, value in found.items():
        if not isinstance(key, str) or type(value) is not TorchTensor:
            raise InputError(
                f"{where} has {key!r:.80} among its tensors, which is no tensor", hint=_CONVERT
            )
    return found


class _Zip:
    """The directory of a zip archive whose records are stored as they are."""

    def __init__(self, file: TensorFile) -> None:
        self._path = file.path
        self._file = file

    def _damaged(self, what: str) -> InputError:
        return InputError(f"{self._path} is truncated or damaged: {what}", hint=_AGAIN)

    def _unpack(self, form: str, offset: int, what: str) -> tuple[Any, ...]:
        nbytes = struct.calcsize(form)
        if not 0 <= offset <= self._file.size - nbytes:
            raise self._damaged(f"no {what} at byte {offset}")
        return struct.unpack(form, self._file.bytes(offset, nbytes))

    def records(self) -> dict[str, _Record]:
        """All records by name. Raises InputError."""
        count, size, start = self._end()
        if count > _MAX_RECORDS or size > _MAX_DIRECTORY_BYTES or start + size > self._file.size:
            raise self._damaged(f"a directory of {count} records and {size} bytes")
        found: dict[str, _Record] = {}
        position = start
        for _ in range(count):
            record, position = self._entry(position, start + size)
            if record.name in found:
                raise self._damaged(f"two records called {record.name[:80]!r}")
            if record.offset + record.nbytes > start:
                raise self._damaged(f"the record {record.name[:80]!r} runs into the directory")
            found[record.name] = record
        if position != start + size:
            raise self._damaged("its directory does not end where it should")
        end = 0
        for record in sorted(found.values(), key=lambda r: (r.offset, r.nbytes)):
            if record.offset < end:
                raise self._damaged(f"the record {record.name[:80]!r} overlaps another")
            end = record.offset + record.nbytes
        return found

    def _end(self) -> tuple[int, int, int]:
        """Number of records, bytes and start of the directory."""
        at = self._file.size - 22  # torch.save writes no comment after it
        fields = self._unpack("<4s4H2LH", at, "directory")
        if fields[0] != _END or fields[7]:
            raise self._damaged("it has no directory at its end")
        disk, first, here, count, size, start = fields[1:7]
        if max(count, size, start) >= 0xFFFF and at >= 20:
            magic, _, position, _ = self._unpack("<4sLQL", at - 20, "zip64 locator")
            if magic == _LOCATOR64:
                fields = self._unpack("<4sQ2H2L4Q", position, "zip64 end")
                if fields[0] != _END64:
                    raise self._damaged("its zip64 directory is not where it should be")
                disk, first, here, count, size, start = fields[4:10]
        if disk or first or here != count:
            raise self._damaged("it is one part of several")
        return count, size, start

    def _entry(self, position: int, end: int) -> tuple[_Record, int]:
        """The record of a directory entry, and where the next entry is."""
        fields = self._unpack("<4s6H3L5H2L", position, "directory entry")
        magic, flags, method, packed, size = fields[0], fields[3], fields[4], fields[8], fields[9]
        name_size, extra_size, comment_size, offset = *fields[10:13], fields[16]
        after = position + 46 + name_size + extra_size + comment_size
        if magic != _ENTRY or after > end:
            raise self._damaged(f"no directory entry at byte {position}")
        raw = bytes(self._file.bytes(position + 46, name_size))
        name = self._text(raw)
        extra = bytes(self._file.bytes(position + 46 + name_size, extra_size))
        size, packed, offset = self._wide(extra, size, packed, offset)
        if flags & 0x2041:
            raise InputError(f"{self._path}: the record {name[:80]!r} is encrypted", hint=_CONVERT)
        if method != 0 or packed != size:
            raise InputError(
                f"{self._path}: the record {name[:80]!r} is compressed; torch.save stores",
                hint=_CONVERT,
            )
        local = self._unpack("<4s5H3L2H", offset, "record")
        data = offset + 30 + local[9] + local[10]
        if local[0] != _LOCAL or bytes(self._file.bytes(offset + 30, local[9])) != raw:
            raise self._damaged(f"the record {name[:80]!r} is not where the directory says")
        return _Record(name, data, size), after

    def _text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a record's name is not UTF-8") from error

    def _wide(self, extra: bytes, *values: int) -> tuple[int, ...]:
        """The values, those that do not fit 32 bits taken from the zip64 extra field."""
        found, position = b"", 0
        while position + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, position)
            if kind == 1:
                found = extra[position + 4 : position + 4 + size]
            position += 4 + size
        result = []
        for value in values:
            if value == 0xFFFFFFFF:
                if len(found) < 8:
                    raise self._damaged("a directory entry lacks its 64-bit sizes")
                (value,), found = struct.unpack("<Q", found[:8]), found[8:]
            result.append(value)
        return tuple(result)
