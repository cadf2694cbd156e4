"""Every architecture we compile, keyed by config.json's `model_type`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from mlc_compile.errors import InputError
from mlc_compile.models.llama import LLAMA, MISTRAL
from mlc_compile.models.qwen import QWEN2, QWEN3
from mlc_compile.models.spec import Architecture


def _by_name(architectures: Iterable[Architecture]) -> Mapping[str, Architecture]:
    table: dict[str, Architecture] = {}
    for architecture in architectures:
        if architecture.name in table:
            raise ValueError(f"architecture {architecture.name!r} is registered twice")
        table[architecture.name] = architecture
    return MappingProxyType(table)


ARCHITECTURES: Mapping[str, Architecture] = _by_name((LLAMA, MISTRAL, QWEN2, QWEN3))


def get_architecture(model_type: str, *, where: str) -> Architecture:
    """The architecture of that name.

    Raises:
        InputError: not registered; names the closest ones.
    """
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        close = difflib.get_close_matches(model_type.lower(), ARCHITECTURES, n=3, cutoff=0.5)
        closest = f"closest: {', '.join(close)}" if close else "none is close"
        raise InputError(
            f"{where}: unknown model_type {model_type!r} ({closest})",
            hint=f"supported: {', '.join(ARCHITECTURES)}; `mlc_compile list models` says more",
        )
    return architecture
