"""What a paged KV cache asks of a target: the shapes it is built for and the kernels it calls.

- `KVCacheSpec` holds the numbers of one cache; `KVCacheKernels` the PrimFuncs that serve it.
- A target offers one `KernelFactory`; `mlc_compile.nn.kv_cache.create_kv_cache` calls it.
- Buffer arguments and their order are fixed by TVM's runtime (paged_kv_cache.cc, attn_backend.h);
  what the cache pages hold inside is the target's own business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mlc_compile.errors import InputError

if TYPE_CHECKING:
    from tvm.tirx import PrimFunc
else:  # TVM is imported only where graphs are built
    PrimFunc = Any

PAGE_SIZE = 16
"""Tokens in a page. The runtime does not forward the size to attention kernels, so it is fixed."""

CACHE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class KVCacheSpec:
    """The numbers a set of KV cache kernels is compiled for.

    Attributes:
        inv_freq: rotary inverse frequencies in radians per token, rotary_dim / 2 of them
            (float32 values); dimension i rotates with dimension i + rotary_dim / 2. None of them:
            the cache rotates nothing.
        attention_factor: multiplies cos and sin (yarn, longrope), so q.k by its square.
        sliding_window: a token attends itself and the tokens less than this many positions back;
            None is full attention. With sinks the window includes them: `attention_sink` first
            tokens and the `sliding_window - attention_sink` last ones.
        softcap: scores become softcap * tanh(score / softcap) before the softmax.
        layer_window: the window, counted likewise, of those layers whose `sm_scale` is passed
            negative; the cache keeps every token, for the others.
    """

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0
    sliding_window: int | None = None
    attention_sink: int = 0
    softcap: float | None = None
    layer_window: int | None = None

    def __post_init__(self) -> None:
        if self.num_qo_heads % self.num_kv_heads:
            raise InputError(
                f"{self.num_qo_heads} query heads do not divide into {self.num_kv_heads} KV heads"
            )
        if self.rotary_dim > self.head_dim:
            raise InputError(f"rotary_dim {self.rotary_dim} exceeds head_dim {self.head_dim}")
        if self.dtype not in CACHE_DTYPES:
            raise InputError(
                f"a KV cache of dtype {self.dtype!r} is not supported",
                hint=f"use one of {', '.join(CACHE_DTYPES)}",
            )
        if self.softcap is not None and not self.softcap > 0:
            raise InputError(f"softcap {self.softcap} must be above 0")
        if self.layer_window is not None and self.sliding_window is not None:
            raise InputError("a window over all layers and one over some exclude each other")
        if self.sliding_window is None:
            if self.attention_sink:
                raise InputError("attention sinks need a sliding window")
        elif not 0 <= self.attention_sink < self.sliding_window:
            raise InputError(
                f"attention_sink_size {self.attention_sink} must be less than "
                f"sliding_window_size {self.sliding_window}"
            )

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_qo_heads // self.num_kv_heads


@dataclass(frozen=True)
class KVCacheKernels:
    """The kernels of one cache, in destination-passing style; arguments as the runtime passes them.

    T is tokens of this round, B sequences, P pages, n cached rows. `length_info` is [B] (slots used
    in the last page) or, with a sliding window, [3, B] (also window offset and sink length).
    `lse` is the base-2 logarithm of the softmax sum, scale included; a row with no key gives output
    0 and a very negative finite lse.

    - split_rotary(qkv [T, q + 2 kv, d], position [T], q, k, v, x): without a sliding window `x` is
      inv_freq as a float32 tensor (one element that nobody reads where there are none); with one
      it is an int64 flag and the table is compiled in.
    - transpose_append(pages [P, 2, kv, 16, d], k [T, kv, d], v, slot [T] or -1)
    - prefill_ragged(q, qo_indptr, k, v, kv_indptr, q_position, k_position_offset, out, lse, causal,
      rotary_mode, rope_scale, rope_theta, sm_scale)
    - prefill_paged(q, qo_indptr, pages, page_indptr, page_indices, length_info, k_position_offset,
      q_position, out, lse, causal, rotary_mode, rope_scale, rope_theta, sm_scale)
    - decode(q, pages, page_indptr, page_indices, length_info, k_position_offset, q_position, out,
      lse, rotary_mode, rope_scale, rope_theta, sm_scale)
    - tree_paged(… as prefill_paged without causal …, sm_scale, tree_indptr, tree_order [m, 2])
    - tree_ragged(q, qo_indptr, k, v, kv_indptr, q_position, tree_indptr, tree_order, out, lse,
      rotary_mode, rope_scale, rope_theta, sm_scale); both None with a sliding window, which the
      runtime refuses for trees; tree_paged also with a layer window where a kernel may have fewer
      than 12 buffers
    - merge_state(out [T, q, d], lse [T, q], other_out, other_lse): into the first two
    - copy_single_page(pages, source_page, target_page, length)
    - debug_get_kv(pages, slot [n], k [layers, n, kv, d], v, layer)
    - compact_copy(pages, copy_indptr [B + 1], source_and_target_slot [2, m], B)
    """

    split_rotary: PrimFunc
    transpose_append: PrimFunc
    prefill_ragged: PrimFunc
    prefill_paged: PrimFunc
    decode: PrimFunc
    tree_paged: PrimFunc | None
    tree_ragged: PrimFunc | None
    merge_state: PrimFunc
    copy_single_page: PrimFunc
    debug_get_kv: PrimFunc
    compact_copy: PrimFunc


class KernelFactory(Protocol):
    """What a target offers: kernels for a cache of these numbers."""

    def __call__(self, spec: KVCacheSpec) -> KVCacheKernels: ...
