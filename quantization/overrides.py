"""Overrides: which parameters get another scheme than the rest of the model, by patterns of names.

A pattern is the dotted name of a parameter; a leading `model.` and a trailing `.weight` may be left
out. Within a component `*` stands for anything, `0-1` for a whole number of that range, and a last
component `*` for all components that are left:

    lm_head      layers.0-1.*      layers.*.mlp.down_proj      layers.*.self_attn.*      *
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mlc_compile.errors import InputError

Pairs: TypeAlias = Sequence[Sequence[str]]
"""The JSON form: [pattern, scheme name] in order."""

EXAMPLE = "lm_head=q8f16_1,layers.0-1.*=q8f16_1"


@dataclass(frozen=True)
class Override:
    """Parameters whose names match `pattern` are stored as the scheme named `scheme` says."""

    pattern: str
    scheme: str

    def matches(self, name: str) -> bool:
        """Whether this is meant for the parameter called `name`."""
        return _matcher(self.pattern)(_components(name))

    def __str__(self) -> str:
        return f"{self.pattern}={self.scheme}"


def parse_overrides(given: str | Mapping[str, str] | Pairs) -> tuple[Override, ...]:
    """Overrides in order, from `PATTERN=SCHEME,PATTERN=SCHEME`, a mapping, or the JSON form.

    Raises InputError for what is none of these, an impossible pattern, or one that is given twice.
    """
    pairs: list[list[str]]
    if isinstance(given, str):
        items = [item.strip() for item in given.split(",") if item.strip()]
        pairs = [[part.strip() for part in item.split("=")] for item in items]
    elif isinstance(given, Mapping):
        pairs = [list(item) for item in given.items()]
    else:
        pairs = [list(item) if isinstance(item, list | tuple) else [str(item)] for item in given]
    found: dict[str, Override] = {}
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(part, str) and part for part in pair):
            said = "=".join(str(part) for part in pair)
            raise InputError(
                f"the override '{said:.80}' is not PATTERN=SCHEME", hint=f"for example {EXAMPLE}"
            )
        pattern, scheme = pair
        _matcher(pattern)  # a wrong pattern is refused here
        if pattern in found:
            raise InputError(f"the override of '{pattern}' is given twice", hint="keep one of them")
        found[pattern] = Override(pattern, scheme)
    return tuple(found.values())


def _components(name: str) -> tuple[str, ...]:
    return tuple(name.removeprefix("model.").removesuffix(".weight").split("."))


@functools.lru_cache(maxsize=256)
def _matcher(pattern: str) -> Callable[[tuple[str, ...]], bool]:
    """Raises InputError for a pattern that can match no name."""
    if not re.fullmatch(r"[\w*-]+(\.[\w*-]+)*", pattern, re.ASCII):
        raise InputError(
            f"the override pattern '{pattern:.80}' is not a dotted name",
            hint=f"for example {EXAMPLE}",
        )
    wanted = _components(pattern)
    rest = wanted[-1] == "*"
    parts = [_component(part, pattern) for part in (wanted[:-1] if rest else wanted)]

    def matches(name: tuple[str, ...]) -> bool:
        enough = len(name) > len(parts) if rest else len(name) == len(parts)
        return enough and all(part(found) for part, found in zip(parts, name, strict=False))

    return matches


def _component(part: str, pattern: str) -> Callable[[str], bool]:
    limits = re.fullmatch(r"(\d{1,9})-(\d{1,9})", part)
    if limits is not None:
        low, high = int(limits[1]), int(limits[2])
        if low > high:
            raise InputError(
                f"the override pattern '{pattern:.80}' has the empty range {part}",
                hint=f"write {high}-{low}",
            )
        return lambda name: name.isdecimal() and low <= int(name) <= high
    glob = re.compile(".*".join(map(re.escape, part.split("*"))))
    return lambda name: glob.fullmatch(name) is not None
