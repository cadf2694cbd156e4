"""The parameter files: `tensor-cache.json` and `params_shard_N.bin` (mlc-format.md, section 3).

- Shards hold tensors back to back, unpadded, up to 32 MiB; a large tensor gets a shard of its own.
- Names, shapes and sizes are known before the first byte, so shards are laid out first and then
  filled in order, with all hashes taken on the way.
- float32 is stored as float32: every record has format "raw" (others narrow it to bfloat16).
- Reading trusts nothing: names, shapes, offsets and sizes are checked before a file is mapped.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mlc_compile.config import read_json_strict
from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.quantization.scheme import is_stored_dtype, numpy_dtype

TENSOR_CACHE = "tensor-cache.json"
SHARD_CAP = 32 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_READ_BLOCK = 4 << 20


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


class _OpenShard:
    """A shard being filled."""

    def __init__(self, shard: Shard, directory: Path) -> None:
        self.shard = shard
        self.file: IO[bytes] = (directory / shard.file).open("wb")
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.sha256 = hashlib.sha256()
        self.written = 0

    def append(self, data: memoryview) -> None:
        self.file.write(data)
        self.md5.update(data)
        self.sha256.update(data)
        self.written += len(data)


class TensorCacheWriter:
    """Writes the shards of `params` into `directory`, tensor by tensor, in the given order.

    `write` takes a tensor's bytes in as many pieces as suits the caller; `finish` writes
    tensor-cache.json. OSError comes through as it is.
    """

    def __init__(self, directory: Path, params: Sequence[StoredParam]) -> None:
        self.shards = plan_shards(params)
        self.files: list[WrittenFile] = []
        self.tensor_sha256: dict[str, str] = {}
        self._directory = directory
        self._order = [param.name for param in params]
        self._place = {r.name: (i, r) for i, s in enumerate(self.shards) for r in s.records}
        self._open: dict[int, _OpenShard] = {}
        self._done: dict[int, Shard] = {}
        self._sha256 = hashlib.sha256()
        self._written = 0

    def __enter__(self) -> TensorCacheWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for shard in self._open.values():
            shard.file.close()

    def write(self, name: str, data: npt.NDArray[Any]) -> None:
        """Appends the next bytes of tensor `name`, which must be the current one."""
        if not self._order or name != self._order[0]:
            raise ValueError(f"tensor {name} is out of order")
        index, record = self._place[name]
        if index not in self._open:
            self._open[index] = _OpenShard(self.shards[index], self._directory)
        shard = self._open[index]
        piece = np.ascontiguousarray(data)
        view = piece.reshape(-1).view(np.uint8).data
        self._written += len(view)
        if self._written > record.nbytes:
            raise ValueError(f"tensor {name} has more than {record.nbytes} bytes")
        shard.append(view)
        self._sha256.update(view)
        if self._written == record.nbytes:
            self._end_tensor(index, record)

    def _end_tensor(self, index: int, record: Record) -> None:
        self._order.pop(0)
        self.tensor_sha256[record.name] = self._sha256.hexdigest()
        self._sha256, self._written = hashlib.sha256(), 0
        shard = self._open[index]
        if shard.written == shard.shard.nbytes:
            shard.file.close()
            del self._open[index]
            planned = shard.shard
            md5 = shard.md5.hexdigest()
            self._done[index] = Shard(planned.file, planned.nbytes, planned.records, md5)
            self.files.append(WrittenFile(planned.file, planned.nbytes, shard.sha256.hexdigest()))

    def finish(self, *, source_elements: int) -> None:
        """Writes tensor-cache.json; all tensors must have been written.

        source_elements: elements of the unquantised parameters, for bits per parameter.
        """
        if self._order:
            raise ValueError(f"tensor {self._order[0]} was not written")
        shards = [self._done[i] for i in range(len(self.shards))]
        total = sum(shard.nbytes for shard in shards)
        document = {
            "metadata": {
                "ParamSize": sum(len(shard.records) for shard in shards),
                "ParamBytes": float(total),
                "BitsPerParam": 8.0 * total / source_elements,
            },
            "records": [_shard_json(shard) for shard in shards],
        }
        data = json.dumps(document, indent=4).encode()
        (self._directory / TENSOR_CACHE).write_bytes(data)
        self.files.append(WrittenFile(TENSOR_CACHE, len(data), hashlib.sha256(data).hexdigest()))


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
