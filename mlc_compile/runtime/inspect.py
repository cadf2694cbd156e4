"""What an artefact is: a model library, or a directory of parameters.

A library says itself what it is, by its `_metadata`, which is read without running it; a directory
by its manifest.json, whose hashes `check` compares with the files and tensors that are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from mlc_compile.chat_config import OVERRIDES_KEY
from mlc_compile.compiler.memory import MemoryPlan, format_bytes
from mlc_compile.errors import InputError
from mlc_compile.manifest import (
    MANIFEST,
    IntegrityReport,
    Progress,
    check_directory,
    hash_file,
    read_manifest,
)
from mlc_compile.targets.embedded import library_params, read_metadata

# What a file starts with -> the kind of library it is.
_LIBRARY_MAGIC: Final[Mapping[bytes, str]] = {
    b"\x7fELF": "shared library (ELF)",
    b"\xcf\xfa\xed\xfe": "shared library (Mach-O)",
    b"\xca\xfe\xba\xbe": "shared library (Mach-O, several architectures)",
    b"MZ": "shared library (Windows)",
    b"\0asm": "WebAssembly library",
    b"!<arch>\n": "static library (archive)",
}
_TAR_MAGIC: Final = (257, b"ustar")  # POSIX ustar, at this offset of the first header
_SIZES: Final = (
    "context_window_size",
    "sliding_window_size",
    "attention_sink_size",
    "prefill_chunk_size",
    "max_batch_size",
    "tensor_parallel_shards",
)


@dataclass(frozen=True)
class LibraryReport:
    """A library. `metadata` is what its `_metadata` function says; weights: bytes by dtype."""

    path: Path
    kind: str
    nbytes: int
    sha256: str
    metadata: Mapping[str, Any]
    weights: Mapping[str, int]

    @property
    def ours(self) -> Mapping[str, Any]:
        """The part of the metadata that is mlc_compile's own."""
        found: Mapping[str, Any] = self.metadata["mlc_compile"]
        return found

    @property
    def memory_plan(self) -> MemoryPlan:
        """The compiler's own."""
        plan = self.ours["memory_plan"]
        found = {field.name: plan.get(field.name) for field in fields(MemoryPlan)}
        if not all(type(size) is int and 0 <= size < 1 << 60 for size in found.values()):
            raise InputError(f"{self.path}: its metadata is damaged at 'memory_plan'")
        return MemoryPlan(**found)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data, the whole metadata included."""
        return {
            "path": str(self.path),
            "kind": self.kind,
            "bytes": self.nbytes,
            "sha256": self.sha256,
            "weight_bytes": dict(self.weights),
            "metadata": dict(self.metadata),
        }

    def to_text(self) -> str:
        """The same for people."""
        meta, ours = self.metadata, self.ours
        label = _label(ours.get("architecture") or {"label": ours.get("architecture_label")})
        held = f"{meta['quantization']}{_overrides(meta, OVERRIDES_KEY)}"
        model = f"{meta['model_type']} {held} ({label})"
        sizes = [f"{name} {meta[name]}" for name in _SIZES if meta.get(name, -1) != -1]
        functions = ours["functions"]
        rows = [
            ("kind", f"{self.kind}, {format_bytes(self.nbytes)}"),
            ("sha256", self.sha256),
            ("model", model),
            ("target", f"{ours['target']}: {ours.get('tvm_target', 'unknown')}"),
            (
                "made by",
                f"mlc-compile {ours['version']}, apache-tvm {ours['tvm']}, "
                f"apache-tvm-ffi {ours['tvm_ffi']}",
            ),
            ("sizes", ", ".join(sizes)),
            ("memory", _parts(self.memory_plan.to_json())),
            ("parameters", f"{len(meta['params'])}: {_parts(self.weights)}"),
            ("schema id", ours["parameter_schema_id"]),
            *_registration(ours),
            ("functions", f"{len(functions)}: {', '.join(functions)}"),
        ]
        return _table(self.path, rows)


@dataclass(frozen=True)
class ParamsReport:
    """A directory of parameters. `integrity` is None where it was not asked for."""

    path: Path
    manifest: Mapping[str, Any]
    integrity: IntegrityReport | None

    @property
    def ok(self) -> bool:
        """False when a check was asked for and found a difference."""
        return self.integrity is None or self.integrity.ok

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes of the tensors by dtype, the largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.manifest["tensors"]:
            sizes[str(tensor.get("dtype"))] += tensor["nbytes"]
        return dict(sizes.most_common())

    @property
    def nbytes(self) -> int:
        """Bytes of all listed files."""
        return sum(file["nbytes"] for file in self.manifest["files"])

    def _section(self, name: str) -> Mapping[str, Any]:
        """An object of the manifest, which only its lists of files and tensors were checked for."""
        found = self.manifest.get(name)
        if not isinstance(found, dict):
            raise InputError(
                f"{self.path / MANIFEST}: '{name}' is missing or damaged", hint="convert again"
            )
        return found

    def _sources(self) -> list[str]:
        """Names of the files that it was made from."""
        files = self._section("source").get("files")
        listed = files if isinstance(files, list) else []
        return [str(file.get("name")) for file in listed if isinstance(file, dict)]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data, the whole manifest included."""
        found: dict[str, Any] = {
            "path": str(self.path),
            "kind": "parameters",
            "bytes": self.nbytes,
            "weight_bytes": self.dtypes,
            "manifest": dict(self.manifest),
        }
        if self.integrity is not None:
            found["integrity"] = self.integrity.to_json()
        return found

    def to_text(self) -> str:
        """The same for people."""
        manifest = self.manifest
        arch, scheme = self._section("architecture"), self._section("quantization")
        source, versions = self._section("source"), self._section("versions")
        named = [f"{f['name']} {format_bytes(f['nbytes'])}" for f in manifest["files"]]
        rows = [
            ("kind", f"parameters, {format_bytes(self.nbytes)} in {len(named)} files"),
            ("model", f"{arch.get('name')} ({_label(arch)})"),
            (
                "scheme",
                f"{scheme.get('name')} ({scheme.get('label')}){_overrides(scheme)}, "
                f"{manifest.get('effective_bits_per_weight')} bits per weight",
            ),
            ("tensors", f"{len(manifest['tensors'])}: {_parts(self.dtypes)}"),
            (
                "source",
                f"{source.get('format')}: {', '.join(self._sources())}",
            ),
            ("made by", ", ".join(f"{name} {found}" for name, found in versions.items())),
            ("schema id", str(manifest.get("parameter_schema_id"))),
            ("files", ", ".join(named)),
        ]
        text = _table(self.path, rows)
        return text if self.integrity is None else f"{text}\n{self.integrity.to_text()}"


def _label(architecture: Mapping[str, Any]) -> str:
    """How far an architecture is proved, and by what where its name does not say it."""
    evidence = architecture.get("evidence")
    return f"{architecture.get('label')}" + (f": {evidence}" if evidence else "")


def _overrides(section: Mapping[str, Any], key: str = "overrides") -> str:
    """ ", but PATTERN=SCHEME, ..." for weights that another scheme holds."""
    pairs = section.get(key)
    if not isinstance(pairs, list):
        return ""
    return "".join(
        f", {'' if i else 'but '}{'='.join(map(str, pair))}"
        for i, pair in enumerate(pairs)
        if isinstance(pair, list)
    )


def _registration(ours: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How an app names a library that it links statically; nothing for other libraries."""
    prefix = ours.get("system_lib_prefix")
    return [("model lib", f"{prefix.removesuffix('_')} (prefix {prefix})")] if prefix else []


def _parts(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {format_bytes(n)}" for name, n in sizes.items())


def _table(path: Path, rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join([str(path), *(f"  {name:<{width}}  {value}" for name, value in rows)])


def inspect_artifact(
    path: Path, *, check: bool = False, progress: Progress | None = None
) -> LibraryReport | ParamsReport:
    """Say what `path` is. check: compare a directory with its manifest.json, see ParamsReport.ok.

    Raises:
        InputError: neither a library of ours nor a directory of parameters, or `check` of a file.
    """
    if path.is_dir():
        manifest = read_manifest(path)
        integrity = check_directory(path, progress=progress) if check else None
        return ParamsReport(path, manifest, integrity)
    if check:
        raise InputError(f"{path}: only a directory with manifest.json can be checked")
    kind = _library_kind(path)
    metadata = read_metadata(path)
    weights: Counter[str] = Counter()
    for param in library_params(metadata):
        weights[param.dtype] += param.nbytes
    file = hash_file(path)
    return LibraryReport(
        path, kind, file.nbytes, file.sha256, metadata, dict(weights.most_common())
    )


def _library_kind(path: Path) -> str:
    """By the file's first bytes, before anything of it is loaded."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    for magic, kind in _LIBRARY_MAGIC.items():
        if start.startswith(magic):
            return kind
    at, magic = _TAR_MAGIC
    if start[at : at + len(magic)] == magic:
        return "objects of a static library (tar)"
    raise InputError(
        f"{path}: is neither a shared library nor a directory of parameters",
        hint="inspect takes what compile and convert_weight write",
    )
