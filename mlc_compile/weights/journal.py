"""What an interrupted run had finished: an append-only file of JSON lines.

The first line carries a key, a fingerprint of everything that the result depends on; a journal
with another key is worth nothing. Each further line is one finished thing. A line counts when it
is whole: whatever a crash tore off the end is cut away before the next line is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = 1


class Journal:
    """The journal at `path`, opened for further lines. Raises OSError as it comes."""

    def __init__(self, path: Path, key: str) -> None:
        """`entries` are the lines after the first; none when the journal had another key."""
        head = {"journal": VERSION, "key": key}
        lines = _whole_lines(path)
        self.resumed = bool(lines) and lines[0] == head
        self.entries: tuple[Mapping[str, Any], ...] = tuple(lines[1:]) if self.resumed else ()
        draft = path.with_suffix(".draft")
        with draft.open("wb") as file:
            file.writelines(_line(entry) for entry in (head, *self.entries))
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        self._lock = threading.Lock()
        self._file = path.open("ab", buffering=0)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Adds a line and waits until it is on the disk."""
        with self._lock:
            line = memoryview(_line(entry))
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def key_of(path: Path) -> str | None:
    """The key of the journal at `path`, None where there is none."""
    lines = _whole_lines(path)
    key = lines[0].get("key") if lines and lines[0].get("journal") == VERSION else None
    return key if isinstance(key, str) else None


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects at the start of the file, up to the first line that is none."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict):
                break
            found.append(entry)
    return found
