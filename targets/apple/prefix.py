"""System-library prefixes: what keeps several models in one app apart.

An iOS app is linked statically, so a runtime finds a model by symbols that carry its prefix.
MLC's runtime, asked for the model library `system://NAME`, looks for the prefix NAME with `-`
written as `_`, and one `_` more.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlc_compile.errors import InputError

MIN_BYTES = 8
"""A shorter string is stored inline by tvm-ffi, which TVM 0.27's code generator cannot read."""
_MAX_BYTES = 128


def check_prefix(prefix: str, what: str = "--system-lib-prefix") -> str:
    """The prefix, if a library can be registered under it and found again; `what` names it.

    Raises:
        InputError: says what is wrong and a prefix that would do.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", prefix):
        raise InputError(
            f"{what} {prefix!r} is part of C symbols and may hold only letters, digits and _",
            hint=f"write {_mended(prefix)}",
        )
    if not prefix.endswith("_"):
        raise InputError(
            f"{what} {prefix!r} must end in _: for system://NAME a runtime looks for NAME_",
            hint=f"write {_mended(prefix)}",
        )
    if len(prefix) < MIN_BYTES:
        raise InputError(
            f"{what} {prefix!r} has {len(prefix)} characters and {MIN_BYTES} are the least",
            hint=f"write for example {_mended(prefix)}",
        )
    if len(prefix) > _MAX_BYTES:
        raise InputError(f"{what}: {len(prefix)} characters, and {_MAX_BYTES} are the most")
    return prefix


def _mended(prefix: str) -> str:
    """A valid prefix that resembles this one."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", prefix).strip("_") or "model"
    if name[0].isdigit():
        name = f"_{name}"
    if len(name) + 1 < MIN_BYTES:
        name += "_model" if len(name) > 1 else "_my_model"
    return f"{name}_"


def derived_prefix(model_type: str, quantization: str, identity: Mapping[str, Any]) -> str:
    """`{model_type}_{quantization}_{16 hex digits}_`; the digits are those of `identity`, whatever
    makes this library another than the next of the same model type."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = re.sub(r"[^A-Za-z0-9_]", "_", f"{model_type}_{quantization}_{digest}_")
    return name if not name[0].isdigit() else f"_{name}"


def prefix_of(model_lib: str) -> str:
    """The prefix that MLC's runtime looks for when asked for `system://model_lib`."""
    return model_lib.replace("-", "_") + "_"


def model_lib_of(prefix: str) -> str:
    """What to write after `system://`, in an app's configuration, for a prefix."""
    return prefix.removesuffix("_")


def check_distinct(prefixes: Sequence[tuple[str, str]]) -> None:
    """Refuse (owner, prefix) pairs whose symbols could be the same.

    `a_` and `a_b_` clash too: `a_` + `b_f` is `a_b_` + `f`.

    Raises:
        InputError: names both owners.
    """
    ordered = sorted(prefixes, key=lambda pair: pair[1])
    for (owner, prefix), (other, longer) in itertools.pairwise(ordered):
        if not longer.startswith(prefix):
            continue
        said = "the same" if longer == prefix else "the beginning of"
        raise InputError(
            f"the prefix of {owner}, {prefix!r}, is {said}"
            + (f" as that of {other}" if longer == prefix else f" that of {other}, {longer!r}"),
            hint="give each model a model_lib of its own",
        )
