"""The kernels of a paged KV cache on NVIDIA GPUs: those of CUDA C++ where there is one, else the
portable ones (sliding windows, trees, copies)."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.targets.cuda_kernels import attention_decode, attention_prefill
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.gpu_kernels.attention import gpu_kv_cache_kernels
from mlc_compile.targets.gpu_kernels.device import GPUDevice
from mlc_compile.targets.kv_cache import KVCacheKernels, KVCacheSpec


def cuda_kv_cache_kernels(
    spec: KVCacheSpec, *, archs: CudaArchs, device: GPUDevice
) -> KVCacheKernels:
    """Kernels for devices of these architectures; `device` is what the portable ones may use.

    Raises:
        InputError: the portable kernels have no room for a head.
    """
    own = {
        "split_rotary": attention_decode.split_rotary(spec, archs),
        "transpose_append": attention_decode.transpose_append(spec, archs),
        "merge_state": attention_decode.merge_state(spec, archs),
        "decode": attention_decode.decode(spec, archs),
        "prefill_ragged": attention_prefill.prefill(spec, paged=False, archs=archs),
        "prefill_paged": attention_prefill.prefill(spec, paged=True, archs=archs),
    }
    found = {name: kernel for name, kernel in own.items() if kernel is not None}
    return replace(gpu_kv_cache_kernels(spec, device=device), **found)
