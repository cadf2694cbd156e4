"""Every architecture we compile, keyed by config.json's `model_type`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from mlc_compile.errors import InputError
from mlc_compile.models import (
    alibi,
    baichuan,
    chatglm,
    cohere,
    exaone,
    gemma,
    glm,
    gpt,
    internlm,
    kin,
    llama,
    minicpm,
    moe,
    neox,
    olmo,
    opt,
    phi,
    qwen,
    smollm,
    stablelm,
)
from mlc_compile.models.spec import Architecture

FAMILIES = (
    llama,
    qwen,
    moe,
    internlm,
    baichuan,
    chatglm,
    minicpm,
    gpt,
    neox,
    stablelm,
    kin,
    opt,
    alibi,
    gemma,
    cohere,
    olmo,
    smollm,
    exaone,
    phi,
    glm,
)
"""The modules that declare architectures; every `Architecture` in them is registered."""


def _by_name(architectures: Iterable[Architecture]) -> Mapping[str, Architecture]:
    table: dict[str, Architecture] = {}
    for architecture in architectures:
        # a family may import another's declaration to differ from it
        if table.setdefault(architecture.name, architecture) is not architecture:
            raise ValueError(f"architecture {architecture.name!r} is registered twice")
    return MappingProxyType(table)


ARCHITECTURES: Mapping[str, Architecture] = _by_name(
    value
    for family in FAMILIES
    for value in vars(family).values()
    if isinstance(value, Architecture)
)


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
