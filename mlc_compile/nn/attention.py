"""Grouped-query attention in the paged KV cache, the module of `models.options.GroupedQuery`."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from mlc_compile.nn.kv_cache import PagedKVCache
from mlc_compile.nn.positions import Penalty, Round, rotate, with_alibi


@dataclass(frozen=True)
class Heads:
    """Numbers of an attention layer.

    Attributes:
        q, kv, size: query heads, KV heads and the dimensions of each.
        scale: of the scores; negative in a windowed layer of a model that has full ones too
            (`targets.kv_cache.KVCacheSpec.layer_window`).
        clip: q, k and v are clipped to [-clip, clip].
        turns: the number of the table that q and k are rotated by here; None leaves it to the
            cache.
        penalty: ALiBi's.
        extra: dimensions that the cache has beside `size`.
    """

    q: int
    kv: int
    size: int
    scale: float
    clip: float | None = None
    turns: int | None = None
    penalty: Penalty | None = None
    extra: int = 0


class GroupedQueryAttention(nn.Module):
    """Fused q/k/v projection, optional norms of q and k, positions, and attention in the cache.

    Ainslie et al., "GQA", 2023. Norms come before the rotation, as in Qwen3, and clipping between
    the two, as in OLMoE.
    """

    def __init__(
        self,
        qkv_proj: nn.Module,
        q_norm: nn.Module | None,
        k_norm: nn.Module | None,
        o_proj: nn.Module,
        heads: Heads,
        *,
        norm_whole: bool = False,
    ) -> None:
        """norm_whole: q and k are normed over all heads together."""
        self.qkv_proj = qkv_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.o_proj = o_proj
        self.heads = heads
        self.norm_whole = norm_whole

    def forward(self, x: Tensor, now: Round, layer: int) -> Tensor:
        """x: [n, hidden] -> [n, hidden]."""
        n, h = x.shape[0], self.heads
        qkv = op.reshape(self.qkv_proj(x), (n, h.q + 2 * h.kv, h.size))  # heads of q, then k, v
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = op.split(qkv, [h.q, h.q + h.kv], axis=1)
            normed = [self._norm(self.q_norm, queries), self._norm(self.k_norm, keys)]
            qkv = op.concat([*normed, values], dim=1)
        if h.clip is not None:
            qkv = Tensor(_expr=relax.BlockBuilder.current().emit(_clip(qkv, h.clip)))
        if h.turns is not None:
            qkv = rotate(qkv, now.turns(h.turns), h.q + h.kv)
        if h.penalty is not None:
            qkv = with_alibi(qkv, now.positions, h.penalty, h.kv, h.scale, h.extra)
        out = attend(now.cache, layer, qkv, num_q_heads=h.q, scale=h.scale)  # [n, q, size]
        if h.extra:
            out, _ = op.split(out, [h.size], axis=2)
        return self.o_proj(op.reshape(out, (n, h.q * h.size)))

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """x: [n, heads, size], as given back."""
        if not self.norm_whole:
            return norm(x)
        n, heads, size = x.shape
        return op.reshape(norm(op.reshape(x, (n, heads * size))), (n, heads, size))


def _clip(x: Tensor, limit: float) -> relax.Expr:
    return relax.op.clip(x._expr, relax.prim_value(-limit), relax.prim_value(limit))


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
