"""Stored reference logits: a small .npz file that stands for the reference on other machines.

Arrays, all numeric (nothing is unpickled):
- header: UTF-8 JSON as uint8.
- tokens int32 [t], ends int32 [texts]: the texts, one behind the other.
- text, length int32 [rows]: row i is after the first length[i] tokens of text[i].
- stats float64 [rows, 4]: `Row`'s log_norm, std, peak and noise.
- full float32 [m, vocab]: logits of the first m rows; values float32 and ids int32 [rows - m, k]:
  the largest k logits of the others.

The file names the parameters it was made from: another model's is refused, not compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlc_compile.config import parse_json_strict
from mlc_compile.errors import InputError
from mlc_compile.manifest import canonical_json, read_manifest
from mlc_compile.runtime.compare import Row
from mlc_compile.runtime.reference import Attention
from mlc_compile.runtime.scenarios import Context, Greedy

SCHEMA = "mlc-compile.golden"
VERSION = 1

# With a large vocabulary, the first rows of a text are kept whole and of the others the top ones.
SMALL_VOCABULARY = 1024
WHOLE_ROWS = 2
TOP = 64

_MOST_BYTES = 1 << 30
_DTYPES = {
    "header": np.uint8,
    "tokens": np.int32,
    "ends": np.int32,
    "text": np.int32,
    "length": np.int32,
    "stats": np.float64,
    "full": np.float32,
    "values": np.float32,
    "ids": np.int32,
}


def kept_logits(vocab_size: int, index: int) -> int | None:
    """How many logits the row of this index within its text keeps; None is all."""
    return None if vocab_size <= SMALL_VOCABULARY or index < WHOLE_ROWS else TOP


def parameters_digest(directory: Path) -> tuple[str, str]:
    """(parameter_schema_id, sha256 over names and hashes of all tensors) from manifest.json."""
    document = read_manifest(directory)
    listed = [[entry["name"], entry["sha256"]] for entry in document["tensors"]]
    digest = hashlib.sha256(canonical_json(listed)).hexdigest()
    return str(document.get("parameter_schema_id")), f"sha256:{digest}"


def is_golden(path: Path) -> bool:
    return path.suffix == ".npz"


@dataclass(frozen=True)
class Golden:
    """Rows of one reference for one set of parameters.

    Attributes:
        reference: what computed them.
        schema_id, parameters: see `parameters_digest`.
        attention: what the library must have; `context` counts where RoPE depends on it.
    """

    reference: str
    schema_id: str
    parameters: str
    attention: Attention
    decode_steps: int
    greedy: Greedy
    rows: Mapping[Context, Row]

    def check(
        self, directory: Path, attention: Attention, *, rope_varies: bool, where: Path
    ) -> None:
        """Raises InputError unless the logits are those of the parameters in `directory`."""
        schema_id, parameters = parameters_digest(directory)
        if (schema_id, parameters) != (self.schema_id, self.parameters):
            mine, other = (self.schema_id, schema_id)
            if mine == other:
                mine, other = self.parameters, parameters
            raise InputError(
                f"{where}: made from other parameters ({mine}) than {directory} has ({other})",
                hint="make it again with verify --write-golden",
            )
        context = attention.context if rope_varies else self.attention.context
        if self.attention != dataclasses.replace(attention, context=context):
            raise InputError(
                f"{where}: made for {self.attention}, and the library has {attention}",
                hint="make it again with verify --write-golden",
            )

    def write(self, path: Path) -> None:
        """Same rows, same bytes. Raises InputError when the file cannot be written."""
        header = {
            "schema": SCHEMA,
            "version": VERSION,
            "reference": self.reference,
            "parameter_schema_id": self.schema_id,
            "parameters": self.parameters,
            "attention": dataclasses.asdict(self.attention),
            "decode_steps": self.decode_steps,
            "greedy": [list(self.greedy.prompt), list(self.greedy.continuation)],
        }
        ordered = sorted(self.rows)
        texts = [
            text
            for text, after in zip(ordered, [*ordered[1:], ()], strict=True)
            if after[: len(text)] != text
        ]
        places: list[tuple[int, int, Row]] = []
        number = 0
        for context in ordered:
            places.append((number, len(context), self.rows[context]))
            number += context == texts[number]
        places.sort(key=lambda place: place[2].ids is not None)
        whole = [row.values for _, _, row in places if row.ids is None]
        top = [(row.values, row.ids) for _, _, row in places if row.ids is not None]
        arrays: dict[str, Any] = {
            "header": np.frombuffer(json.dumps(header, sort_keys=True).encode(), np.uint8),
            "tokens": [token for text in texts for token in text],
            "ends": np.cumsum([len(text) for text in texts]),
            "text": [n for n, _, _ in places],
            "length": [length for _, length, _ in places],
            "stats": [(row.log_norm, row.std, row.peak, row.noise) for _, _, row in places],
            "full": np.stack(whole) if whole else np.empty((0, 0)),
            "values": np.stack([v for v, _ in top]) if top else np.empty((0, 0)),
            "ids": np.stack([i for _, i in top]) if top else np.empty((0, 0)),
        }
        typed: dict[str, Any] = {n: np.asarray(arrays[n], dtype) for n, dtype in _DTYPES.items()}
        try:
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".npz")
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez_compressed(file, **typed)
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Raises InputError for a file that is damaged, foreign or of another version."""
        try:
            with zipfile.ZipFile(path) as archive:
                if sum(info.file_size for info in archive.infolist()) > _MOST_BYTES:
                    raise InputError(f"{path}: unpacks to more than a GiB", hint="not ours")
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in _DTYPES}
            return cls._parse(arrays, path)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
            reason = f"{error.strerror}" if isinstance(error, OSError) else f"{error}"
            raise InputError(
                f"{path}: not a file of reference logits ({reason})",
                hint="make it with verify --write-golden",
            ) from error

    @classmethod
    def _parse(cls, arrays: Mapping[str, NDArray[Any]], path: Path) -> Golden:
        for name, dtype in _DTYPES.items():
            if arrays[name].dtype != dtype:
                raise ValueError(f"{name} is {arrays[name].dtype}")
        header = parse_json_strict(arrays["header"].tobytes().decode(), where=str(path))
        if (header.get("schema"), header.get("version")) != (SCHEMA, VERSION):
            raise InputError(
                f"{path}: is {header.get('schema')!r} version {header.get('version')!r}, and "
                f"{SCHEMA} version {VERSION} is read here",
                hint="make it again with verify --write-golden",
            )
        tokens = [int(token) for token in arrays["tokens"]]
        ends = [0, *arrays["ends"].tolist()]
        texts = [tuple(tokens[start:end]) for start, end in itertools.pairwise(ends)]
        full, values, ids = arrays["full"], arrays["values"], arrays["ids"]
        count = len(full) + len(values)
        if values.shape != ids.shape or {
            len(arrays[name]) for name in ("text", "length", "stats")
        } != {count}:
            raise ValueError("its arrays differ in length")
        rows = {}
        for i in range(count):
            context = texts[int(arrays["text"][i])][: int(arrays["length"][i])]
            log_norm, std, peak, noise = (float(x) for x in arrays["stats"][i])
            j = i - len(full)
            kept, which = (full[i], None) if j < 0 else (values[j], ids[j])
            if not (context and np.isfinite(kept).all() and np.isfinite(arrays["stats"][i]).all()):
                raise ValueError("its logits are not finite")
            rows[context] = Row(kept, which, log_norm, std, peak, noise)
        prompt, continuation = (tuple(int(t) for t in part) for part in header["greedy"])
        return cls(
            reference=str(header["reference"]),
            schema_id=str(header["parameter_schema_id"]),
            parameters=str(header["parameters"]),
            attention=Attention(**header["attention"]),
            decode_steps=int(header["decode_steps"]),
            greedy=Greedy(prompt, continuation),
            rows=rows,
        )
