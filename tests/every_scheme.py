"""A few schemes that together show everything a scheme can differ in.

Tests that take seconds a scheme use these; the registry's own tests (encoding, packing, kernels,
the cpu target's libraries) go over all of `SCHEMES`.
"""

from __future__ import annotations

from mlc_compile.quantization.scheme import SCHEMES, QuantScheme


def _shows(scheme: QuantScheme) -> set[tuple[object, ...]]:
    """What a kernel sees of it: the code, its layout and groups, and the dtype of the model."""
    code = (getattr(scheme, "codes", "symmetric"), scheme.bits)
    return {
        ("code", *code),
        ("layout", scheme.layout),
        ("a group is a row", scheme.group_size == 0 and not scheme.is_plain),
        ("dtype", scheme.model_dtype),
    }


def covering(*first: str, dtypes: tuple[str, ...] | None = None) -> list[str]:
    """Names: `first`, and each further one of SCHEMES that shows something not yet shown."""
    seen = {feature for name in first for feature in _shows(SCHEMES[name])}
    found = list(first)
    for name, scheme in SCHEMES.items():
        able = dtypes is None or scheme.model_dtype in dtypes
        if able and not _shows(scheme) <= seen:
            found.append(name)
            seen |= _shows(scheme)
    return found
