"""The paged KV cache of a compiled model: its creation in the graph, kernels included.

- `create_kv_cache` emits the runtime's cache constructor with the kernels of one target.
- RoPE is a table of inverse frequencies, so every RoPE kind takes the same kernels.
- Full attention or one sliding window for all layers, decided when compiling. The caller's
  `support_sliding_window` and `page_size` are not consulted: kernels made for one choice cannot
  serve another.
"""

from __future__ import annotations

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax, tirx
from tvm.relax.frontend.nn.llm.kv_cache import AttnKind, PagedKVCache, RopeMode

from mlc_compile.errors import InputError
from mlc_compile.targets.kv_cache import PAGE_SIZE, KernelFactory, KVCacheKernels, KVCacheSpec

__all__ = [
    "PAGE_SIZE",
    "KVCacheKernels",
    "KVCacheSpec",
    "KernelFactory",
    "PagedKVCache",
    "create_kv_cache",
]


def create_kv_cache(
    *,
    kernels: KernelFactory,
    num_layers: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: str,
    inv_freq: NDArray[np.float32],
    attention_factor: float,
    max_batch_size: tirx.Var,
    max_total_seq_len: tirx.Var,
    prefill_chunk_size: tirx.Var,
    page_size: tirx.Var,
    support_sliding_window: tirx.Var,
    sliding_window: int | None = None,
    attention_sink: int = 0,
    softcap: float | None = None,
    layer_window: int | None = None,
) -> PagedKVCache:
    """Emit a paged KV cache; to be called in a method exported through `nn.spec`.

    The five symbolic sizes are the arguments of MLC's `create_tir_paged_kv_cache`. Where
    `sliding_window` is set, the caller of the library must enable that window and sink for each
    sequence (`attention_kv_cache_enable_sliding_window_for_seq`) before its first token, or the
    cache grows without bound; with full attention the runtime refuses that call.

    Exactness of the window: distance < window holds for every token, however the text is cut into
    chunks, as long as the runtime kept the tokens. It does not after `popn` of n > 1 tokens of a
    text longer than the window (n - 1 of the oldest are gone; enabling a window larger by n - 1
    keeps them), nor where the window is enabled on a sequence that was forked before (its shared
    prefix never slides).

    Args:
        kernels: makes the kernels of the target for these numbers.
        inv_freq: float32 [rotary_dim / 2], radians per token; empty where the cache rotates
            nothing.
        attention_factor: scale of cos and sin.
        sliding_window: tokens that a token attends, itself included; None is full attention.
        attention_sink: first tokens that stay visible, counted in the window.
        softcap, layer_window: as in `KVCacheSpec`.

    Raises:
        InputError: the numbers do not fit together, or the table's dtype or rank is wrong.
    """
    if inv_freq.dtype != np.float32 or inv_freq.ndim != 1:
        raise InputError(
            f"inv_freq must be float32 of rank 1, got {inv_freq.dtype} {inv_freq.shape}"
        )
    spec = KVCacheSpec(
        num_layers=num_layers,
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        inv_freq=tuple(float(x) for x in inv_freq),
        attention_factor=attention_factor,
        sliding_window=sliding_window,
        attention_sink=attention_sink,
        softcap=softcap,
        layer_window=layer_window,
    )
    made = kernels(spec)
    builder = relax.BlockBuilder.current()
    window = sliding_window is not None

    def add(kernel: tirx.PrimFunc) -> relax.Expr:
        return builder.add_func(kernel, kernel.attrs["global_symbol"])

    def backend(kernel: tirx.PrimFunc | None) -> relax.Expr:
        if kernel is None:
            return relax.Tuple([])
        return relax.Tuple([tvm.ir.StringImm("tirx"), add(kernel)])

    paged, decode = backend(made.prefill_paged), backend(made.decode)
    none = relax.Tuple([])
    # The runtime takes the table only where it does not rotate cached keys itself.
    table_values = inv_freq if len(inv_freq) else np.zeros(1, np.float32)
    table = relax.prim_value(0) if window else relax.const(table_values, "float32")
    args = [
        relax.ShapeExpr(
            [max_batch_size, max_total_seq_len, prefill_chunk_size, PAGE_SIZE, int(window)]
        ),
        relax.ShapeExpr([0, num_layers]),
        relax.prim_value(num_qo_heads),
        relax.prim_value(num_kv_heads),
        relax.prim_value(head_dim),
        relax.prim_value(head_dim),
        relax.ShapeExpr([int(AttnKind.MHA)] * num_layers),
        relax.prim_value(False),  # KV transfer between machines
        relax.prim_value(int(RopeMode.NORMAL)),
        relax.prim_value(1),  # rope_scale and rope_theta: the table says it all
        relax.prim_value(10000),
        table,
        relax.op.zeros((), dtype),
        add(made.transpose_append),
        none,  # MLA append
        backend(made.prefill_ragged),
        none if window else paged,
        none if window else decode,
        paged if window else none,
        decode if window else none,
        backend(made.tree_paged),
        backend(made.tree_ragged),
        none,  # MLA prefill
        relax.Tuple([add(made.merge_state)]),
        add(made.split_rotary),
        add(made.copy_single_page),
        add(made.debug_get_kv),
        add(made.compact_copy),
    ]
    return PagedKVCache(
        _expr=relax.call_pure_packed(
            "vm.builtin.paged_attention_kv_cache_create", *args, ty_args=relax.AnyType()
        ),
        _name="paged_kv_cache",
    )
