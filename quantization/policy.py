"""Which parameter is packed, and the names, shapes and dtypes it is stored under.

Names and shapes: notes/mlc-format.md, section 2.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlc_compile.errors import InputError
from mlc_compile.models.params import ParamSpec
from mlc_compile.models.spec import Model
from mlc_compile.quantization.overrides import Override, Pairs, parse_overrides
from mlc_compile.quantization.scheme import Layout, QuantScheme, get_scheme, numpy_dtype

QUANTIZABLE = ("linear", "expert", "embedding", "lm_head")
"""Roles that a scheme may pack; norms, biases, positions and routers never are."""


@dataclass(frozen=True)
class StoredParam:
    """One tensor of the parameter files.

    packing: how the elements lie in the words ("int4,group=32,NK"); empty for a plain tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    packing: str = ""

    @property
    def nbytes(self) -> int:
        """Exact size on disk and in memory."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def is_quantized(spec: ParamSpec, scheme: QuantScheme) -> bool:
    """Whether `scheme` packs this parameter, its overrides considered."""
    scheme = scheme.of(spec)
    if scheme.is_plain or spec.role not in QUANTIZABLE:
        return False
    return {
        "embedding": scheme.quantize_embedding,
        "lm_head": scheme.quantize_lm_head,
    }.get(spec.role, True)


def stored_layout(spec: ParamSpec, scheme: QuantScheme) -> Layout:
    """The layout of a packed parameter; an embedding is gathered by row and experts by block of
    rows, so they are always "NK"."""
    return "NK" if spec.role in ("embedding", "expert") else scheme.of(spec).layout


def stored_params(spec: ParamSpec, scheme: QuantScheme) -> tuple[StoredParam, ...]:
    """What is stored for `spec`: itself in the model dtype, or ("X.q_weight", "X.q_scale"), with
    "X.q_zero" behind them where codes are affine.

    Shapes for a weight [N, K] of w words and g groups a row: [N, w] and [N, g]; in layout "KN"
    [w, N] and [g, N]. Experts' [E, N, K] are [E, N, w] and [E, N, g]. Zero points are packed along
    the groups: [N, ceil(g / elems_per_word)].
    """
    scheme = scheme.of(spec)
    if not is_quantized(spec, scheme):
        return (StoredParam(spec.name, spec.shape, scheme.model_dtype),)
    *rows, k = spec.shape
    layout = stored_layout(spec, scheme)
    base = spec.name.removesuffix(".weight")

    def shape(width: int) -> tuple[int, ...]:
        return (*rows, width) if layout == "NK" else (width, *rows)

    code = {"symmetric": f"int{scheme.bits}", "affine": f"uint{scheme.bits}", "e4m3": "e4m3"}
    group = f"group={scheme.group_size}" if scheme.group_size else "per_channel"
    found = [
        StoredParam(
            f"{base}.q_weight",
            shape(scheme.num_words(k)),
            scheme.storage_dtype,
            f"{code[scheme.codes]},{group},{layout}",
        ),
        StoredParam(f"{base}.q_scale", shape(scheme.num_groups(k)), scheme.model_dtype),
    ]
    if scheme.has_zeros:
        words = shape(scheme.num_zero_words(k))
        found.append(
            StoredParam(f"{base}.q_zero", words, scheme.storage_dtype, f"uint{scheme.bits},NK")
        )
    return tuple(found)


def with_overrides(
    scheme: QuantScheme, given: str | Mapping[str, str] | Pairs, model: Model
) -> QuantScheme:
    """`scheme` with overrides for parameters of `model`, in place of those that it has.

    given: `PATTERN=SCHEME,PATTERN=SCHEME`, a mapping, or the JSON form (quantization/overrides.py).

    Raises:
        InputError: names the override that is malformed, has an unknown scheme or one of another
            model dtype, matches no parameter that a scheme may pack, or never comes first.
    """
    overrides = parse_overrides(given)
    names = [spec.name for spec in model.parameters() if spec.role in QUANTIZABLE]
    left = set(names)
    for override in overrides:
        other = get_scheme(override.scheme)
        if other.model_dtype != scheme.model_dtype:
            raise InputError(
                f"the override {override} computes in {other.model_dtype} and {scheme.name} in "
                f"{scheme.model_dtype}",
                hint=f"take a scheme of {scheme.model_dtype}; see `list quantizations`",
            )
        matched = {name for name in names if override.matches(name)}
        if not matched:
            raise _no_match(override, model, names)
        if not matched & left:
            raise InputError(
                f"the override {override} changes nothing: earlier ones take all that it matches",
                hint="put it before them; the first match counts",
            )
        left -= matched
    return replace(scheme, overrides=overrides)


def _no_match(override: Override, model: Model, names: list[str]) -> InputError:
    said = f"the override {override} matches no parameter that a scheme may pack"
    if model.config.tie_word_embeddings and override.matches("lm_head.weight"):
        return InputError(
            f"{said}: this model's output layer is its embedding (tie_word_embeddings)",
            hint=f"write embed_tokens={override.scheme}, which holds both",
        )
    short = [name.removeprefix("model.").removesuffix(".weight") for name in names]
    close = difflib.get_close_matches(override.pattern, short, n=3, cutoff=0.3) or short[:3]
    return InputError(said, hint=f"names are like {', '.join(close)}")
