"""CPU rotary embedding: splits fused q, k, v and rotates q and k.

- cos and sin are computed once for a token and shared by all its heads.
- One kernel for every RoPE kind: inverse frequencies are a table, half pairing, rotary_dim <= d.
- Without rotary dimensions it only splits.
- With a sliding window, keys stay as they are: the runtime numbers tokens within the window, so a
  cached key's position changes as the window slides. The attention kernels rotate them.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from mlc_compile.targets.cpu_kernels._attn_math import cos, f32, lanes_for, sin
from mlc_compile.targets.kv_cache import KVCacheSpec

PARALLEL_TOKENS = 16
"""From this many tokens on, a parallel region costs less than it saves."""


def fill_frequencies(buffer: T.Buffer, inv_freq: tuple[float, ...]) -> None:
    """Emit stores of compile-time frequencies; LLVM turns them into one constant copy."""
    for i, value in enumerate(inv_freq):
        T.buffer_store(buffer, f32(value), [i])


def split_rotary(spec: KVCacheSpec, lanes: int) -> tirx.PrimFunc:
    """(qkv [T, q + 2 kv, d], position int32 [T], q, k, v, inv_freq or flag); see KVCacheKernels."""
    q_heads, kv_heads, d = spec.num_qo_heads, spec.num_kv_heads, spec.head_dim
    heads, half, dtype = q_heads + 2 * kv_heads, spec.rotary_dim // 2, spec.dtype
    factor = spec.attention_factor
    rotated_heads = q_heads + kv_heads if spec.sliding_window is None else q_heads
    half_lanes, all_lanes = lanes_for(half, lanes), lanes_for(d, lanes)
    table = max(half, 1)  # a table that nobody reads has one element
    rest = d - 2 * half
    rest_lanes = lanes_for(rest, lanes) if rest else 1

    @T.macro
    def angles(freq: T.Buffer, position: T.Buffer, c: T.Buffer, s: T.Buffer, t: T.int32) -> None:
        for o in T.serial(half // half_lanes):
            for i in T.vectorized(half_lanes):
                c[o * half_lanes + i] = f32(factor) * cos(
                    T.Cast("float32", position[t]) * freq[o * half_lanes + i]
                )
                s[o * half_lanes + i] = f32(factor) * sin(
                    T.Cast("float32", position[t]) * freq[o * half_lanes + i]
                )

    @T.macro
    def rotate(
        qkv: T.Buffer, out: T.Buffer, c: T.Buffer, s: T.Buffer, t: T.int32, h: T.int32, g: T.int32
    ) -> None:
        if half > 0:
            for o in T.serial(half // half_lanes):
                for i in T.vectorized(half_lanes):
                    e = T.meta_var(o * half_lanes + i)
                    x = T.meta_var(T.Cast("float32", qkv[t, h, e]))
                    y = T.meta_var(T.Cast("float32", qkv[t, h, e + half]))
                    out[t, g, e] = T.Cast(dtype, x * c[e] - y * s[e])
                    out[t, g, e + half] = T.Cast(dtype, y * c[e] + x * s[e])
        if rest > 0:
            for o in T.serial(rest // rest_lanes):
                for i in T.vectorized(rest_lanes):
                    out[t, g, 2 * half + o * rest_lanes + i] = qkv[
                        t, h, 2 * half + o * rest_lanes + i
                    ]

    @T.macro
    def copy(qkv: T.Buffer, out: T.Buffer, t: T.int32, h: T.int32, g: T.int32) -> None:
        for o in T.serial(d // all_lanes):
            for i in T.vectorized(all_lanes):
                out[t, g, o * all_lanes + i] = qkv[t, h, o * all_lanes + i]

    @T.macro
    def token(
        freq: T.Buffer,
        position: T.Buffer,
        qkv: T.Buffer,
        q: T.Buffer,
        k: T.Buffer,
        v: T.Buffer,
        t: T.int32,
    ) -> None:
        c = T.alloc_buffer((table,), "float32")
        s = T.alloc_buffer((table,), "float32")
        if half > 0:
            angles(freq, position, c, s, t)
        for h in T.serial(q_heads):
            rotate(qkv, q, c, s, t, h, h)
        for h in T.serial(kv_heads):
            if rotated_heads > q_heads:
                rotate(qkv, k, c, s, t, q_heads + h, h)
            else:
                copy(qkv, k, t, q_heads + h, h)
            copy(qkv, v, t, q_heads + kv_heads + h, h)

    @T.macro
    def tokens(
        freq: T.Buffer,
        position: T.Buffer,
        qkv: T.Buffer,
        q: T.Buffer,
        k: T.Buffer,
        v: T.Buffer,
        n: T.int32,
    ) -> None:
        if n < PARALLEL_TOKENS:
            for t in T.serial(n):
                token(freq, position, qkv, q, k, v, t)
        else:
            for t in T.parallel(n):
                token(freq, position, qkv, q, k, v, t)

    if spec.sliding_window is None:

        @T.prim_func(s_tir=True)
        def kv_split_rotary(
            var_qkv: T.handle,
            var_position: T.handle,
            var_q: T.handle,
            var_k: T.handle,
            var_v: T.handle,
            var_freq: T.handle,
        ) -> None:
            T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
            n = T.int32()
            position_offset = T.int32()
            qkv = T.match_buffer(var_qkv, (n, heads, d), dtype)
            position = T.match_buffer(var_position, (n,), "int32", elem_offset=position_offset)
            q = T.match_buffer(var_q, (n, q_heads, d), dtype)
            k = T.match_buffer(var_k, (n, kv_heads, d), dtype)
            v = T.match_buffer(var_v, (n, kv_heads, d), dtype)
            freq = T.match_buffer(var_freq, (table,), "float32")
            tokens(freq, position, qkv, q, k, v, n)

        return kv_split_rotary

    @T.prim_func(s_tir=True)
    def kv_split_rotary_window(
        var_qkv: T.handle,
        var_position: T.handle,
        var_q: T.handle,
        var_k: T.handle,
        var_v: T.handle,
        apply_rope: T.int64,
    ) -> None:
        T.func_attr({"tirx.is_scheduled": True, "tirx.noalias": True, "op_pattern": 8})
        n = T.int32()
        position_offset = T.int32()
        qkv = T.match_buffer(var_qkv, (n, heads, d), dtype)
        position = T.match_buffer(var_position, (n,), "int32", elem_offset=position_offset)
        q = T.match_buffer(var_q, (n, q_heads, d), dtype)
        k = T.match_buffer(var_k, (n, kv_heads, d), dtype)
        v = T.match_buffer(var_v, (n, kv_heads, d), dtype)
        freq = T.alloc_buffer((table,), "float32")
        fill_frequencies(freq, spec.inv_freq)
        tokens(freq, position, qkv, q, k, v, n)

    return kv_split_rotary_window
