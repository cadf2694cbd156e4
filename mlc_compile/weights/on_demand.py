"""Readers that few checkpoints need, imported with their first call.

A plain checkpoint is converted in seconds, of which the imports of all other formats' readers would
be a noticeable part. A table or a name here says where a reader is; tests/test_layout.py takes that
for the import that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def on_demand(where: str) -> Callable[..., Any]:
    """What calls `where`, "module:name"; the caller's annotation says what that takes and gives."""
    module, _, name = where.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(module), name)(*args, **kwargs)

    return call
