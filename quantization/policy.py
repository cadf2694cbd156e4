"""Which parameter is packed, and the names, shapes and dtypes it is stored under.

Names and shapes: notes/mlc-format.md, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlc_compile.models.params import ParamSpec
from mlc_compile.quantization.scheme import Layout, QuantScheme, numpy_dtype


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
    """Whether `scheme` packs this parameter; norms, biases and routers never are."""
    if scheme.is_plain:
        return False
    return {
        "linear": True,
        "expert": True,
        "embedding": scheme.quantize_embedding,
        "lm_head": scheme.quantize_lm_head,
    }.get(spec.role, False)


def stored_layout(spec: ParamSpec, scheme: QuantScheme) -> Layout:
    """The layout of a packed parameter; an embedding is gathered by row and experts by block of
    rows, so they are always "NK"."""
    return "NK" if spec.role in ("embedding", "expert") else scheme.layout


def stored_params(spec: ParamSpec, scheme: QuantScheme) -> tuple[StoredParam, ...]:
    """What is stored for `spec`: itself in the model dtype, or ("X.q_weight", "X.q_scale").

    Shapes for a weight [N, K] of w words and g groups a row: [N, w] and [N, g]; in layout "KN"
    [w, N] and [g, N]. Experts' [E, N, K] are [E, N, w] and [E, N, g].
    """
    if not is_quantized(spec, scheme):
        return (StoredParam(spec.name, spec.shape, scheme.model_dtype),)
    *rows, k = spec.shape
    words, groups = scheme.num_words(k), scheme.num_groups(k)
    layout = stored_layout(spec, scheme)
    base = spec.name.removesuffix(".weight")
    return (
        StoredParam(
            f"{base}.q_weight",
            (*rows, words) if layout == "NK" else (words, *rows),
            scheme.storage_dtype,
            f"int{scheme.bits},group={scheme.group_size},{layout}",
        ),
        StoredParam(
            f"{base}.q_scale",
            (*rows, groups) if layout == "NK" else (groups, *rows),
            scheme.model_dtype,
        ),
    )
