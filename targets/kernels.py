"""What a target offers the compiler: kernels for the operations that the fusing passes look for.

A kernel is a PrimFunc called in destination-passing style (call_tir). `None` means that the target
has none for this case; the operation then stays as it is and is lowered by TVM's generic rules,
slowly but correctly. Activations are [n, features]; `rows` is 1 or None, None being a symbolic n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mlc_compile.quantization.scheme import Layout, QuantScheme

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc
else:  # TVM is imported only where graphs are built
    PrimFunc = Any


@dataclass(frozen=True)
class LinearSpec:
    """x [n, in] -> [n, out] with W [out, in], packed by `scheme` or plain in `weight_dtype`."""

    in_features: int
    out_features: int
    scheme: QuantScheme | None
    layout: Layout  # of the packed weight
    weight_dtype: str
    x_dtype: str
    out_dtype: str
    has_bias: bool
    rows: int | None


@dataclass(frozen=True)
class EmbeddingSpec:
    """ids int32 [n] -> [n, hidden], rows of W [vocab, hidden]."""

    vocab_size: int
    hidden_size: int
    scheme: QuantScheme | None
    dtype: str
    rows: int | None


class Kernels(Protocol):
    """One method for each fused operation; see the passes of the same names."""

    def linear(self, spec: LinearSpec) -> PrimFunc | None: ...

    def embedding(self, spec: EmbeddingSpec) -> PrimFunc | None: ...

    def rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        """(x [n, size], w [size]) -> [n, size]"""

    def add_rms_norm(self, size: int, eps: float, dtype: str, rows: int | None) -> PrimFunc | None:
        """(a [n, size], b [n, size], w [size]) -> norm(a + b) [n, size], a + b [n, size]"""

    def qk_norm(
        self, heads: tuple[int, int, int], eps: float, dtype: str, rows: int | None
    ) -> PrimFunc | None:
        """(qkv [n, q + 2 kv, d], w_q [d], w_k [d]) -> [n, q + 2 kv, d]"""

    def gated(self, activation: str, size: int, dtype: str, rows: int | None) -> PrimFunc | None:
        """(gate_up [n, 2 size]) -> act(gate) * up [n, size]"""

    def add(self, size: int, dtype: str, rows: int | None) -> PrimFunc | None:
        """(a [n, size], b [n, size]) -> a + b"""
