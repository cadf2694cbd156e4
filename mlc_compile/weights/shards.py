"""The files of one checkpoint as one set of tensors, and the index that names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location
from mlc_compile.weights.reader import Array, TensorInfo, Unpacked

_LONGEST = 200  # characters of a name; more than file systems take are an error to look up
_AGAIN = "download the file again"


class WeightsFile(Protocol):
    """One file of a format: its tensors by name, read by rows."""

    @property
    def path(self) -> Location: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str, rows: slice | None = None) -> Array: ...

    def release(self) -> None: ...


class ShardReader(Unpacked):
    """All the files of one checkpoint, as one set of tensors."""

    def __init__(self, files: Sequence[WeightsFile], *, index: Location | None = None) -> None:
        """Raises InputError if two files hold a tensor of the same name."""
        self._home: dict[str, WeightsFile] = {}
        self._files = tuple(files)
        self.files: tuple[Location, ...] = (*((index,) if index else ()), *(f.path for f in files))
        for file in files:
            for name in file.tensors:
                if name in self._home:
                    raise InputError(
                        f"tensor {name!r} is both in {self._home[name].path} and in {file.path}",
                        hint="remove the file that doesn't belong to this checkpoint",
                    )
                self._home[name] = file
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(
            {name: file.tensors[name] for name, file in self._home.items()}
        )

    def read(self, name: str, rows: slice | None = None) -> Array:
        return self._home[name].read(name, rows)

    def release(self) -> None:
        for file in self._files:
            file.release()


def open_index(
    index: Location, suffix: str, open_shard: Callable[[Location], WeightsFile]
) -> ShardReader:
    """The shards that an index such as model.safetensors.index.json names, checked against it.

    Raises InputError if a shard is missing or is not a plain file name (with `suffix`) beside the
    index, or if the index and the shards disagree about which tensor is where.
    """
    weight_map = read_json_strict(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(file, str) for file in weight_map.values())
    ):
        raise InputError(f"{index} has no weight_map from tensor names to file names", hint=_AGAIN)
    shards = {}
    for file in sorted(set(weight_map.values())):
        # Only names beside the index: a path could reach any file of this machine.
        if set("/\\\0") & set(file) or len(file) > _LONGEST or not file.endswith(suffix):
            raise InputError(
                f"{index} names the file {file!r}, which is not the name of a {suffix} file "
                "beside it",
                hint="use an index that names its shards without folders",
            )
        if not (index.parent / file).is_file():
            raise InputError(
                f"{index} names {file!r}, which is not there",
                hint=f"put all shards into {index.parent}",
            )
        shards[file] = open_shard(index.parent / file)
    reader = ShardReader(list(shards.values()), index=index)
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise InputError(
                f"{index} places tensor {name!r} in {file}, which doesn't have it", hint=_AGAIN
            )
    unlisted = sorted(set(reader.tensors) - set(weight_map))
    if unlisted:
        raise InputError(
            f"{reader.tensors[unlisted[0]].file} has {len(unlisted)} tensors that {index} doesn't "
            f"list, the first is {unlisted[0]!r}",
            hint=_AGAIN,
        )
    return reader
