"""GPU kernels of the paged KV cache: append, attention, merge, copies.

- A page is [2 (key, value)][kv head][16 slots][d], as the runtime's own kernels have it: the keys
  of a page and head lie together, and neighbouring threads read neighbouring dimensions.
- Softmax is online, in base 2, over float32; the cache may be float32 or float16 (bfloat16 where
  the device has it).
- Sliding window: the runtime keeps cached rows without saying their position in the text, and
  numbers them anew as the window slides. So keys are cached unrotated, and attention rotates those
  that it loads. The mask is exact: distance < window.
- A window of some layers hides keys by their positions; all stay cached.
- Nothing assumes lock-step: between a write to shared memory and another thread's read there is a
  barrier, and no thread reads in global memory what another writes in the same launch.
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from mlc_compile.errors import InputError
from mlc_compile.targets.gpu_kernels import _attention_ir as ir
from mlc_compile.targets.gpu_kernels._attention_decode import decode
from mlc_compile.targets.gpu_kernels._attention_ir import THREADS, Expr, divide, hold
from mlc_compile.targets.gpu_kernels._attention_prefill import prefill
from mlc_compile.targets.gpu_kernels._emit import barrier, bind, each, groups, i32, launch, when
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.gpu_kernels.rope import split_rotary
from mlc_compile.targets.kv_cache import PAGE_SIZE, KVCacheKernels, KVCacheSpec

TREE_BUFFERS = 12
"""Buffers that `tree_paged` reads and writes where layers have a window: WebGPU has too few."""


def gpu_kv_cache_kernels(spec: KVCacheSpec, *, device: GPUDevice) -> KVCacheKernels:
    """Kernels for a GPU of these limits.

    Raises:
        InputError: the device has no such dtype, too small groups, or no room for a head.
    """
    if spec.dtype == "bfloat16" and not device.bfloat16:
        raise InputError(
            "this target has no bfloat16, so no KV cache of it",
            hint="use a quantization of float16 or float32, such as q4f16_1 or q4f32_1",
        )
    if device.max_threads < THREADS or device.max_buffers < 10:
        raise InputError(
            f"attention kernels need groups of {THREADS} threads and 10 buffers, the device has "
            f"{device.max_threads} and {device.max_buffers}"
        )
    trees = spec.sliding_window is None
    paged_trees = trees and (spec.layer_window is None or device.max_buffers >= TREE_BUFFERS)
    flat_order = not device.merged_auxiliary

    def attention(*, paged: bool, tree: bool = False) -> tirx.PrimFunc:
        return prefill(spec, device, paged=paged, tree=tree, flat_order=flat_order)

    return KVCacheKernels(
        split_rotary=split_rotary(spec, device),
        transpose_append=_transpose_append(spec, device),
        prefill_ragged=attention(paged=False),
        prefill_paged=attention(paged=True),
        decode=decode(spec),
        tree_paged=attention(paged=True, tree=True) if paged_trees else None,
        tree_ragged=attention(paged=False, tree=True) if trees else None,
        merge_state=_merge_state(spec),
        copy_single_page=_copy_single_page(spec, device),
        debug_get_kv=_debug_get_kv(spec, device),
        compact_copy=_compact_copy(spec, device),
    )


def _cached(spec: KVCacheSpec, slot: Expr, element: Expr) -> Expr:
    """Index of an element [kv, d] of the key in a slot of the whole cache."""
    head = divide(element, spec.head_dim)
    row = ir.page_element(spec, divide(slot, PAGE_SIZE), head, slot)
    return hold(row + ir.remainder(element, spec.head_dim))


def _transpose_append(spec: KVCacheSpec, device: GPUDevice) -> tirx.PrimFunc:
    row = spec.num_kv_heads * spec.head_dim

    def body(a: SimpleNamespace) -> None:
        def element(n: Expr) -> None:
            token = hold(divide(n, row))
            slot = bind(a.slot[token])
            with when(slot >= 0):
                at = _cached(spec, slot, hold(n - token * row))
                a.pages[at] = a.k[n]
                a.pages[at + ir.value_distance(spec)] = a.v[n]

        each(device, a.extent.kv_rows * row, element)

    return ir.build("kv_transpose_append", spec, "pages k v slot", body)


def _debug_get_kv(spec: KVCacheSpec, device: GPUDevice) -> tirx.PrimFunc:
    """With a sliding window keys come as cached: not rotated."""
    row = spec.num_kv_heads * spec.head_dim

    def body(a: SimpleNamespace) -> None:
        count = a.extent.kv_rows * row

        def element(n: Expr) -> None:
            token = hold(divide(n, row))
            at = _cached(spec, a.slot[token], hold(n - token * row))
            a.all_k[a.layer * count + n] = a.pages[at]
            a.all_v[a.layer * count + n] = a.pages[at + ir.value_distance(spec)]

        each(device, count, element)

    return ir.build("kv_debug_get", spec, "pages slot all_k all_v layer", body)


def _copy_single_page(spec: KVCacheSpec, device: GPUDevice) -> tirx.PrimFunc:
    """The whole page: slots from `length` on are overwritten before they are read."""
    size = 2 * ir.value_distance(spec)

    def body(a: SimpleNamespace) -> None:
        def element(n: Expr) -> None:
            a.pages[a.to_page * size + n] = a.pages[a.from_page * size + n]

        each(device, i32(size), element)

    return ir.build("kv_copy_single_page", spec, "pages from_page to_page length", body)


def _compact_copy(spec: KVCacheSpec, device: GPUDevice) -> tirx.PrimFunc:
    """Move accepted tree nodes: sources lie behind targets and are read in ascending order.

    A thread moves one element of all nodes, so that the order holds.
    """
    row = spec.num_kv_heads * spec.head_dim

    def body(a: SimpleNamespace) -> None:
        def element(n: Expr) -> None:
            b = hold(divide(n, row))
            e = hold(n - b * row)
            first = bind(a.copy_indptr[b])
            with T.serial(a.copy_indptr[b + 1] - first) as i:
                source = _cached(spec, a.slots[first + i], e)
                target = _cached(spec, a.slots[a.extent.moves + first + i], e)
                for far in (0, ir.value_distance(spec)):
                    a.pages[target + far] = a.pages[source + far]

        each(device, a.sequences * row, element)

    return ir.build("kv_compact_copy", spec, "pages copy_indptr slots sequences", body)


def _merge_state(spec: KVCacheSpec) -> tirx.PrimFunc:
    """One thread of a row turns its two sums into weights, and is the only one to touch them."""
    d, lanes = spec.head_dim, 32
    height = THREADS // lanes

    def body(a: SimpleNamespace) -> None:
        count = a.extent.rows * spec.num_qo_heads
        with launch(THREADS, groups(count, height)) as (t, x, _):
            weight = ir.shared(2 * height)
            lane, y = ir.remainder(t, lanes), divide(t, lanes)
            row = hold(x * height + y)
            with when(ir.all_of(row < count, lane == 0)):
                mine, other = bind(a.lse[row]), bind(a.other_lse[row])
                high = hold(T.max(mine, other))
                p, q = hold(T.exp2(mine - high)), hold(T.exp2(other - high))
                both = hold(p + q)  # at least 1: one of the two exponents is 0
                a.lse[row] = high + T.log2(both)
                weight[y * 2] = p / both
                weight[y * 2 + 1] = q / both
            barrier()
            with when(row < count):
                p, q = bind(weight[y * 2]), bind(weight[y * 2 + 1])
                for u in range(-(-d // lanes)):
                    at = row * d + (lane + u * lanes)
                    with when(lane + u * lanes < d):
                        a.out[at] = a.out[at] * p + a.other_out[at] * q

    return ir.build("attn_merge_state", spec, "out lse other_out other_lse", body)
