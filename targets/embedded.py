"""What a library says of itself, read from its bytes without running it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlc_compile.errors import InputError
from mlc_compile.quantization.policy import StoredParam
from mlc_compile.quantization.scheme import is_stored_dtype

# The first key of `_metadata`: compiler/metadata.py writes sorted keys without spaces, in ASCII.
_START = b'{"active_vocab_size":'


def read_metadata(path: Path) -> dict[str, Any]:
    """The `_metadata` object of a library of any target (.so, .wasm, .a).

    Raises:
        InputError: the file cannot be read or holds no metadata of ours.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    found = find_metadata(data)
    if found is None:
        raise InputError(
            f"{path}: not a loadable model library: it holds no metadata of mlc_compile",
            hint="make one with `mlc_compile compile`",
        )
    for damaged in _damaged_parts(found):
        raise InputError(
            f"{path}: its metadata is damaged at '{damaged}'", hint="compile the library again"
        )
    return found


def _damaged_parts(metadata: Mapping[str, Any]) -> Iterator[str]:
    """The keys that are not what those who read metadata rely on."""
    ours = metadata["mlc_compile"]
    texts = ("parameter_schema_id", "target", "tvm", "tvm_ffi", "version")
    yield from (key for key in ("model_type", "quantization") if not _is_text(metadata.get(key)))
    yield from (key for key in texts if not _is_text(ours.get(key)))
    params = metadata.get("params")
    if not isinstance(params, list) or not all(map(_is_param, params)):
        yield "params"
    functions = ours.get("functions")
    if not isinstance(functions, list) or not all(map(_is_text, functions)):
        yield "functions"
    if not isinstance(ours.get("memory_plan"), dict):
        yield "memory_plan"
    if not isinstance(ours.get("architecture") or {}, dict):
        yield "architecture"
    if not _is_text(ours.get("system_lib_prefix") or ""):
        yield "system_lib_prefix"


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_param(value: object) -> bool:
    if not isinstance(value, dict) or not _is_text(value.get("name")):
        return False
    shape, dtype = value.get("shape"), value.get("dtype")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 60 for n in shape):
        return False
    return math.prod(shape) < 1 << 60 and _is_text(dtype) and is_stored_dtype(str(dtype))


def find_metadata(data: bytes) -> dict[str, Any] | None:
    """The first metadata object in the bytes of a library; None when there is none."""
    at = data.find(_START)
    while at >= 0:
        end = data.find(b"\0", at)
        text = data[at : end if end >= 0 else len(data)].decode("latin-1")
        try:
            found, _ = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("mlc_compile"), dict):
            return found
        if end < 0:
            break  # the same text again: a file of nothing but starts would take for ever
        at = data.find(_START, end)
    return None


def library_params(metadata: Mapping[str, Any]) -> list[StoredParam]:
    """The parameters that a library wants, in order."""
    return [StoredParam(p["name"], tuple(p["shape"]), p["dtype"]) for p in metadata["params"]]
