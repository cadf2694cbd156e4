"""What a target offers the compiler: kernels for the operations that the fusing passes look for.

A kernel is a PrimFunc called in destination-passing style (call_tir). `None` means that the target
has none for this case; the operation then stays as it is and is lowered by TVM's generic rules,
slowly but correctly. Activations are [n, features]; `rows` is 1 or None, None being a symbolic n.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from mlc_compile.quantization.scheme import QuantScheme

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc
else:  # TVM is imported only where graphs are built
    PrimFunc = Any


FLOATS = ("float32", "float16", "bfloat16")


def along(scheme: QuantScheme, k: int) -> QuantScheme:
    """`scheme` for rows of `k` elements: one scale a row becomes a group as long as the row (filled
    up to whole words), so that nothing else has to tell the two apart."""
    return replace(scheme, group_size=scheme.group_of(k), overrides=())


def packed_shapes(scheme: QuantScheme, n: int, k: int) -> list[tuple[str, tuple[int, int], str]]:
    """Name, shape and dtype of the tensors of a packed weight [n, k], in argument order."""
    found: list[tuple[str, tuple[int, int], str]] = [
        ("q_weight", (n, scheme.num_words(k)), scheme.storage_dtype),
        ("q_scale", (n, scheme.num_groups(k)), scheme.model_dtype),
    ]
    if scheme.has_zeros:
        found.append(("q_zero", (n, scheme.num_zero_words(k)), scheme.storage_dtype))
    if scheme.layout == "KN":
        return [(name, (width, n), dtype) for name, (_, width), dtype in found]
    return found


@dataclass(frozen=True)
class LinearSpec:
    """One matmul, y = x W^T with what is fused into it, and the buffers of its kernel.

    In order: x is replaced by its norm, multiplied, the bias is added, the activation is applied,
    the residual is added; all of it in float32, rounded once to `out_dtype`. The norm alone may be
    rounded to `x_dtype` before the product. `arguments` lists the kernel's buffers.

    in_features (K), out_features (N): of the weight as the model sees it, without padding.
    scheme: how the weight is packed, None for a plain [N, K] weight. `scheme.layout` is that of
        this weight: `dataclasses.replace(scheme, layout="NK")` for a tied embedding of a "KN" one.
        What is given is taken `along` K: `scheme.group_size` is never 0.
    weight_dtype: of a plain weight; packed weights are uint32, scales `scheme.model_dtype`.
    bias_dtype: dtype of the bias when `has_bias`; x_dtype when None.
    rows: 1 for the GEMV kernel, None for any number n >= 1 of rows (a symbolic int64).
    norm_eps: x is first replaced by x / sqrt(mean(x^2) + norm_eps) * norm_weight over its last
        axis, norm_weight being [K] of `x_dtype`; None is no norm.
    activation: "silu": the weight's rows (and the bias) are those of a gate, then as many of an up
        projection, and the output is silu(gate) * up, of half the width; None is neither.
    residual: the output is residual + product, the residual being [n, N] of `out_dtype`.

    The last three (`fused`) are asked for with rows == 1 only; a target without such kernels
    answers None, and the operations stay apart.
    """

    in_features: int
    out_features: int
    scheme: QuantScheme | None
    x_dtype: str
    out_dtype: str
    has_bias: bool = False
    rows: int | None = None
    weight_dtype: str | None = None
    bias_dtype: str | None = None
    norm_eps: float | None = None
    residual: bool = False
    activation: str | None = None

    def __post_init__(self) -> None:
        if (self.scheme is None) == (self.weight_dtype is None):
            raise ValueError("give either a scheme or a weight_dtype")
        if self.scheme is not None and self.scheme.is_plain:
            raise ValueError(f"{self.scheme.name} packs nothing: give weight_dtype instead")
        if self.scheme is not None:
            object.__setattr__(self, "scheme", along(self.scheme, self.in_features))
        if self.rows not in (1, None):
            raise ValueError(f"rows must be 1 or None, not {self.rows}")
        for dtype in (self.x_dtype, self.out_dtype, self.weight_dtype, self.bias_dtype):
            if dtype is not None and dtype not in FLOATS:
                raise ValueError(f"{dtype} is not one of {', '.join(FLOATS)}")
        if self.norm_eps is not None and not self.norm_eps >= 0:
            raise ValueError(f"norm_eps must not be negative: {self.norm_eps}")
        if self.activation not in (None, "silu"):
            raise ValueError(f"no activation {self.activation!r}, only 'silu'")
        if self.activation is not None and self.out_features % 2:
            raise ValueError(f"{self.out_features} rows are no gate and up of the same size")
        if self.activation is not None and self.residual:
            raise ValueError("a gated product has no residual")

    @property
    def fused(self) -> bool:
        """Whether more than a product and its bias is asked for."""
        return self.norm_eps is not None or self.residual or self.activation is not None

    @property
    def out_width(self) -> int:
        """Columns of the output: N, or half of it for a gated product."""
        return self.out_features if self.activation is None else self.out_features // 2

    def arguments(self, rows: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """Name, shape and dtype of every buffer of the kernel, in order; `rows` is n."""
        found: list[tuple[str, tuple[Any, ...], str]]
        found = [("x", (rows, self.in_features), self.x_dtype)]
        if self.norm_eps is not None:
            found.append(("norm_weight", (self.in_features,), self.x_dtype))
        found += self.weight_shapes()
        if self.has_bias:
            found.append(("bias", (self.out_features,), self.bias_dtype or self.x_dtype))
        if self.residual:
            found.append(("residual", (rows, self.out_width), self.out_dtype))
        return [*found, ("out", (rows, self.out_width), self.out_dtype)]

    def weight_shapes(self) -> list[tuple[str, tuple[int, int], str]]:
        """Name, shape and dtype of the weight's buffers, in argument order (MLC's format)."""
        n, k = self.out_features, self.in_features
        if self.scheme is None:
            assert self.weight_dtype is not None
            return [("weight", (n, k), self.weight_dtype)]
        return packed_shapes(self.scheme, n, k)


@dataclass(frozen=True)
class ExpertLinearSpec:
    """y[p] = x W[e]^T for every pair p of a token and an expert e chosen for it; its buffers.

    Pair p is token p // per_token and its slot p % per_token. Sums are float32, rounded once to
    `out_dtype`.

    experts (E), in_features (K), out_features (N): of the weight [E, N, K].
    per_token: experts of a token.
    shared_x: x has one row for each token, else one for each pair.
    scheme: how the weight is packed, None for a plain one; always in layout "NK", an expert being N
        further rows.
    weight_dtype: of a plain weight; packed weights are uint32, scales `scheme.model_dtype`.
    rows: tokens: 1, or None for any number n >= 1 (a symbolic int64).
    """

    experts: int
    per_token: int
    in_features: int
    out_features: int
    scheme: QuantScheme | None
    x_dtype: str
    out_dtype: str
    shared_x: bool = True
    rows: int | None = None
    weight_dtype: str | None = None

    def __post_init__(self) -> None:
        # refuses dtypes and schemes that it does not know
        object.__setattr__(self, "scheme", self.linear(self.rows).scheme)
        if self.scheme is not None and self.scheme.layout != "NK":
            raise ValueError("experts are packed in layout NK")
        if self.per_token < 1 or self.experts < 1:
            raise ValueError(f"{self.per_token} of {self.experts} experts")

    def linear(self, rows: int | None) -> LinearSpec:
        """The product with one expert."""
        return LinearSpec(
            self.in_features,
            self.out_features,
            self.scheme,
            self.x_dtype,
            self.out_dtype,
            rows=rows,
            weight_dtype=self.weight_dtype,
        )

    def arguments(self, rows: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """Name, shape and dtype of every buffer of the kernel, in order; `rows` is n."""
        pairs = rows * self.per_token
        return [
            ("x", (rows if self.shared_x else pairs, self.in_features), self.x_dtype),
            ("experts", (rows, self.per_token), "int32"),
            *(
                (name, (self.experts, *shape), dtype)
                for name, shape, dtype in self.linear(1).weight_shapes()
            ),
            ("out", (pairs, self.out_features), self.out_dtype),
        ]

    def workspace(self, rows: Any) -> tuple[str, tuple[Any, ...], str]:
        """A table of pairs by expert. A kernel may take it behind its output; it is allocated with
        the graph's tensors, hence part of the memory plan."""
        return ("groups", (4 * self.per_token * rows + 3 * self.experts,), "int32")


@dataclass(frozen=True)
class EmbeddingSpec:
    """A table [vocab, hidden], packed by `scheme` (always in layout "NK") or plain in `dtype`.

    scheme: taken `along` the rows. dtype: of the output, and of a plain table.
    rows: 1, or None for any number n >= 1 of ids (a symbolic int64).
    """

    vocab: int
    hidden: int
    scheme: QuantScheme | None
    dtype: str
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.scheme is not None:
            packed = replace(along(self.scheme, self.hidden), layout="NK")
            object.__setattr__(self, "scheme", packed)

    def table_shapes(self) -> list[tuple[str, tuple[int, int], str]]:
        """Name, shape and dtype of the table's buffers, in argument order."""
        if self.scheme is None:
            return [("weight", (self.vocab, self.hidden), self.dtype)]
        return packed_shapes(self.scheme, self.vocab, self.hidden)


@dataclass(frozen=True)
class LayerNormSpec:
    """A norm over the last axis of x [n, size] or [n, heads, size] that is more than
    x / sqrt(mean(x^2) + eps) * weight of [n, size]: float32 inside, rounded once.

    size, dtype: of a normed row; everything is of this dtype.
    heads: None for x of rank 2.
    weight, bias: whether there are any, [size] both, or [heads * size] where each head has its
        own (`own_tables`).
    centre: the row's mean is subtracted first. The variance is that of the differences.
    added: x is the sum of two tensors, rounded to `dtype` first, and that sum is a second result.
    """

    size: int
    eps: float
    dtype: str
    heads: int | None = None
    weight: bool = True
    bias: bool = True
    own_tables: bool = False
    centre: bool = True
    added: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise ValueError(f"{self.dtype} is not one of {', '.join(FLOATS)}")
        if self.own_tables and self.heads is None:
            raise ValueError("tables for each head of a tensor without heads")

    def arguments(self, rows: Any) -> list[tuple[str, tuple[Any, ...], str]]:
        """Name, shape and dtype of every buffer of the kernel, in order; `rows` is n."""
        shape = (rows, self.size) if self.heads is None else (rows, self.heads, self.size)
        table = (self.size * (self.heads or 1) if self.own_tables else self.size,)
        there = (
            ("x", shape, True),
            ("residual", shape, self.added),
            ("weight", table, self.weight),
            ("bias", table, self.bias),
            ("normed", shape, True),
            ("total", shape, self.added),
        )
        return [(name, extents, self.dtype) for name, extents, given in there if given]


class Kernels(Protocol):
    """One method for each fused operation; see the passes of the same names."""

    def linear(self, spec: LinearSpec) -> PrimFunc | None: ...

    def expert_linear(self, spec: ExpertLinearSpec) -> PrimFunc | None: ...

    def embedding(self, spec: EmbeddingSpec) -> PrimFunc | None: ...

    def rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        """(x [n, size], w [size]) -> [n, size]"""

    def add_rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        """(a [n, size], b [n, size], w [size]) -> norm(a + b) [n, size], a + b [n, size]"""

    def layer_norm(self, spec: LayerNormSpec, rows: int | None) -> PrimFunc | None:
        """`spec.arguments`"""

    def qk_norm(
        self, heads: tuple[int, int, int], eps: float, dtype: str, rows: int | None
    ) -> PrimFunc | None:
        """(qkv [n, q + 2 kv, d], w_q [d], w_k [d]) -> [n, q + 2 kv, d]"""

    def gated(self, activation: str, size: int, dtype: str, rows: int | None) -> PrimFunc | None:
        """(gate_up [n, 2 size]) -> act(gate) * up [n, size]"""
