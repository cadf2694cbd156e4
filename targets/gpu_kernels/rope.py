"""GPU rotary embedding: splits fused q, k, v and rotates q and k.

- One kernel for every RoPE kind: inverse frequencies are a table, half pairing, rotary_dim <= d.
- With a sliding window, keys stay as they are; the attention kernels rotate them. Without
  frequencies all do.
- sin and cos are ours: WGSL promises 11 bits, and nothing for large angles.
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.targets.gpu_kernels import _attention_ir as ir
from mlc_compile.targets.gpu_kernels._attention_ir import Expr, all_of, divide, hold
from mlc_compile.targets.gpu_kernels._emit import each, f32, when
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kv_cache import KVCacheSpec


def split_rotary(spec: KVCacheSpec, device: GPUDevice) -> tirx.PrimFunc:
    """(qkv [T, q + 2 kv, d], position int32 [T], q, k, v, inv_freq or flag); see KVCacheKernels."""
    d, half, window = spec.head_dim, spec.rotary_dim // 2, spec.sliding_window is not None
    q_heads, kv_heads = spec.num_qo_heads, spec.num_kv_heads
    heads = q_heads + 2 * kv_heads
    rotated = q_heads if window else q_heads + kv_heads
    width = d - half  # a thread has a pair of dimensions, or one behind the rotary part

    def body(a: SimpleNamespace) -> None:
        def element(n: Expr) -> None:
            at = hold(divide(n, width))
            i = hold(n - at * width)
            row = hold(divide(at, heads))
            h = hold(at - row * heads)

            def put(e: Expr, value: Expr) -> None:
                value = hold(value)
                with when(h < q_heads):
                    a.q[(row * q_heads + h) * d + e] = value
                with when(all_of(h >= q_heads, h < q_heads + kv_heads)):
                    a.new_k[(row * kv_heads + (h - q_heads)) * d + e] = value
                with when(h >= q_heads + kv_heads):
                    a.new_v[(row * kv_heads + (h - (q_heads + kv_heads))) * d + e] = value

            if not half:
                put(i, a.qkv[at * d + i])
                return
            with when(i < half):
                x, y = hold(a.qkv[at * d + i]), hold(a.qkv[at * d + i + half])
                freq = ir.frequency(spec, i) if window else a.inv_freq[i]
                s, c = ir.sine_and_cosine(hold(tirx.Cast("float32", a.q_position[row]) * freq))
                factor, turns = f32(spec.attention_factor), h < rotated
                put(i, T.Select(turns, factor * (x * c - y * s), x))
                put(i + half, T.Select(turns, factor * (y * c + x * s), y))
            if width > half:
                with when(i >= half):
                    put(i + half, a.qkv[at * d + i + half])

        each(device, a.extent.rows * (heads * width), element)

    last = "apply_rope" if window else "inv_freq"
    name = "kv_split_rotary" + ("_window" if window else "")
    return ir.build(name, spec, f"qkv q_position q new_k new_v {last}", body)
