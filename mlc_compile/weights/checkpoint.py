"""Checkpoints: a Hugging Face directory, a weights file or a GGUF file, behind one class.

- Nothing from a checkpoint is executed: pickled weights (*.bin, *.pt) are read by torch_pickle.py,
  which knows tensors and nothing else.
- Weights are mapped, not loaded, or read by ranges behind a URL; `read` gives rows, so the caller
  decides how much is in memory.
- LoRA adapters are merged as rows are read.
- A format's reader is imported with the first file of that format (on_demand.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.weights.files import Location, SourceFile, is_gguf, locate, source_file
from mlc_compile.weights.on_demand import on_demand
from mlc_compile.weights.reader import QUANTISATION_KEYS, Array, TensorInfo, TensorReader
from mlc_compile.weights.shards import ShardReader, WeightsFile, open_index
from mlc_compile.weights.st import SafetensorsFile
from mlc_compile.weights.tokenizer_files import DirectoryTokenizer, TokenizerSource

if TYPE_CHECKING:
    from mlc_compile.weights.gguf import GgufReader

__all__ = ["SOURCE_FORMATS", "Checkpoint", "TensorInfo", "open_checkpoint"]

SOURCE_FORMATS = ("auto", "safetensors", "torch", "gguf")

_open_gguf_file: Callable[[Location], tuple[GgufReader, dict[str, Any], TokenizerSource]] = (
    on_demand("mlc_compile.weights.gguf:open_gguf")
)
_unpacked: Callable[[TensorReader, dict[str, Any]], tuple[TensorReader, dict[str, Any]]] = (
    on_demand("mlc_compile.weights.packed_source:wrap")
)
_merge: Callable[[TensorReader, Sequence[Location]], TensorReader] = on_demand(
    "mlc_compile.weights.lora:merge"
)


@dataclass(frozen=True)
class _Format:
    """How a format's files are called, and what opens one."""

    name: str
    suffixes: tuple[str, ...]
    single: str
    index: str
    open: Callable[[Location], WeightsFile]


_FORMATS = {
    found.name: found
    for found in (
        _Format(
            "safetensors",
            (".safetensors",),
            "model.safetensors",
            "model.safetensors.index.json",
            SafetensorsFile,
        ),
        _Format(
            "torch",
            (".bin", ".pt", ".pth", ".ckpt"),
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            on_demand("mlc_compile.weights.torch_file:TorchFile"),
        ),
    )
}
# What training leaves beside the weights, under the same suffixes.
_NO_WEIGHTS = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "rng_state")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `config` has the keys of a Hugging Face config.json, whatever the format. `sources` are the
    files that the weights and the config come from (tokenizer files are not among them),
    `source_files` those of them that are on this machine.
    """

    path: Location
    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    sources: tuple[SourceFile, ...]
    reader: TensorReader = field(repr=False)
    tokenizer: TokenizerSource = field(repr=False)

    @property
    def source_files(self) -> tuple[Path, ...]:
        """The paths of the local ones among `sources`."""
        return tuple(source.path for source in self.sources if source.path is not None)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its Hugging Face name."""
        return self.reader.tensors

    def read(self, name: str, rows: slice | None = None) -> Array:
        """A tensor, or the given rows (axis 0) of it, as a read-only array.

        float32, float16 and bfloat16 (ml_dtypes) are views of the mapped file where the row order
        allows; GGUF block types are decoded to float32, only the rows asked for.

        Raises:
            InputError: there is no tensor of that name.
        """
        if name not in self.tensors:
            raise InputError(f"{self.path} has no tensor {name!r}")
        return self.reader.read(name, rows)

    def release(self) -> None:
        """Let the system reclaim the pages read so far; arrays already handed out stay valid."""
        self.reader.release()

    def tokenizer_json(self) -> dict[str, Any]:
        """tokenizer.json, or its equal rebuilt from GGUF metadata. InputError if impossible."""
        return self.tokenizer.tokenizer_json()

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json with `chat_template` as one string; {} if there is none."""
        return self.tokenizer.tokenizer_config()

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer files to ship, by name: as they are, or made from GGUF metadata."""
        return self.tokenizer.files()


def open_checkpoint(
    path: str | Path, source_format: str = "auto", *, lora: Sequence[str | Path] = ()
) -> Checkpoint:
    """Open a Hugging Face directory, a file of weights beside its config.json, or a GGUF file.

    path: on this machine, or a URL such as https://host/model/ (remote.py).
    source_format: with "auto" a GGUF file is known by its first bytes, a directory without
    config.json that holds one .gguf file stands for that file, and safetensors are preferred.
    lora: directories of PEFT adapters, merged into the weights in this order.

    Raises:
        InputError: nothing usable there, a damaged file, or a format that isn't supported.
        EnvironmentLacksError: a URL without the packages that read it.
    """
    if source_format not in SOURCE_FORMATS:
        raise InputError(
            f"unknown source format {source_format!r}",
            hint=f"supported: {', '.join(SOURCE_FORMATS)}",
        )
    place = locate(path)
    if not place.exists():
        raise InputError(
            f"there is no file or directory {place}",
            hint="give the directory with config.json, or a .gguf file",
        )
    adapters = [locate(adapter) for adapter in lora]
    if place.is_dir():
        return _open_directory(place, source_format, adapters)
    if not place.is_file():
        raise InputError(f"cannot read {place}: it is not a regular file")
    if source_format == "gguf" or (source_format == "auto" and is_gguf(place)):
        return _open_gguf(place, adapters)
    for kind in _FORMATS.values():
        if place.suffix in kind.suffixes and source_format in ("auto", kind.name):
            reader = ShardReader([kind.open(place)])
            return _open_hf(place.parent, reader, kind.name, place, adapters)
    raise InputError(
        f"{place} is neither a .safetensors nor a torch nor a GGUF file"
        if source_format == "auto"
        else f"{place} is not a file of the format {source_format}",
        hint="give the directory with config.json, or a .safetensors, .bin or .gguf file",
    )


def _open_directory(path: Location, source_format: str, adapters: Sequence[Location]) -> Checkpoint:
    if source_format == "gguf" or (
        source_format == "auto" and not (path / "config.json").is_file()
    ):
        files: list[Location] = sorted(path.glob("*.gguf"), key=str)
        if len(files) == 1:
            return _open_gguf(files[0], adapters)
        if files:
            raise InputError(
                f"{path} has {len(files)} GGUF files: {', '.join(f.name for f in files[:4])}",
                hint="give the path of one of them",
            )
        if source_format == "gguf":
            raise InputError(f"{path} has no .gguf file")
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} has no config.json", hint="give the directory of a Hugging Face checkpoint"
        )
    kinds = [kind for kind in _FORMATS.values() if source_format in ("auto", kind.name)]
    for kind in kinds:
        reader = _directory_reader(path, kind)
        if reader is not None:
            return _open_hf(path, reader, kind.name, path, adapters)
    suffixes = " or ".join(kind.suffixes[0] for kind in kinds)
    raise InputError(f"{path} has no {suffixes} file", hint="download the checkpoint's weights")


def _directory_reader(path: Location, kind: _Format) -> ShardReader | None:
    """The weights of this kind in a directory, None if there are none."""
    index, single = path / kind.index, path / kind.single
    if index.is_file():
        reader = open_index(index, kind.suffixes[0], kind.open)
        if single.is_file() and single not in reader.files:
            raise InputError(
                f"{path} has both {kind.single} and an {kind.index} that doesn't name it",
                hint="remove the one that doesn't belong to this checkpoint",
            )
        return reader
    if single.is_file():
        return ShardReader([kind.open(single)])
    files = sorted(
        (
            file
            for suffix in kind.suffixes
            for file in path.glob(f"*{suffix}")
            if not file.name.startswith(_NO_WEIGHTS)
        ),
        key=str,
    )
    if len(files) > 1:
        raise InputError(
            f"{path} has {len(files)} {kind.name} files and no {kind.index}",
            hint="add the index, or give the path of one file",
        )
    return ShardReader([kind.open(files[0])]) if files else None


def _open_hf(
    directory: Location,
    weights: ShardReader,
    source_format: str,
    path: Location,
    adapters: Sequence[Location],
) -> Checkpoint:
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise InputError(
            f"there is no config.json beside {path}", hint="put the model's config.json there"
        )
    generation = directory / "generation_config.json"
    reader: TensorReader = weights
    config = read_json_strict(config_file)
    if any(config.get(key) is not None for key in QUANTISATION_KEYS):
        reader, config = _unpacked(reader, config)
    if adapters:
        reader = _merge(reader, adapters)
    return Checkpoint(
        path=path,
        format=source_format,
        config=config,
        generation_config=read_json_strict(generation) if generation.is_file() else {},
        sources=tuple(source_file(file) for file in (config_file, *reader.files)),
        reader=reader,
        tokenizer=DirectoryTokenizer(directory),
    )


def _open_gguf(path: Location, adapters: Sequence[Location]) -> Checkpoint:
    weights, generation_config, tokenizer = _open_gguf_file(path)
    reader = _merge(weights, adapters) if adapters else weights
    return Checkpoint(
        path=path,
        format="gguf",
        config=weights.config,
        generation_config=generation_config,
        sources=tuple(source_file(file) for file in reader.files),
        reader=reader,
        tokenizer=tokenizer,
    )
