"""The parameter files: `tensor-cache.json` and `params_shard_N.bin` (mlc-format.md, section 3).

- Shards hold tensors back to back, unpadded, up to 32 MiB; a large tensor gets a shard of its own.
- Names, shapes and sizes are known before the first byte, so shards are laid out first and then
  filled in any order; a complete one is hashed in one pass.
- float32 is stored as float32: every record has format "raw" (others narrow it to bfloat16).
- Reading trusts nothing: names, shapes, offsets and sizes are checked before a file is mapped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mlc_compile.config import read_json_strict
from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.quantization.hashing import Hasher, Piece
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.quantization.scheme import is_stored_dtype, numpy_dtype

TENSOR_CACHE = "tensor-cache.json"
SHARD_CAP = 32 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_READ_BLOCK = 4 << 20
_HASH_BLOCK = 1 << 20


@dataclass(frozen=True)
class Record:
    """One tensor within a shard file."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset: int
    format: str = "raw"


@dataclass(frozen=True)
class Shard:
    """One file of tensors; md5 is empty until it is written."""

    file: str
    nbytes: int
    records: tuple[Record, ...]
    md5: str = ""


def plan_shards(params: Iterable[StoredParam], cap: int = SHARD_CAP) -> tuple[Shard, ...]:
    """Assigns tensors, in order, to shard files of less than `cap` bytes.

    A tensor that no longer fits closes the open shard; one of at least half the cap is written to
    a shard of its own instead, numbered before the open one.
    """
    shards: list[Shard] = []
    pending: list[Record] = []
    used = 0

    def commit(records: Sequence[Record]) -> None:
        size = sum(record.nbytes for record in records)
        shards.append(Shard(f"params_shard_{len(shards)}.bin", size, tuple(records)))

    for param in params:
        size = param.nbytes
        if used + size >= cap:
            if 2 * size >= cap:
                commit([Record(param.name, param.shape, param.dtype, size, 0)])
                continue
            if pending:
                commit(pending)
            pending, used = [], 0
        pending.append(Record(param.name, param.shape, param.dtype, size, used))
        used += size
    if pending:
        commit(pending)
    return tuple(shards)


@dataclass(frozen=True)
class WrittenFile:
    """A finished file and its SHA-256, for the manifest."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class SealedShard:
    """A complete shard file, hashed: `shard` with its md5, and SHA-256 of it and its tensors."""

    shard: Shard
    sha256: str
    tensor_sha256: Mapping[str, str]

    @property
    def written(self) -> WrittenFile:
        """The file for the manifest."""
        return WrittenFile(self.shard.file, self.shard.nbytes, self.sha256)


def hash_shards(
    directory: Path, shards: Sequence[Shard], hasher: Hasher | None = None
) -> list[SealedShard]:
    """All hashes of some shard files. Raises OSError, also when one ends too early.

    hasher: hashes many pieces side by side; by default they are read one after the other.
    """
    if hasher is None:
        return [_hash_shard(directory, shard) for shard in shards]
    with ExitStack() as stack:
        places = []  # (shard, tensor) of each piece
        pieces = []
        for shard in shards:
            file = stack.enter_context((directory / shard.file).open("rb", buffering=0))
            records = shard.records if len(shard.records) > 1 else ()
            places += [(shard, None), *((shard, record.name) for record in records)]
            pieces.append(Piece(file.fileno(), 0, shard.nbytes))
            pieces += [Piece(file.fileno(), r.offset, r.nbytes) for r in records]
        found = dict(zip(places, hasher(pieces), strict=True))
    sealed = []
    for shard in shards:
        whole = found[shard, None]
        tensors = {
            record.name: found.get((shard, record.name), whole).sha256 for record in shard.records
        }
        sealed.append(SealedShard(replace(shard, md5=whole.md5), whole.sha256, tensors))
    return sealed


_buffers = threading.local()


def read_buffer() -> memoryview:
    """A buffer of this thread, 1 MiB, used again and again: fresh memory costs page faults."""
    if not hasattr(_buffers, "view"):
        _buffers.view = memoryview(bytearray(_HASH_BLOCK))
    view: memoryview = _buffers.view
    return view


def _hash_shard(directory: Path, shard: Shard) -> SealedShard:
    """In one pass."""
    md5, whole = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    tensors = {}
    buffer = read_buffer()
    with (directory / shard.file).open("rb", buffering=0) as file:
        for record in shard.records:
            # A shard of one tensor has that tensor's hash.
            digest = hashlib.sha256() if len(shard.records) > 1 else None
            left = record.nbytes
            while left:
                size = file.readinto(buffer[:left])
                if not size:
                    raise OSError(errno.EIO, f"{shard.file} ends too early")
                piece = buffer[:size]
                md5.update(piece)
                whole.update(piece)
                if digest is not None:
                    digest.update(piece)
                left -= size
            tensors[record.name] = (digest or whole).hexdigest()
    return SealedShard(replace(shard, md5=md5.hexdigest()), whole.hexdigest(), tensors)


class TensorCacheWriter:
    """Writes the shards of `params` into `directory`: any bytes of any tensor, in any order.

    Several threads may write at once. OSError comes through as it is. The caller knows when a
    shard is complete and then seals it; `finish` writes tensor-cache.json.
    """

    def __init__(self, directory: Path, params: Sequence[StoredParam]) -> None:
        self.shards = plan_shards(params)
        self._directory = directory
        self._place = {r.name: (i, r) for i, s in enumerate(self.shards) for r in s.records}
        self._lock = threading.Lock()
        self._open: dict[int, int] = {}

    def __enter__(self) -> TensorCacheWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._open.values():
            os.close(handle)
        self._open.clear()

    def shard_of(self, name: str) -> int:
        """The index of the shard that holds a tensor."""
        return self._place[name][0]

    def write(self, name: str, data: npt.NDArray[Any], at: int) -> None:
        """Writes `data` from byte `at` of tensor `name` on."""
        index, record = self._place[name]
        view = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        if at < 0 or at + len(view) > record.nbytes:
            raise ValueError(f"tensor {name} has no bytes {at} to {at + len(view)}")
        self._write(self._handle(index), view, record.offset + at)

    def write_columns(self, name: str, data: npt.NDArray[Any], first: int) -> None:
        """Writes `data` [rows, some columns] of a tensor [rows, columns], from `first` on."""
        index, record = self._place[name]
        rows, count = data.shape
        if rows != record.shape[0] or not 0 <= first <= first + count <= record.shape[1]:
            raise ValueError(f"tensor {name} has no columns {first} to {first + count}")
        handle, data = self._handle(index), np.ascontiguousarray(data)
        view = data.reshape(-1).view(np.uint8).data
        width = count * data.itemsize
        stride = record.shape[1] * data.itemsize
        if width == stride:
            self._write(handle, view, record.offset)
            return
        start = record.offset + first * data.itemsize
        for row in range(rows):
            piece = view[row * width : (row + 1) * width]
            self._write(handle, piece, start + row * stride)

    def seal(self, indices: Sequence[int], hasher: Hasher | None = None) -> list[SealedShard]:
        """Hashes shards whose bytes have all been written."""
        return hash_shards(self._directory, [self.shards[index] for index in indices], hasher)

    def sync(self, index: int) -> None:
        """Waits until a shard's bytes are on the disk and closes it."""
        handle = self._handle(index)
        os.fsync(handle)
        with self._lock:
            os.close(self._open.pop(index))

    def finish(
        self, sealed: Sequence[SealedShard], *, source_elements: int
    ) -> tuple[WrittenFile, ...]:
        """Writes tensor-cache.json; returns it and the shards.

        sealed: every shard, in order. source_elements: elements of the unquantised parameters,
        for bits per parameter.
        """
        if tuple(replace(one.shard, md5="") for one in sealed) != self.shards:
            raise ValueError("not every shard is sealed")
        total = sum(shard.nbytes for shard in self.shards)
        document = {
            "metadata": {
                "ParamSize": sum(len(shard.records) for shard in self.shards),
                "ParamBytes": float(total),
                "BitsPerParam": 8.0 * total / source_elements,
            },
            "records": [_shard_json(one.shard) for one in sealed],
        }
        data = json.dumps(document, indent=4).encode()
        (self._directory / TENSOR_CACHE).write_bytes(data)
        index = WrittenFile(TENSOR_CACHE, len(data), hashlib.sha256(data).hexdigest())
        return (*(one.written for one in sealed), index)

    def _handle(self, index: int) -> int:
        with self._lock:
            if index not in self._open:
                # What an interrupted run left is written over.
                path = self._directory / self.shards[index].file
                flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
                self._open[index] = os.open(path, flags, 0o666)
                _reserve(self._open[index], self.shards[index].nbytes)
            return self._open[index]

    def _write(self, handle: int, view: memoryview, offset: int) -> None:
        while view:
            if hasattr(os, "pwrite"):
                size = os.pwrite(handle, view, offset)
            else:  # Windows
                with self._lock:
                    os.lseek(handle, offset, os.SEEK_SET)
                    size = os.write(handle, view)
            view, offset = view[size:], offset + size


def _reserve(handle: int, size: int) -> None:
    """Gives a file its final size, with its place on the disk where the system can do that."""
    os.ftruncate(handle, size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def _shard_json(shard: Shard) -> dict[str, Any]:
    return {
        "dataPath": shard.file,
        "format": "raw-shard",
        "nbytes": shard.nbytes,
        "records": [
            {
                "name": record.name,
                "shape": list(record.shape),
                "dtype": record.dtype,
                "format": record.format,
                "nbytes": record.nbytes,
                "byteOffset": record.offset,
            }
            for record in shard.records
        ],
        "md5sum": shard.md5,
    }


class TensorCache:
    """The parameter files of a directory, checked and read without copying."""

    def __init__(self, directory: Path, shards: tuple[Shard, ...]) -> None:
        self.directory = directory
        self.shards = shards
        self._place = {r.name: (shard, r) for shard in shards for r in shard.records}
        self._maps: dict[str, npt.NDArray[np.uint8]] = {}

    @property
    def records(self) -> dict[str, Record]:
        """Every tensor by name, in file order."""
        return {name: record for name, (_, record) in self._place.items()}

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of the mapped file (a copy for a float32 tensor stored as bfloat16).

        Raises InputError when there is no such tensor or the file cannot be mapped.
        """
        if name not in self._place:
            raise InputError(
                f"{self.directory / TENSOR_CACHE}: no tensor '{name}'",
                hint="the parameters and the library do not belong together",
            )
        shard, record = self._place[name]
        data = self._map(shard)[record.offset : record.offset + record.nbytes]
        if _is_narrowed(record):
            stored = data.view(numpy_dtype("bfloat16"))
            return stored.astype(np.float32).reshape(record.shape)
        return data.view(numpy_dtype(record.dtype)).reshape(record.shape)

    def _map(self, shard: Shard) -> npt.NDArray[np.uint8]:
        if shard.file not in self._maps:
            path = self.directory / shard.file
            try:
                empty = shard.nbytes == 0
                self._maps[shard.file] = (
                    np.empty(0, np.uint8) if empty else np.asarray(np.memmap(path, np.uint8, "r"))
                )
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        return self._maps[shard.file]

    def check_md5(self) -> None:
        """Raises CheckFailedError naming the first shard whose bytes differ from its md5sum."""
        for shard in self.shards:
            digest = hashlib.md5(usedforsecurity=False)
            for block in read_blocks(self.directory / shard.file):
                digest.update(block)
            if digest.hexdigest() != shard.md5:
                raise CheckFailedError(
                    f"{self.directory / shard.file}: md5 is {digest.hexdigest()}, "
                    f"{TENSOR_CACHE} says {shard.md5 or 'nothing'}",
                    hint="the file is damaged: convert or download it again",
                )


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in blocks; InputError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            while block := file.read(_READ_BLOCK):
                yield block
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def open_tensor_cache(directory: Path, *, check_md5: bool = False) -> TensorCache:
    """Opens the parameter files of `directory`.

    Raises InputError for a missing or malformed tensor-cache.json (names, shapes, offsets, sizes)
    and for a shard of another size; CheckFailedError when `check_md5` finds changed bytes.
    """
    path = directory / TENSOR_CACHE
    if not path.is_file():
        raise InputError(f"{path}: is missing", hint="run convert_weight first")
    shards = tuple(_parse(read_json_strict(path), path))
    names = [record.name for shard in shards for record in shard.records]
    _require(len(set(names)) == len(names), path, "a tensor name occurs twice")
    files = [shard.file for shard in shards]
    _require(len(set(files)) == len(files), path, "a shard file occurs twice")
    for shard in shards:
        file = directory / shard.file
        if not file.is_file():
            raise InputError(f"{file}: is missing", hint="convert or download it again")
        size = file.stat().st_size
        if size != shard.nbytes:
            raise InputError(
                f"{file}: has {size} bytes, {TENSOR_CACHE} says {shard.nbytes}",
                hint="the file is truncated or foreign: convert or download it again",
            )
    cache = TensorCache(directory, shards)
    if check_md5:
        cache.check_md5()
    return cache


def read_stored_params(directory: Path) -> tuple[StoredParam, ...]:
    """Name, shape and dtype of every tensor in `directory`, in file order (without `packing`).

    Raises what `open_tensor_cache` raises.
    """
    records = open_tensor_cache(directory).records.values()
    return tuple(StoredParam(record.name, record.shape, record.dtype) for record in records)


def load_params(
    directory: Path, names: Sequence[str], *, check_md5: bool = False
) -> list[npt.NDArray[Any]]:
    """The tensors `names`, in that order, as read-only views of the mapped shard files.

    Raises what `open_tensor_cache` and `TensorCache.tensor` raise.
    """
    cache = open_tensor_cache(directory, check_md5=check_md5)
    return [cache.tensor(name) for name in names]


def is_plain_name(name: object) -> bool:
    """Whether `name` is a file name that stays inside its directory."""
    return isinstance(name, str) and _SHARD_NAME.fullmatch(name) is not None


def _malformed(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: {problem}", hint="the file is damaged or foreign")


def _require(condition: bool, path: Path, problem: str) -> None:
    if not condition:
        raise _malformed(path, problem)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_narrowed(record: Record) -> bool:
    """Whether other writers' "f32-to-bf16" applies: float32 in name, bfloat16 on disk."""
    return record.format == "f32-to-bf16" and record.dtype == "float32"


def _parse(document: Mapping[str, Any], path: Path) -> Iterator[Shard]:
    listed = document.get("records")
    if not isinstance(listed, list):
        raise _malformed(path, "has no list 'records'")
    for index, entry in enumerate(listed):
        where = f"records[{index}]"
        _require(isinstance(entry, Mapping), path, f"{where} is not an object")
        file, nbytes, tensors = (entry.get(key) for key in ("dataPath", "nbytes", "records"))
        _require(is_plain_name(file), path, f"{where}: dataPath {file!r} is not a file name")
        _require(entry.get("format") == "raw-shard", path, f"{where}: format is not raw-shard")
        _require(_is_size(nbytes), path, f"{where}: nbytes {nbytes!r} is not a size")
        _require(isinstance(tensors, list), path, f"{where} has no list 'records'")
        md5 = entry.get("md5sum", "")
        _require(isinstance(md5, str), path, f"{where}: md5sum is not text")
        records = tuple(_parse_record(tensor, where, path) for tensor in tensors)
        end = 0
        for record in sorted(records, key=lambda record: record.offset):
            _require(record.offset >= end, path, f"tensor '{record.name}' overlaps another")
            end = record.offset + record.nbytes
        _require(end <= nbytes, path, f"{where}: tensors reach byte {end} of {nbytes}")
        yield Shard(file, nbytes, records, md5)


def _parse_record(entry: Any, where: str, path: Path) -> Record:
    _require(isinstance(entry, Mapping), path, f"{where}: a record is not an object")
    name, shape, dtype = (entry.get(key) for key in ("name", "shape", "dtype"))
    _require(isinstance(name, str) and name != "", path, f"{where}: a record has no name")
    offset, nbytes, form = (entry.get(key) for key in ("byteOffset", "nbytes", "format"))
    valid_shape = isinstance(shape, list) and all(_is_size(extent) for extent in shape)
    _require(valid_shape, path, f"tensor '{name}': shape {shape!r} is not a list of sizes")
    known = isinstance(dtype, str) and is_stored_dtype(dtype)
    _require(known, path, f"tensor '{name}': dtype {dtype!r} is not known")
    _require(_is_size(offset), path, f"tensor '{name}': byteOffset {offset!r} is not a size")
    known = form in ("raw", "f32-to-bf16")
    _require(known, path, f"tensor '{name}': format {form!r} is not known")
    record = Record(name, tuple(shape), dtype, 0, offset, form)
    itemsize = 2 if _is_narrowed(record) else numpy_dtype(dtype).itemsize
    expected = math.prod(shape) * itemsize
    _require(
        nbytes == expected and _is_size(nbytes),
        path,
        f"tensor '{name}': nbytes {nbytes!r}, its shape and dtype make {expected}",
    )
    return Record(name, record.shape, dtype, expected, offset, form)
