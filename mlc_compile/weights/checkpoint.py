"""Checkpoints: a Hugging Face directory or a GGUF file, behind one class.

- Nothing from a checkpoint is executed. Pickled weights (*.bin, *.pt) are refused.
- Weights are mapped, not loaded; `read` gives rows, so the caller decides how much is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.weights import gguf
from mlc_compile.weights.reader import Array, TensorInfo, TensorReader
from mlc_compile.weights.st import SafetensorsFile, SafetensorsReader, open_index
from mlc_compile.weights.tokenizer import DirectoryTokenizer, GgufTokenizer, TokenizerSource

__all__ = ["SOURCE_FORMATS", "Checkpoint", "TensorInfo", "open_checkpoint"]

SOURCE_FORMATS = ("auto", "safetensors", "gguf")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    `config` has the keys of a Hugging Face config.json, whatever the format. `source_files` are
    the files that the weights and the config come from (tokenizer files are not among them).
    """

    path: Path
    format: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    source_files: tuple[Path, ...]
    reader: TensorReader = field(repr=False)
    tokenizer: TokenizerSource = field(repr=False)

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


def open_checkpoint(path: str | Path, source_format: str = "auto") -> Checkpoint:
    """Open a Hugging Face directory, a .safetensors file beside its config.json, or a GGUF file.

    With "auto" a GGUF file is known by its first bytes, and a directory without config.json that
    holds one .gguf file stands for that file.

    Raises:
        InputError: nothing usable there, a damaged file, or a format that isn't supported.
    """
    path = Path(path)
    if source_format not in SOURCE_FORMATS:
        raise InputError(
            f"unknown source format {source_format!r}",
            hint=f"supported: {', '.join(SOURCE_FORMATS)}",
        )
    if not path.exists():
        raise InputError(
            f"there is no file or directory {path}",
            hint="give the directory with config.json, or a .gguf file, on this machine",
        )
    if path.is_dir():
        return _open_directory(path, source_format)
    if source_format == "gguf" or (source_format == "auto" and gguf.is_gguf(path)):
        return _open_gguf(path)
    _refuse_pickle(path)
    if path.suffix != ".safetensors":
        raise InputError(
            f"{path} is neither a .safetensors nor a GGUF file",
            hint="give the directory with config.json, a .safetensors file or a .gguf file",
        )
    return _open_hf(path.parent, SafetensorsReader([SafetensorsFile(path)]), path)


def _open_directory(path: Path, source_format: str) -> Checkpoint:
    if source_format == "gguf" or (
        source_format == "auto" and not (path / "config.json").is_file()
    ):
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _open_gguf(files[0])
        if files:
            raise InputError(
                f"{path} has {len(files)} GGUF files: {', '.join(f.name for f in files[:4])}",
                hint="give the path of one of them",
            )
        if source_format == "gguf":
            raise InputError(f"{path} has no .gguf file")
        raise InputError(
            f"{path} has no config.json", hint="give the directory of a Hugging Face checkpoint"
        )
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} has no config.json", hint="give the directory of a Hugging Face checkpoint"
        )
    return _open_hf(path, _directory_reader(path), path)


def _directory_reader(path: Path) -> SafetensorsReader:
    index, single = path / _INDEX, path / _SINGLE
    if index.is_file():
        reader = open_index(index)
        if single.is_file() and single not in reader.files:
            raise InputError(
                f"{path} has both {_SINGLE} and an {_INDEX} that doesn't name it",
                hint="remove the one that doesn't belong to this checkpoint",
            )
        return reader
    if single.is_file():
        return SafetensorsReader([SafetensorsFile(single)])
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return SafetensorsReader([SafetensorsFile(files[0])])
    if files:
        raise InputError(
            f"{path} has {len(files)} safetensors files and no {_INDEX}",
            hint="add the index, or give the path of one file",
        )
    for file in sorted(path.iterdir()):
        _refuse_pickle(file)
    raise InputError(f"{path} has no .safetensors file", hint="download the checkpoint's weights")


def _refuse_pickle(file: Path) -> None:
    if file.suffix in _PICKLES:
        raise InputError(
            f"{file} holds pickled weights, and loading them can run code",
            hint="convert them to safetensors (transformers: save_pretrained) and try again",
        )


def _open_hf(directory: Path, reader: SafetensorsReader, path: Path) -> Checkpoint:
    config = directory / "config.json"
    if not config.is_file():
        raise InputError(
            f"there is no config.json beside {path}", hint="put the model's config.json there"
        )
    generation = directory / "generation_config.json"
    return Checkpoint(
        path=path,
        format="safetensors",
        config=read_json_strict(config),
        generation_config=read_json_strict(generation) if generation.is_file() else {},
        source_files=(config, *reader.files),
        reader=reader,
        tokenizer=DirectoryTokenizer(directory),
    )


def _open_gguf(path: Path) -> Checkpoint:
    container = gguf.GgufFile(path)
    reader = gguf.GgufReader(container)
    return Checkpoint(
        path=path,
        format="gguf",
        config=reader.config,
        generation_config=gguf.generation_config(container),
        source_files=(path,),
        reader=reader,
        tokenizer=GgufTokenizer(container.metadata, path),
    )
