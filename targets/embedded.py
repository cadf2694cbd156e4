"""What a library says of itself, read from its bytes without running it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlc_compile.errors import InputError
from mlc_compile.quantization.policy import StoredParam

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
    return found


def find_metadata(data: bytes) -> dict[str, Any] | None:
    """The first metadata object in the bytes of a library; None when there is none."""
    at = data.find(_START)
    while at >= 0:
        end = data.find(b"\0", at)
        text = data[at : end if end >= 0 else len(data)].decode("latin-1")
        try:
            found, _ = json.JSONDecoder().raw_decode(text)
        except (json.JSONDecodeError, RecursionError):
            found = None
        if isinstance(found, dict) and isinstance(found.get("mlc_compile"), dict):
            return found
        at = data.find(_START, at + 1)
    return None


def library_params(metadata: Mapping[str, Any]) -> list[StoredParam]:
    """The parameters that a library wants, in order."""
    return [StoredParam(p["name"], tuple(p["shape"]), p["dtype"]) for p in metadata["params"]]
