"""TVMScript parses slowly because of how it finds its caller; `fast_parsing` takes that cost away.

`T.prim_func` calls `inspect.stack()`, which asks `inspect.getmodule` for every frame; for the
frames of frozen importlib, which belong to no file, that scans all loaded modules each time. Nobody
needs their module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any


@contextmanager
def fast_parsing() -> Iterator[None]:
    """Within it `inspect.getmodule` answers None at once for frames without a source file."""
    original = inspect.getmodule

    def getmodule(obj: Any, _filename: str | None = None) -> ModuleType | None:
        frozen = isinstance(obj, FrameType) and obj.f_code.co_filename.startswith("<")
        if frozen or (_filename is not None and _filename.startswith("<")):
            return None
        return original(obj, _filename)

    inspect.getmodule = getmodule  # type: ignore[assignment]
    try:
        yield
    finally:
        inspect.getmodule = original
