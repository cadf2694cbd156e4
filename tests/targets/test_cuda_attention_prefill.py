"""The CUDA prefill attention: what it serves, what it takes, that nvcc compiles it, and what it
computes on the emulated device, as an sm_75 and as an sm_80.

Hopper's own tile is beyond the emulated device: `verify --device cuda` compares it on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import attention_cache
import gpu_library
import numpy as np
import pytest
from test_gpu_attention import Call, causal_mask, indptr

from mlc_compile.runtime import cuda_emulator
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels.attention_prefill import prefill, tiles
from mlc_compile.targets.gpu_kernels.attention import gpu_kv_cache_kernels
from mlc_compile.targets.kv_cache import KVCacheKernels, KVCacheSpec
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.export import source_modules
from mlc_compile.targets.nvidia.toolchain import find_nvcc

EVERY = CudaArchs((75, 80, 90))
OLD_AND_NEW = CudaArchs((75, 80))
HEADS = (64, 80, 96, 128, 256)
SHARED_BYTES = {75: 48 << 10, 80: 99 << 10, 90: 227 << 10}
"""What a block may take: without asking for more on sm_75, of sm_86 for all from sm_80 on."""


def numbers(q: int, kv: int, d: int, dtype: str = "float16", **more: Any) -> KVCacheSpec:
    return KVCacheSpec(2, q, kv, d, dtype, tuple(np.linspace(1, 0.1, d // 2).tolist()), **more)


@pytest.mark.parametrize("paged", [False, True])
def test_what_the_portable_kernels_serve(paged: bool) -> None:
    spec = numbers(6, 2, 64)

    def serves(spec: KVCacheSpec, archs: CudaArchs = EVERY) -> bool:
        return prefill(spec, paged=paged, archs=archs) is not None

    assert serves(spec)
    assert serves(replace(spec, dtype="bfloat16"), CudaArchs((80, 90)))
    assert not serves(replace(spec, dtype="bfloat16"))
    assert not serves(replace(spec, dtype="float32"))
    assert not serves(replace(spec, sliding_window=40))
    assert serves(replace(spec, softcap=30.0, layer_window=40))
    assert not serves(numbers(6, 2, 40))
    assert not serves(numbers(2, 2, 272))


@pytest.mark.parametrize("d", [16, *HEADS, 192])
@pytest.mark.parametrize("archs", [(75,), (80,), (90,), (75, 80, 90), (80, 120)])
@pytest.mark.parametrize("paged", [False, True])
def test_a_tile_for_every_device(paged: bool, archs: tuple[int, ...], d: int) -> None:
    found = tiles(d, CudaArchs(archs), paged=paged)
    for least, tile in found:
        assert tile.shared_bytes <= SHARED_BYTES[max(least, 75)]
    # PTX for 90 is not sm_90a's: a device after Hopper takes another tile.
    assert min(least for least, _ in found) <= min(archs[0], 80)
    assert (found[0][0] == 90) == (90 in archs and d in (64, 128))


CASES = [("float16", 128)]
MORE = [("float16", 64), ("float16", 80), ("bfloat16", 96), ("bfloat16", 128), ("float16", 256)]


BOUNDED = {"softcap": 50.0, "layer_window": 64}


@pytest.mark.parametrize(
    ("dtype", "d", "more"),
    [
        *((*case, {}) for case in CASES),
        *(pytest.param(*case, {}, marks=pytest.mark.slow) for case in MORE),
        pytest.param("float16", 256, BOUNDED, marks=pytest.mark.slow),
        pytest.param("bfloat16", 64, BOUNDED, marks=pytest.mark.slow),
    ],
)
def test_nvcc_compiles_it_for_every_architecture(dtype: str, d: int, more: dict[str, Any]) -> None:
    import tvm

    archs = EVERY if dtype == "float16" else CudaArchs((80, 90))
    kernels = {}
    for paged in (False, True):
        name = f"paged_{paged}"
        kernel = prefill(numbers(6, 2, d, dtype, **more), paged=paged, archs=archs)
        assert kernel is not None
        kernels[name] = kernel.with_attr("global_symbol", name)
    target = {"kind": "cuda", "arch": f"sm_{archs.minimum}", "host": {"kind": "llvm"}}
    with source_modules():
        built = tvm.tirx.build(tvm.IRModule(kernels), target=tvm.target.Target(target))
    source = built.imports[0].inspect_source()
    made = compile_cuda(source, archs.archs, find_nvcc(), report=True)
    entries = made.report.count("Compiling entry function")
    kinds = len(tiles(d, archs, paged=True, plain=not more))
    # Ragged, paged, and paged for a part of the keys; the merge of the parts.
    assert entries == len(archs.archs) * (3 * kinds + 1)


# query heads, KV heads, head size: groups of 1, 3, 4 and 8, and every kind of tile
SHAPES = [(6, 2, 64), (4, 1, 128), (2, 2, 80)]
MORE_SHAPES = [(8, 1, 96), (2, 1, 256), (3, 1, 16), (4, 2, 192)]
on_every_kind = pytest.mark.parametrize("arch", [75, 80])
every_shape = pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in MORE_SHAPES)]
)


@cache
def kernels(spec: KVCacheSpec) -> Any:
    """Both kernels for the two kinds of devices, as the emulated one runs them."""
    made = {str(paged): prefill(spec, paged=paged, archs=OLD_AND_NEW) for paged in (False, True)}
    cuda_emulator.install()
    return gpu_library.loaded(gpu_library.build(gpu_library.DEVICES["cuda"], made))


def attend(
    shape: tuple[int, int, int],
    paged: bool,
    rows: Sequence[int],
    lens: Sequence[int],
    causal: int,
    *,
    spread: int = 1,
    **more: Any,
) -> list[cuda_emulator.Launch]:
    """Compare one call with float64; its launches. Rows that aren't causal lie up to `spread`
    positions behind their keys, in no order; `more` is of the cache, whose window is then used."""
    device = gpu_library.DEVICES["cuda"]
    cuda_emulator.install()
    call = Call(device, numbers(*shape, **more), sum(rows) + sum(lens), rows)
    call.keys(lens)
    scale = -call.scale if "layer_window" in more else call.scale
    tail = (call.out, call.lse, causal, 0, 1.0, 1e4, scale)
    offsets = [7 * i % 30 for i in range(len(lens))]
    positions, visible = [], []
    for n, offset, count in zip(lens, offsets, rows, strict=True):
        at = offset + n - count + np.arange(count)
        if not causal:
            at = offset + n - 1 + call.rng.integers(0, spread, count)
        positions += at.tolist()
        near = at[:, None] - offset - np.arange(n) < more.get("layer_window", np.inf)
        visible.append(causal_mask(count, n, causal) & near)
    run: Callable[..., None] = kernels(call.spec)[str(paged)]
    call.views(indptr(rows))
    if paged:
        pages, page_indptr, ids, last = call.paged()
        for array in (page_indptr, ids, last, offsets, positions):
            call.views(array)
        q_indptr, *views = call.views.tensors()
        keys: tuple[Any, ...] = (pages, *views)
    else:
        for array in (indptr(lens), positions, offsets):
            call.views(array)
        q_indptr, *views = call.views.tensors()
        keys = (*(device.tensor(np.concatenate(x)) for x in (call.k, call.v)), *views)
    with cuda_emulator.record() as launches:
        run(device.tensor(call.q), q_indptr, *keys, *tail)
    call.check(visible)
    return launches


@every_shape
@on_every_kind
@pytest.mark.parametrize("causal", [0, 1])
def test_this_round(arch: int, shape: tuple[int, int, int], causal: int) -> None:
    with cuda_emulator.options(arch=arch, races=True):
        attend(shape, False, [150], [150], causal)
        attend(shape, False, [5, 0, 1, 40], [70, 20, 1, 40], causal)
        attend(shape, False, [3, 4], [0, 4], causal)


@every_shape
@on_every_kind
@pytest.mark.parametrize("causal", [0, 1])
def test_cached_pages(arch: int, shape: tuple[int, int, int], causal: int) -> None:
    with cuda_emulator.options(arch=arch, races=True):
        attend(shape, True, [37], [37], causal)
        attend(shape, True, [5, 0, 1, 70], [90, 20, 0, 33], causal)
        attend(shape, True, [3], [0], causal)


@every_shape
@on_every_kind
def test_few_rows_and_many_keys_are_cut_in_parts(arch: int, shape: tuple[int, int, int]) -> None:
    with cuda_emulator.options(arch=arch, races=True):
        # More than the 512 keys whose page numbers a warp holds; the last part is the shortest.
        for rows, lens, causal in (
            ([3], [1001], 0),
            ([9, 2], [700, 400], 1),
            ([2, 1], [1100, 0], 1),
        ):
            parts, merge = attend(shape, True, rows, lens, causal)
            assert parts.grid[1] > 1 and merge.grid[1] == 1


@every_shape
@on_every_kind
@pytest.mark.parametrize(
    "more",
    [
        {"softcap": 1.5, "layer_window": 40},
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ({"softcap": 1.5}, {"layer_window": 70})
        ),
    ],
)
def test_bounded_scores_and_windows_of_layers(
    arch: int, shape: tuple[int, int, int], more: dict[str, Any]
) -> None:
    with cuda_emulator.options(arch=arch, races=True):
        attend(shape, False, [5, 0, 1, 150], [70, 20, 1, 150], 1, **more)
        attend(shape, True, [5, 0, 1, 70], [90, 20, 0, 33], 0, spread=60, **more)
        attend(shape, True, [3], [1001], 0, spread=1200, **more)  # in parts


@pytest.mark.parametrize(
    ("arch", "archs", "d"),
    [
        (75, OLD_AND_NEW, 64),
        pytest.param(80, OLD_AND_NEW, 64, marks=pytest.mark.slow),
        pytest.param(80, CudaArchs((80,)), 80, marks=pytest.mark.slow),
    ],
)
def test_chunks_through_the_runtime(arch: int, archs: CudaArchs, d: int) -> None:
    """The runtime's own calls: this round's part, the cached part, and their merge."""
    device = gpu_library.DEVICES["cuda"]

    def factory(spec: KVCacheSpec) -> KVCacheKernels:
        ragged, paged = (prefill(spec, paged=p, archs=archs) for p in (False, True))
        others = gpu_kv_cache_kernels(spec, device=device.limits)
        return replace(others, prefill_ragged=ragged, prefill_paged=paged)

    backend = attention_cache.Backend(factory, device.target, device.name)
    with cuda_emulator.options(arch=arch):
        cache = attention_cache.Cache(backend, q_heads=8, kv_heads=2, d=d, dtype="float16")
        cache.add(0, 1)
        for lens in ([37, 3], [29, 130], [1, 70], [5, 16]):
            cache.step([0, 1], lens)
