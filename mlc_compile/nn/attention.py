"""Grouped-query attention over the paged KV cache, the one module of `models.spec.GroupedQuery`."""

from __future__ import annotations

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.nn.kv_cache import PagedKVCache


class GroupedQueryAttention(nn.Module):
    """Fused q/k/v projection, optional norms of q and k per head, RoPE and attention in the cache.

    Ainslie et al., "GQA", 2023. The q/k norms are those of Qwen3 and come before RoPE.
    """

    def __init__(
        self,
        qkv_proj: nn.Module,
        q_norm: nn.Module | None,
        k_norm: nn.Module | None,
        o_proj: nn.Module,
        heads: tuple[int, int, int],
    ) -> None:
        self.qkv_proj = qkv_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.o_proj = o_proj
        self.num_q_heads, self.num_kv_heads, self.head_dim = heads

    def forward(self, x: Tensor, cache: PagedKVCache, layer: int) -> Tensor:
        """x: [n, hidden] -> [n, hidden]."""
        n = x.shape[0]
        q, kv, d = self.num_q_heads, self.num_kv_heads, self.head_dim
        qkv = op.reshape(self.qkv_proj(x), (n, q + 2 * kv, d))  # heads of q, then k, then v
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = op.split(qkv, [q, q + kv], axis=1)
            qkv = op.concat([self.q_norm(queries), self.k_norm(keys), values], dim=1)
        out = attend(cache, layer, qkv, num_q_heads=q, scale=d**-0.5)  # [n, q, d]
        return self.o_proj(op.reshape(out, (n, q * d)))


def attend(
    cache: PagedKVCache, layer: int, qkv: Tensor, *, num_q_heads: int, scale: float
) -> Tensor:
    """Rotate q and k, append k and v to the cache, attend: [n, q + 2 kv, d] -> [n, q, d].

    The same runtime call as PagedKVCache.attention_with_fused_qkv without its detour over four
    dimensions.
    """
    n, _, d = qkv.shape
    call = relax.call_dps_packed(
        "vm.builtin.attention_kv_cache_attention_with_fused_qkv",
        [cache._expr, relax.prim_value(layer), relax.prim_value(scale), qkv._expr],
        out_ty=relax.TensorType((n, num_q_heads, d), qkv.dtype),
    )
    return Tensor(_expr=relax.BlockBuilder.current().emit(call))
