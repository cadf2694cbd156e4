"""The files that a conversion reads: their identity, their hashes, and that they stay the same."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import blake3
import numpy as np
import numpy.typing as npt

from mlc_compile.errors import InputError
from mlc_compile.manifest import FORMAT_VERSION, canonical_json, tool_versions
from mlc_compile.weights.checkpoint import Checkpoint
from mlc_compile.weights.files import SourceFile
from mlc_compile.weights.plan import ConversionPlan
from mlc_compile.weights.tensor_cache import read_buffer

SourceHash = Literal["blake3", "sha256", "none"]
"""How source files are hashed: BLAKE3 takes a fifth of SHA-256's time, which hubs list."""

_STEP = 32 << 20  # hashed in one work item
DIGESTS: dict[SourceHash, Callable[..., Any]] = {
    "blake3": blake3.blake3,
    "sha256": hashlib.sha256,
}


class _Hashed:
    """A source file, hashed step by step."""

    def __init__(self, file: SourceFile, kind: SourceHash) -> None:
        self.file = file
        self.digest: str | None = None
        self.busy = False
        self._kind = kind
        self._hash = DIGESTS[kind]() if kind != "none" else None
        self._position = 0

    @property
    def complete(self) -> bool:
        """Whether it is hashed, where it should be."""
        return self._hash is None or self.digest is not None

    def listed(self) -> dict[str, Any]:
        """Its entry in manifest.json."""
        entry = {"name": self.file.name, "nbytes": self.file.size}
        return entry if self.digest is None else {**entry, self._kind: self.digest}

    def step(self) -> Mapping[str, Any] | None:
        """Hashes the next piece; the line for the journal when it was the last."""
        assert self._hash is not None
        buffer = read_buffer()
        end = min(self.file.size, self._position + _STEP)
        while self._position < end:
            count = self.file.readinto(self._position, buffer[: end - self._position])
            if not count:
                raise InputError(
                    f"{self.file.name}: ends before its {self.file.size} bytes",
                    hint="convert again when it is complete",
                )
            self._hash.update(buffer[:count])
            self._position += count
        self.busy = False
        if self._position < self.file.size:
            return None
        self.digest = self._hash.hexdigest()
        return {"source": self.file.name, "digest": self.digest}


class SourceFiles:
    """The source files, in the order of the manifest."""

    def __init__(self, files: Sequence[SourceFile], kind: SourceHash = "blake3") -> None:
        self.kind = kind
        order = sorted(files, key=lambda file: (file.name, file.identity))
        self._files = [_Hashed(file, kind) for file in order]

    @property
    def identity(self) -> list[tuple[str, int, str]]:
        """(name, size, what tells another content) of each."""
        return [(one.file.name, one.file.size, one.file.identity) for one in self._files]

    @property
    def complete(self) -> bool:
        """Whether all are hashed that should be."""
        return all(one.complete for one in self._files)

    @property
    def listed(self) -> list[dict[str, Any]]:
        """Their entries in manifest.json: names, sizes, and hashes where they are wanted."""
        return [one.listed() for one in self._files]

    def take_over(self, entry: Mapping[str, Any]) -> None:
        """Trusts the journal, whose key has the identity of each file."""
        same = [one for one in self._files if one.file.name == entry["source"]]
        if len(same) == 1:  # of two with one name either could be meant
            same[0].digest = entry["digest"]

    def steps(self, *, every: bool) -> Iterator[Callable[[], Mapping[str, Any] | None]]:
        """Work items: the next piece of the first file that is not hashed, or of every one.

        A file has at most one piece in work.
        """
        for one in self._files:
            if one.complete:
                continue
            if not one.busy:
                one.busy = True
                yield one.step
            if not every:
                return

    def check_unchanged(self) -> None:
        """Raises InputError for a file that is not the one that was opened."""
        for one in self._files:
            one.file.check()


def fingerprint(
    plan: ConversionPlan,
    checkpoint: Checkpoint,
    sources: SourceFiles,
    scales: str,
    importance: Mapping[str, npt.NDArray[np.float32]] | None,
    options: Mapping[str, Any],
) -> str:
    """A hash of everything that the bytes of a conversion depend on, but for the weights' values.

    Of those it has the files' sizes and times and every tensor's name, shape and place.
    """
    weights = hashlib.sha256()
    for name, array in sorted((importance or {}).items()):
        weights.update(name.encode() + b"\0" + np.ascontiguousarray(array, "<f4").tobytes())
    content = {
        "format": FORMAT_VERSION,
        "versions": tool_versions(),
        "model": plan.model.identity(),
        "parameters": [repr(param.spec) for param in plan.params],
        "stored": [[s.name, list(s.shape), s.dtype, s.packing] for s in plan.stored],
        "shards": [[shard.file, shard.nbytes] for shard in plan.shards],
        "scheme": repr(plan.scheme),
        "path": str(checkpoint.path.absolute()),
        "sources": [list(entry) for entry in sources.identity],
        "source_hash": sources.kind,
        "tensors": [
            [t.name, list(t.shape), t.dtype, t.nbytes, t.file] for t in checkpoint.tensors.values()
        ],
        "scales": scales,
        "importance": weights.hexdigest(),
        "options": dict(options),
    }
    return hashlib.sha256(canonical_json(content)).hexdigest()
