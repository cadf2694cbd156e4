"""What was made from what: manifest.json (ours) and mlc-model-manifest.json (web-llm's).

- manifest.json lists versions, source files, scheme, options and the SHA-256 of every file and
  tensor, those that gen_config writes among them, and ends with its own. It holds no times and no
  paths, so that two runs give the same bytes. It is written last: its presence means that the
  parameters are complete.
- mlc-model-manifest.json carries the two ids that a library repeats in `_metadata.artifact`;
  runtimes refuse parts whose ids differ (mlc-format.md, last section).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError, MlcError
from mlc_compile.models.spec import Model
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.quantization.scheme import QuantScheme
from mlc_compile.versions import version
from mlc_compile.weights.tensor_cache import (
    WrittenFile,
    is_plain_name,
    open_tensor_cache,
    read_blocks,
)
from mlc_compile.weights.tokenizer_files import COPIED_FILES

MANIFEST = "manifest.json"
MODEL_MANIFEST = "mlc-model-manifest.json"
SCHEMA = "mlc-compile.parameters"
FORMAT_VERSION = 1
SHARD_FILE = re.compile(r"params_shard_\d+\.bin")
CHAT_CONFIG = "mlc-chat-config.json"
CONFIGURATION = "configuration"
"""The section with the files of gen_config, which may run before or after convert_weight."""

SEAL = "manifest_sha256"
_BLANK = b"0" * 64
_SEALED = re.compile(rb'"%s": "([0-9a-f]{64})"\n\}\n\Z' % SEAL.encode())

CHAT_TASKS: Mapping[str, Any] = {
    "chat.completions": {
        "executor": "default",
        "inputs": {"text": {"processor": "tokenizer"}},
        "output": "text",
    }
}
"""What a text decoder offers; `executor` names a program of the library's artifact."""

_PACKAGES = ("mlc-compile", "apache-tvm", "apache-tvm-ffi")

Progress = Callable[[str, int, int], None]
"""(label of the present step, bytes done, bytes in all)."""


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys, no spaces, and None members of objects left out."""
    text = json.dumps(
        _present(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode()


def _present(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_present(item) for item in value]
    return value


def _id(value: Any) -> str:
    return f"sha256:{hashlib.sha256(canonical_json(value)).hexdigest()}"


def parameter_schema_id(params: Sequence[StoredParam]) -> str:
    """The id of a parameter list: names, shapes, dtypes and packing, in order."""
    return _id(
        [
            [param.name, list(param.shape), param.dtype]
            + ([param.packing] if param.packing else [])
            for param in params
        ]
    )


def interface_id(tasks: Mapping[str, Any]) -> str:
    """The id of what a model offers: SHA-256 of the canonical JSON of `{tasks}`."""
    return _id({"tasks": tasks})


def model_manifest(
    params: Sequence[StoredParam],
    tasks: Mapping[str, Any] = CHAT_TASKS,
    *,
    chat_config: str | None = CHAT_CONFIG,
) -> dict[str, Any]:
    """The content of mlc-model-manifest.json."""
    document: dict[str, Any] = {
        "schema": "mlc.model-package",
        "schema_version": 1,
        "interface_id": interface_id(tasks),
        "weights": {
            "manifest": "tensor-cache.json",
            "parameter_schema_id": parameter_schema_id(params),
        },
        "tasks": _present(tasks),
    }
    if chat_config is not None:
        document["chat_config"] = chat_config
    return document


def hash_file(path: Path, name: str | None = None) -> WrittenFile:
    """Size and SHA-256 of a file, listed as `name` (its own by default).

    Raises InputError when it cannot be read.
    """
    digest = hashlib.sha256()
    size = 0
    for block in read_blocks(path):
        digest.update(block)
        size += len(block)
    return WrittenFile(name or path.name, size, digest.hexdigest())


def tool_versions() -> dict[str, str]:
    """Versions of this tool and of TVM, without importing TVM."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            found[package] = "not installed"
    return found


def manifest_bytes(document: Mapping[str, Any]) -> bytes:
    """manifest.json as a file. Its last key is the SHA-256 of all its bytes, where the digits of
    that hash itself count as zeros."""
    sealed = {key: value for key, value in document.items() if key != SEAL}
    sealed[SEAL] = _BLANK.decode()
    text = json.dumps(sealed, indent=2, ensure_ascii=False, allow_nan=False)
    data = text.encode() + b"\n"
    head, _, tail = data.rpartition(_BLANK)
    return head + hashlib.sha256(data).hexdigest().encode() + tail


def _check_seal(path: Path) -> list[str]:
    data = b"".join(read_blocks(path))
    end = _SEALED.search(data)
    if end is None:
        return [f"{MANIFEST}: does not end with its own sha256"]
    start, stop = end.span(1)
    found = hashlib.sha256(data[:start] + _BLANK + data[stop:]).hexdigest()
    if found != end[1].decode():
        return [f"{MANIFEST}: sha256 is {found}, it says {end[1].decode()} itself"]
    return []


def configuration_files(directory: Path) -> list[WrittenFile]:
    """What gen_config has written into `directory`, hashed; nothing without its main file.

    Raises InputError when a file cannot be read.
    """
    if not (directory / CHAT_CONFIG).is_file():
        return []
    paths = [directory / name for name in (CHAT_CONFIG, *COPIED_FILES)]
    return [hash_file(path) for path in paths if path.is_file()]


def with_configuration(document: Mapping[str, Any], files: Sequence[WrittenFile]) -> dict[str, Any]:
    """The manifest with `files` as those of gen_config; as it is without any."""
    if not files:
        return dict(document)
    return {**document, CONFIGURATION: {"files": [_file_json(file) for file in files]}}


def build_manifest(
    model: Model,
    scheme: QuantScheme,
    params: Sequence[StoredParam],
    *,
    source_format: str,
    sources: Sequence[Mapping[str, Any]],
    source_elements: int,
    files: Sequence[WrittenFile],
    tensor_sha256: Mapping[str, str],
    options: Mapping[str, Any],
    relative_errors: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The content of manifest.json.

    sources: name, nbytes and maybe a hash (blake3 or sha256) of each. source_elements: elements of
    the unquantised parameters. options: what the user chose, as JSON.
    relative_errors: of the first stored tensor of each parameter, for the parameter as it is
    stored: sqrt(sum e^2 / sum w^2). notes: what was lost of the source.
    """
    errors = relative_errors or {}
    stored = sum(param.nbytes for param in params)
    return {
        "schema": SCHEMA,
        "format_version": FORMAT_VERSION,
        "versions": tool_versions(),
        "architecture": model.identity(),
        "quantization": {
            "name": scheme.name,
            "label": scheme.label,
            "bits": scheme.bits,
            "codes": scheme.codes,
            "group_size": scheme.group_size,
            "layout": scheme.layout,
            "model_dtype": scheme.model_dtype,
            **({"overrides": scheme.overrides_json()} if scheme.overrides else {}),
        },
        "parameters": source_elements,
        "parameter_bytes": stored,
        "effective_bits_per_weight": round(8 * stored / source_elements, 6),
        "parameter_schema_id": parameter_schema_id(params),
        "options": dict(options),
        **({"notes": list(notes)} if notes else {}),
        "source": {"format": source_format, "files": [dict(file) for file in sources]},
        "files": [_file_json(file) for file in sorted(files, key=lambda file: file.name)],
        "tensors": [
            {
                "name": param.name,
                "shape": list(param.shape),
                "dtype": param.dtype,
                "nbytes": param.nbytes,
                "sha256": tensor_sha256[param.name],
                **({"relative_error": errors[param.name]} if param.name in errors else {}),
            }
            for param in params
        ],
    }


def _file_json(file: WrittenFile) -> dict[str, Any]:
    return {"name": file.name, "nbytes": file.nbytes, "sha256": file.sha256}


def read_manifest(directory: Path) -> dict[str, Any]:
    """manifest.json of `directory`, with its lists of files and tensors checked for form.

    Raises InputError when it is missing, malformed, or of a newer format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{path}: is missing, so these parameters are not complete",
            hint="run convert_weight; its last step writes this file",
        )
    document = read_json_strict(path)
    if document.get("schema") != SCHEMA:
        raise InputError(f"{path}: is not a manifest of mlc_compile", hint="run convert_weight")
    found = document.get("format_version")
    if type(found) is not int or found > FORMAT_VERSION:
        raise InputError(
            f"{path}: format version {found!r} is not known to this tool ({FORMAT_VERSION})",
            hint="update mlc-compile or convert again",
        )
    for key in ("files", "tensors"):
        if not _are_entries(document.get(key)):
            raise InputError(f"{path}: the list '{key}' is damaged", hint="convert again")
    section = document.get(CONFIGURATION, {"files": []})
    if not isinstance(section, dict) or not _are_entries(section.get("files")):
        raise InputError(f"{path}: '{CONFIGURATION}' is damaged", hint="convert again")
    if not all(is_plain_name(entry["name"]) for entry in _listed_files(document)):
        raise InputError(f"{path}: lists a file outside its directory", hint="convert again")
    return document


def _listed_files(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of all files: of convert_weight and of gen_config."""
    return [*document["files"], *document.get(CONFIGURATION, {"files": []})["files"]]


def _are_entries(value: Any) -> bool:
    return isinstance(value, list) and all(_is_entry(entry) for entry in value)


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and type(entry.get("nbytes")) is int
        and 0 <= entry["nbytes"] < 1 << 62
        and isinstance(entry.get("sha256"), str)
    )


def stored_schema_id(directory: Path) -> str:
    """The parameter_schema_id that manifest.json states, or "unknown" where there is none."""
    try:
        found = read_manifest(directory).get("parameter_schema_id")
    except InputError:
        return "unknown"
    return found if isinstance(found, str) else "unknown"


@dataclass(frozen=True)
class IntegrityReport:
    """The outcome of `check_directory`; `differences` has one sentence for each fault."""

    directory: Path
    files: int
    tensors: int
    nbytes: int
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True when everything is as the manifest says."""
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "directory": str(self.directory),
            "ok": self.ok,
            "files": self.files,
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "differences": list(self.differences),
        }

    def to_text(self) -> str:
        """The same for people."""
        if self.ok:
            return (
                f"{self.directory}: {self.files} files and {self.tensors} tensors, "
                f"{self.nbytes / 1e6:.1f} MB, as {MANIFEST} says"
            )
        count = len(self.differences)
        return "\n".join([f"{self.directory}: {count} differences", *self.differences])


def check_directory(directory: Path, *, progress: Progress | None = None) -> IntegrityReport:
    """Compares every file and tensor of `directory` with manifest.json, size and SHA-256, and that
    one with itself.

    Not covered are libraries, and files that neither convert_weight nor gen_config writes.

    Raises InputError when there is no readable manifest.json.
    """
    document = read_manifest(directory)
    files, tensors = _listed_files(document), document["tensors"]
    total = sum(entry["nbytes"] for entry in (*files, *tensors))
    done = 0

    def advance(entry: Mapping[str, Any]) -> None:
        nonlocal done
        done += entry["nbytes"]
        if progress is not None:
            progress(f"check {entry['name']}", done, total)

    faults = _check_seal(directory / MANIFEST)
    for entry in files:
        faults.extend(_check_file(directory / entry["name"], entry))
        advance(entry)
    listed = {entry["name"] for entry in files}
    configured = (directory / CHAT_CONFIG).exists() or CONFIGURATION in document
    others = (CHAT_CONFIG, *COPIED_FILES) if configured else ()
    for path in sorted(directory.iterdir()):
        ours = SHARD_FILE.fullmatch(path.name) or path.name in others
        if ours and path.name not in listed:
            faults.append(f"{path.name}: is not listed in {MANIFEST}")
    try:
        cache = open_tensor_cache(directory)
    except MlcError as error:
        faults.append(f"tensors cannot be checked: {error}")
    else:
        records = cache.records
        for entry in tensors:
            name = entry["name"]
            record = records.pop(name, None)
            if record is None:
                faults.append(f"tensor '{name}': is not in {cache.directory.name}")
            else:
                found = {"shape": list(record.shape), "dtype": record.dtype}
                data = np.ascontiguousarray(cache.tensor(name)).reshape(-1).view(np.uint8)
                found["sha256"] = hashlib.sha256(data.data).hexdigest()
                faults.extend(
                    f"tensor '{name}': {key} is {value}, {MANIFEST} says {entry.get(key)}"
                    for key, value in found.items()
                    if entry.get(key) != value
                )
            advance(entry)
        faults.extend(f"tensor '{name}': is not listed in {MANIFEST}" for name in records)
    size = sum(entry["nbytes"] for entry in files)
    return IntegrityReport(directory, len(files), len(tensors), size, tuple(faults))


def _check_file(path: Path, entry: Mapping[str, Any]) -> list[str]:
    name = entry["name"]
    if not path.is_file():
        return [f"{name}: is missing"]
    size = path.stat().st_size
    if size != entry["nbytes"]:
        return [f"{name}: has {size} bytes, {MANIFEST} says {entry['nbytes']}"]
    found = hash_file(path).sha256
    if found != entry["sha256"]:
        return [f"{name}: sha256 is {found}, {MANIFEST} says {entry['sha256']}"]
    return []
