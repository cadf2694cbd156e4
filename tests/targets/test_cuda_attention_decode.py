"""The CUDA kernels around decoding: what they serve, that nvcc compiles them, and what they compute
on the emulated device, as an sm_75 and as an sm_80."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import cycle
from typing import Any

import attention_cache as scenarios
import gpu_library
import ml_dtypes
import numpy as np
import pytest
import tvm
from attention_cache import DTYPES, Backend, Cache
from test_gpu_attention import Call, Views

from mlc_compile.runtime import cuda_emulator
from mlc_compile.targets.cuda import CUDA
from mlc_compile.targets.cuda_kernels import attention_decode
from mlc_compile.targets.cuda_kernels._arch import CudaArchs
from mlc_compile.targets.cuda_kernels.attention import cuda_kv_cache_kernels
from mlc_compile.targets.cuda_kernels.attention_decode import TARGET_BLOCKS
from mlc_compile.targets.kv_cache import PAGE_SIZE, KVCacheSpec
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.export import source_modules
from mlc_compile.targets.nvidia.toolchain import find_nvcc

EVERY = CudaArchs((75, 80, 90))
OLD_AND_NEW = CudaArchs((75, 80))
NEWEST = CudaArchs((90,))
KERNELS = ("decode", "split_rotary", "transpose_append", "merge_state")

Shape = tuple[int, int, int, str]
# query heads, KV heads, head size, dtype: 1 to 11 heads a KV head, every kind of fragment
SHAPES = [(9, 3, 64, "float16"), (4, 1, 80, "float32")]
MORE_SHAPES = [
    (4, 1, 128, "float16"),
    (11, 1, 48, "float16"),
    (2, 2, 256, "float16"),
    (3, 1, 256, "float32"),
    (4, 2, 40, "float32"),
    (24, 1, 64, "float32"),
]
every_shape = pytest.mark.parametrize(
    "shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_SHAPES)], ids=str
)
on_every_kind = pytest.mark.parametrize("arch", [75, 80])


def numbers(shape: Shape, **more: Any) -> KVCacheSpec:
    q, kv, d, dtype = shape
    return KVCacheSpec(2, q, kv, d, dtype, tuple(np.linspace(1, 0.1, d // 2).tolist()), **more)


def made(spec: KVCacheSpec, archs: CudaArchs) -> dict[str, Any]:
    kernels = {name: getattr(attention_decode, name)(spec, archs) for name in KERNELS}
    return {name: kernel for name, kernel in kernels.items() if kernel is not None}


def test_what_the_portable_kernels_serve() -> None:
    spec = numbers((6, 2, 64, "float16"))
    others = set(KERNELS) - {"decode"}
    assert set(made(spec, EVERY)) == set(KERNELS)
    assert set(made(replace(spec, dtype="float32"), EVERY)) == set(KERNELS)
    assert set(made(replace(spec, dtype="bfloat16"), CudaArchs((80, 90)))) == set(KERNELS)
    assert made(replace(spec, dtype="bfloat16"), EVERY) == {}
    assert set(made(numbers((6, 2, 40, "float16")), EVERY)) == others
    assert set(made(numbers((2, 2, 272, "float16")), EVERY)) == others
    assert made(replace(spec, sliding_window=40), EVERY) == {}
    assert set(made(replace(spec, inv_freq=()), EVERY)) == set(KERNELS)
    for more in ({"softcap": 30.0}, {"layer_window": 40}):
        assert set(made(replace(spec, **more), EVERY)) == set(KERNELS)


def device_of(archs: CudaArchs) -> gpu_library.Device:
    """The emulated device, compiled for as the oldest of them: bfloat16 begins with sm_80."""
    description = {"kind": "cuda", "arch": f"sm_{archs.minimum}", "host": {"kind": "llvm"}}
    return replace(gpu_library.DEVICES["cuda"], target=tvm.target.Target(description))


def source(spec: KVCacheSpec, archs: CudaArchs) -> str:
    with source_modules():
        built = gpu_library.build(device_of(archs), made(spec, archs))
    return str(built.imports[0].inspect_source())


@pytest.mark.parametrize(
    ("shape", "archs"),
    [
        ((32, 8, 128, "float16"), EVERY),
        ((9, 3, 64, "bfloat16"), NEWEST),
        *(
            pytest.param(shape, archs, marks=pytest.mark.slow)
            for shape, archs in zip([*SHAPES, *MORE_SHAPES], cycle((EVERY, NEWEST)), strict=False)
        ),
    ],
    ids=str,
)
def test_nvcc_compiles_them_for_every_architecture(shape: Shape, archs: CudaArchs) -> None:
    code = source(numbers(shape), archs)
    assert ("_dependent<" in code) == archs.dependent_launch
    report = compile_cuda(code, archs.archs, find_nvcc(), report=True).report
    # Two for split_rotary: few rows, and many.
    assert report.count("Compiling entry function") == len(archs.archs) * (len(KERNELS) + 1)
    # What sm_75 gives a block without being asked.
    for line in report.splitlines():
        words = line.replace(",", "").split()
        if "smem" in words:
            assert int(words[words.index("smem") - 2]) <= 48 << 10


@cache
def library(spec: KVCacheSpec, archs: CudaArchs = OLD_AND_NEW) -> Any:
    cuda_emulator.install()
    return gpu_library.loaded(gpu_library.build(device_of(archs), made(spec, archs)))


def decode(
    shape: Shape,
    lens: Sequence[int],
    archs: CudaArchs = OLD_AND_NEW,
    *,
    behind: Sequence[int] = (),
    **more: Any,
) -> list[cuda_emulator.Launch]:
    """Compare one call with float64; its launches. The rows lie `behind` their sequences' ends,
    and `more` is of the cache, whose window is then used."""
    cuda_emulator.install()
    call = Call(gpu_library.DEVICES["cuda"], numbers(shape, **more), sum(lens), [1] * len(lens))
    call.keys(lens)
    scale = -call.scale if "layer_window" in more else call.scale
    pages, page_indptr, ids, last = call.paged()
    offsets = [5 * i for i in range(len(lens))]
    places = [n - 1 + far for n, far in zip(lens, behind or [0] * len(lens), strict=True)]
    positions = [place + offset for place, offset in zip(places, offsets, strict=True)]
    reach = more.get("layer_window", np.inf)
    visible = [at - np.arange(n)[None] < reach for n, at in zip(lens, places, strict=True)]
    for array in (page_indptr, ids, last, offsets, positions):
        call.views(array)
    q = call.device.tensor(call.q)
    with cuda_emulator.record() as launches:
        for _ in range(2):  # the second finds the counters as the first left them
            library(call.spec, archs)["decode"](
                q, pages, *call.views.tensors(), call.out, call.lse, 0, 1.0, 1e4, scale
            )
            call.check(visible)
    return launches


@every_shape
@on_every_kind
def test_decode(arch: int, shape: Shape) -> None:
    with cuda_emulator.options(arch=arch, races=True):
        for lens in ([1], [300], [0, 16, 37, 1, 260], [0]):
            decode(shape, lens)


@pytest.mark.slow
@every_shape
def test_decode_of_long_and_of_many_sequences(shape: Shape) -> None:
    with cuda_emulator.options(arch=80):
        decode(shape, [2500])  # chunks of several pages a warp
        decode(shape, [700, 3])
        decode(shape, [(7 * i) % 50 for i in range(45)])  # more than the lanes that look for work


@every_shape
def test_decode_in_dependent_launches(shape: Shape) -> None:
    with cuda_emulator.options(arch=90, races=True):
        for lens in ([37], [300], [0, 16, 370, 1, 260], [0]):
            decode(shape, lens, NEWEST)


@every_shape
@pytest.mark.parametrize(
    "more",
    [
        {"softcap": 1.5, "layer_window": 40},
        pytest.param({"softcap": 1.5}, marks=pytest.mark.slow),
        pytest.param({"layer_window": 99}, marks=pytest.mark.slow),
    ],
)
def test_bounded_scores_and_windows_of_layers(shape: Shape, more: dict[str, Any]) -> None:
    for arch, archs in ((75, OLD_AND_NEW), (80, OLD_AND_NEW), (90, NEWEST)):
        with cuda_emulator.options(arch=arch, races=True):
            decode(shape, [300], archs, **more)
            decode(shape, [0, 16, 37, 1, 260], archs, behind=[9, 38, 0, 60, 16], **more)
            launches = decode(shape, [700], archs, **more)
    if "layer_window" in more:  # not all 44 pages, but those a window touches, two a block
        touched = more["layer_window"] // PAGE_SIZE + 2
        assert launches[0].grid[0] <= -(-touched // 2)


@pytest.mark.parametrize("pages", [1, 20, 300])
def test_every_chunk_has_work(pages: int) -> None:
    """One sequence, cut evenly: few pages are one chunk, many one for each block but a few."""
    shape = (8, 4, 32, "float16")
    with cuda_emulator.options(arch=80, checked=False):
        (launch, _) = decode(shape, [16 * pages])
    chunks, units = launch.grid[:2]
    assert units == 4
    assert chunks == 1 if pages <= 8 else min(pages / 2, TARGET_BLOCKS // 4) / 2 <= chunks
    assert chunks * units <= TARGET_BLOCKS


@every_shape
@on_every_kind
def test_merge_state(arch: int, shape: Shape) -> None:
    spec, n, device = numbers(shape), 37, gpu_library.DEVICES["cuda"]
    rng, heads, dtype = np.random.default_rng(0), spec.num_qo_heads, DTYPES[spec.dtype]
    a, b = (rng.standard_normal((n, heads, spec.head_dim)).astype(dtype) for _ in range(2))
    s, t = ((5 * rng.standard_normal((n, heads))).astype(np.float32) for _ in range(2))
    a[1] = b[2] = a[3] = b[3] = 0
    s[1] = t[2] = s[3] = t[3] = -1e29
    with cuda_emulator.options(arch=arch, races=True):
        arrays = [device.tensor(x) for x in (a, s, b, t)]
        library(spec)["merge_state"](*arrays)
    out, lse = arrays[0].numpy(), arrays[1].numpy()
    w = 1 / (1 + 2.0 ** np.clip((t - s).astype(np.float64), -1e3, 1e3))[..., None]
    rows = [i for i in range(n) if i not in (1, 2, 3)]
    want = w * a + (1 - w) * b
    tolerance = 2e-3 if spec.dtype == "float16" else 2e-6
    np.testing.assert_allclose(out[rows], want[rows], atol=tolerance)
    np.testing.assert_allclose(lse[rows], np.logaddexp2(s, t)[rows], rtol=1e-5, atol=1e-5)
    assert (out[1] == b[1]).all() and (lse[1] == t[1]).all()
    assert (out[2] == a[2]).all() and (lse[2] == s[2]).all()
    assert (out[3] == 0).all() and (lse[3] < -1e28).all()


@every_shape
@on_every_kind
@pytest.mark.parametrize("rows", [3, 21])
def test_split_rotary(arch: int, shape: Shape, rows: int) -> None:
    """Both kernels; whole heads, parts of them or nothing turns; angles up to a long text's."""
    q_heads, kv_heads, d, dtype = shape
    device = gpu_library.DEVICES["cuda"]
    for rotary in (d, d // 4 * 2, 0):
        freq = (10000.0 ** -(np.arange(0, rotary, 2) / rotary)).astype(np.float32)
        spec = replace(
            numbers(shape), attention_factor=1.25, inv_freq=tuple(map(float, freq.tolist()))
        )
        rng = np.random.default_rng(rotary)
        qkv = rng.standard_normal((rows, q_heads + 2 * kv_heads, d)).astype(DTYPES[dtype])
        position = rng.integers(0, 140000, rows)
        outs = [
            device.tensor(np.full((rows, h, d), np.nan, qkv.dtype))
            for h in (q_heads, kv_heads, kv_heads)
        ]
        views = Views(device)
        views(position)
        with cuda_emulator.options(arch=arch, races=True):
            table = device.tensor(freq if rotary else np.full(1, np.nan, np.float32))
            library(spec)["split_rotary"](device.tensor(qkv), *views.tensors(), *outs, table)
        angle = (position.astype(np.float32)[:, None, None] * freq).astype(np.float64)
        c, s = 1.25 * np.cos(angle), 1.25 * np.sin(angle)
        x, half = qkv.astype(np.float64), rotary // 2
        a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
        turned = np.concatenate([a * c - b * s, b * c + a * s, rest], -1)
        heads = q_heads + kv_heads
        want = np.concatenate([turned[:, :heads], x[:, heads:]], 1)
        got = np.concatenate([out.numpy() for out in outs], 1)
        scale = 1e-6 if dtype == "float32" else 1e-3
        np.testing.assert_allclose(got, want, atol=5 * scale, rtol=scale)


@every_shape
@on_every_kind
def test_append(arch: int, shape: Shape) -> None:
    _, kv_heads, d, dtype = shape
    device = gpu_library.DEVICES["cuda"]
    rng, n, num_pages = np.random.default_rng(2), 45, 7
    state = rng.standard_normal((num_pages, 2, kv_heads, 16, d)).astype(DTYPES[dtype])
    pages = device.tensor(state)
    k, v = (rng.standard_normal((n, kv_heads, d)).astype(DTYPES[dtype]) for _ in range(2))
    slots = rng.permutation(16 * (num_pages - 2))[:n]
    slots[[3, 20]] = -1  # the runtime's word for a token that is not kept
    views = Views(device)
    views(slots)
    with cuda_emulator.options(arch=arch, races=True):
        library(numbers(shape))["transpose_append"](
            pages, device.tensor(k), device.tensor(v), *views.tensors()
        )
    for token, slot in enumerate(slots):
        if slot >= 0:
            state[slot // 16, 0, :, slot % 16] = k[token]
            state[slot // 16, 1, :, slot % 16] = v[token]
    np.testing.assert_array_equal(pages.numpy(), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("archs", "arch"), [(OLD_AND_NEW, 75), (OLD_AND_NEW, 80), (NEWEST, 90)], ids=str
)
def test_in_the_cache_of_the_runtime(archs: CudaArchs, arch: int) -> None:
    kernels = partial(cuda_kv_cache_kernels, archs=archs, device=CUDA)
    cuda_emulator.install()
    with cuda_emulator.options(arch=arch):
        backend = Backend(kernels, device_of(archs).target, "cuda")
        make = partial(Cache, backend)
        scenarios.prefill_decode_and_batches(make, q_heads=6, kv_heads=2, d=32, dtype="float16")
        scenarios.forks(make, 17)
        scenarios.popn_and_reuse(make)
        scenarios.layer_windows(make, 20, dtype="float16", softcap=2.0, rotary_dim=0)


def test_bfloat16() -> None:
    """A call each, with values that have few digits: results are as exact as float16's."""
    shape, device = (4, 1, 64, "bfloat16"), gpu_library.DEVICES["cuda"]
    spec, archs = numbers(shape), CudaArchs((80,))
    rng = np.random.default_rng(5)
    lens, q = [40, 3], rng.integers(-2, 3, (2, 4, 64)).astype(ml_dtypes.bfloat16)
    pages = rng.integers(-2, 3, (4, 2, 1, 16, 64)).astype(ml_dtypes.bfloat16)
    out, lse = (np.full(s, np.nan, np.float32) for s in (q.shape, q.shape[:2]))
    arrays = [device.tensor(a) for a in (q, pages, out.astype(q.dtype), lse)]
    views = Views(device)
    for array in ([0, 3, 4], [2, 0, 3, 1], [8, 3], [0, 0], lens):
        views(array)
    with cuda_emulator.options(arch=80, races=True):
        library(spec, archs)["decode"](
            *arrays[:2], *views.tensors(), *arrays[2:], 0, 1.0, 1e4, 0.125
        )
    got, keys = arrays[2].numpy().astype(np.float64), pages.astype(np.float64)
    for b, order in enumerate(([2, 0, 3], [1])):
        k, v = (np.concatenate([keys[p, i, 0] for p in order])[: lens[b]] for i in range(2))
        weight = np.exp(0.125 * q[b].astype(np.float64) @ k.T)
        want = weight / weight.sum(-1, keepdims=True) @ v
        np.testing.assert_allclose(got[b], want, atol=2e-2)
