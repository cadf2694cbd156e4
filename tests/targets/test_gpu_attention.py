"""The GPU attention kernels against float64 numpy, one by one and through the runtime's own cache.

One by one: outputs are poisoned before, slots that no sequence owns hold NaN, page numbers are
shuffled, and small int32 arrays are views at odd offsets into one buffer, as on CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import attention_cache as scenarios
import gpu_library
import numpy as np
import pytest
from attention_cache import DTYPES, Backend, Cache, Make, attend, frequencies
from gpu_library import Device

from mlc_compile.errors import InputError
from mlc_compile.targets.gpu_kernels.attention import gpu_kv_cache_kernels
from mlc_compile.targets.gpu_kernels.device import WEBGPU, GPUDevice
from mlc_compile.targets.kv_cache import KVCacheSpec

# WGSL's exp2 and log2 may be wrong in the last three bits, and llvmpipe's are.
SLACK = {"webgpu": 4, "metal": 2, "cuda": 2}
TOLERANCE = {"float32": 2e-5, "float16": 2e-3}

# query heads, KV heads, head size, dtype; the second has no multiple of 16 dimensions
SHAPES = [(9, 3, 64, "float32"), (4, 1, 40, "float16")]
MORE_SHAPES = [
    (14, 2, 128, "float16"),
    (71, 1, 64, "float16"),
    (2, 2, 96, "float32"),
    (16, 2, 256, "float32"),
]


def slow(*cases: Any) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


every_shape = pytest.mark.parametrize("shape", SHAPES + slow(*MORE_SHAPES), ids=str)


def numbers(shape: tuple[int, int, int, str], **more: Any) -> KVCacheSpec:
    q, kv, d, dtype = shape
    return KVCacheSpec(2, q, kv, d, dtype, tuple(frequencies(d).tolist()), **more)


@cache
def backend(device: Device) -> Backend:
    kernels = partial(gpu_kv_cache_kernels, device=device.limits)
    return Backend(kernels, device.target, device.name, slack=SLACK[device.name])


@pytest.fixture
def gpu_cache(device: Device) -> Make:
    """Makes a paged cache on the device."""
    return partial(Cache, backend(device))


@cache
def kernels(spec: KVCacheSpec, limits: GPUDevice) -> dict[str, Any]:
    made = gpu_kv_cache_kernels(spec, device=limits)
    named = {f.name: getattr(made, f.name) for f in fields(made)}
    return {name: kernel for name, kernel in named.items() if kernel is not None}


@cache
def run(device: Device, spec: KVCacheSpec, name: str) -> Any:
    """A kernel as the device runs it."""
    kernel = kernels(spec, device.limits)[name]
    return gpu_library.loaded(gpu_library.build(device, {name: kernel}))[name]


class Views:
    """int32 arrays that lie one behind the other in one buffer."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.arrays: list[np.ndarray] = []

    def __call__(self, array: Any) -> int:
        self.arrays.append(np.asarray(array, np.int32))
        return len(self.arrays) - 1

    def tensors(self) -> list[Any]:
        parts, starts, at = [], [], 0
        for i, array in enumerate(self.arrays):
            gap = np.full(3 + i % 4, -(10**6), np.int32)
            parts += [gap, array.ravel()]
            starts.append(4 * (at + len(gap)))
            at += len(gap) + array.size
        whole = self.device.tensor(np.concatenate([*parts, np.zeros(1, np.int32)]))
        return [
            whole._create_view(array.shape, "int32", start)
            for array, start in zip(self.arrays, starts, strict=True)
        ]


class Call:
    """Arguments of one kernel call and the numbers to check it with."""

    def __init__(self, device: Device, spec: KVCacheSpec, seed: int, q_lens: Sequence[int]) -> None:
        self.device, self.spec = device, spec
        self.rng = np.random.default_rng(seed)
        self.q_lens = list(q_lens)
        rows = sum(q_lens)
        self.q = self.random(rows, spec.num_qo_heads)
        self.poison()
        self.views = Views(device)
        self.scale = 0.17

    def poison(self) -> None:
        """New outputs, so that what a kernel doesn't write is seen."""
        self.out = self.device.tensor(np.full(self.q.shape, np.nan, self.q.dtype))
        self.lse = self.device.tensor(np.full(self.q.shape[:2], np.nan, np.float32))

    def random(self, *shape: int) -> np.ndarray:
        x = self.rng.standard_normal((*shape, self.spec.head_dim))
        return x.astype(DTYPES[self.spec.dtype])

    def keys(self, lens: Sequence[int]) -> None:
        self.kv_lens = list(lens)
        self.k = [self.random(n, self.spec.num_kv_heads) for n in lens]
        self.v = [self.random(n, self.spec.num_kv_heads) for n in lens]

    def paged(self) -> tuple[Any, list[int], list[int], list[int]]:
        """(pages, page_indptr, page_indices, last page lengths)."""
        counts = [-(-n // 16) for n in self.kv_lens]
        order = self.rng.permutation(sum(counts) + 3)
        shape = (len(order), 2, self.spec.num_kv_heads, 16, self.spec.head_dim)
        pages = np.full(shape, np.nan, DTYPES[self.spec.dtype])
        indptr = np.concatenate([[0], np.cumsum(counts)]).tolist()
        for i, n in enumerate(self.kv_lens):
            for token in range(n):
                page = order[indptr[i] + token // 16]
                pages[page, 0, :, token % 16] = self.k[i][token]
                pages[page, 1, :, token % 16] = self.v[i][token]
        last = [(n - 1) % 16 + 1 if n else 0 for n in self.kv_lens]
        return self.device.tensor(pages), indptr, order[: indptr[-1]].tolist(), last

    def run(
        self,
        name: str,
        *,
        offsets: Any = None,
        positions: Any = None,
        lengths: Any = None,
        causal: int | None = None,
        windowed: bool = False,
        tree: Sequence[Any] = (),
    ) -> None:
        """Call a kernel by its name; zeros where nothing is given. `lengths` comes behind those of
        the last pages, `tree` is (nodes before each sequence, their order)."""
        self.poison()
        offsets = [0] * len(self.kv_lens) if offsets is None else offsets
        positions = [0] * len(self.q) if positions is None else positions
        views = Views(self.device)
        views(indptr(self.q_lens))
        arrays: list[Any]
        if name in ("prefill_ragged", "tree_ragged"):
            arrays = [indptr(self.kv_lens), positions, *([] if tree else [offsets]), *tree]
            keys = [self.device.tensor(np.concatenate(x)) for x in (self.k, self.v)]
        else:
            pages, page_indptr, ids, last = self.paged()
            info = last if lengths is None else [last, *lengths]
            arrays = [page_indptr, ids, info, offsets, positions, *tree]
            keys = [pages]
        for array in arrays:
            views(array)
        q_indptr, *rest = views.tensors()
        before = [] if name == "decode" else [q_indptr]
        before = [self.device.tensor(self.q), *before, *keys]
        results = [self.out, self.lse, *([] if causal is None else [causal])]
        scalars = [0, 1.0, 1e4, -self.scale if windowed else self.scale]
        if name == "tree_paged":
            rest, order = rest[:-2], rest[-2:]
            arguments = [*rest, *results, *scalars, *order]
        else:
            arguments = [*rest, *results, *scalars]
        run(self.device, self.spec, name)(*before, *arguments)

    def check(self, visible: Sequence[np.ndarray]) -> None:
        """visible: for each sequence [rows, keys]."""
        out, lse = self.out.numpy().astype(np.float64), self.lse.numpy()
        tolerance = TOLERANCE[self.spec.dtype]
        at = 0
        for i, rows in enumerate(self.q_lens):
            k, v = (x[i].astype(np.float64) for x in (self.k, self.v))
            for r, sees in enumerate(visible[i]):
                got, got_lse = out[at + r], lse[at + r]
                if not sees.any():
                    assert (got == 0).all() and np.isfinite(got_lse).all()
                    assert (got_lse < -1e20).all()
                    continue
                q = self.q[at + r].astype(np.float64)
                want, total = attend(q, k[sees], v[sees], self.scale, self.spec.softcap)
                np.testing.assert_allclose(got, want, atol=tolerance, rtol=0, err_msg=f"{i}, {r}")
                np.testing.assert_allclose(got_lse, total, atol=1e-4)
            at += rows


def indptr(lens: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lens).tolist()]


def causal_mask(rows: int, keys: int, causal: int) -> np.ndarray:
    distance = np.arange(keys)[None] - (keys - rows) - np.arange(rows)[:, None]
    return distance <= (0 if causal else keys + rows)


@pytest.mark.emulated(shape=SHAPES[1])
@every_shape
def test_decode(device: Device, shape: tuple[int, int, int, str]) -> None:
    for seed, lens in enumerate([[1], [300], [0, 16, 37, 1, 260], [0], [700, 3]]):
        call = Call(device, numbers(shape), seed, [1] * len(lens))
        call.keys(lens)
        call.run("decode", positions=lens)
        call.check([np.ones((1, n), bool) for n in lens])


@pytest.mark.emulated(shape=SHAPES[1], causal=1)
@pytest.mark.parametrize("causal", [0, 1])
@every_shape
def test_prefill_paged(device: Device, shape: tuple[int, int, int, str], causal: int) -> None:
    rounds = [([37], [37]), ([5, 0, 1, 70], [90, 20, 0, 33]), ([3], [0]), ([0, 2], [0, 17])]
    for seed, (rows, lens) in enumerate(rounds):
        call = Call(device, numbers(shape), seed, rows)
        call.keys(lens)
        call.run("prefill_paged", causal=causal)
        call.check([causal_mask(r, n, causal) for r, n in zip(rows, lens, strict=True)])


@pytest.mark.emulated(shape=SHAPES[1], causal=1)
@pytest.mark.parametrize("causal", [0, 1])
@every_shape
def test_prefill_ragged(device: Device, shape: tuple[int, int, int, str], causal: int) -> None:
    rounds = [([130], [130]), ([5, 0, 1, 40], [50, 20, 1, 40]), ([3, 4], [0, 4])]
    for seed, (rows, lens) in enumerate(rounds):
        call = Call(device, numbers(shape), seed, rows)
        call.keys(lens)
        call.run("prefill_ragged", causal=causal)
        call.check([causal_mask(r, n, causal) for r, n in zip(rows, lens, strict=True)])


@pytest.mark.emulated(shape=SHAPES[0], sink=5)
@pytest.mark.parametrize("decoding", [True, False])
@pytest.mark.parametrize("sink", [5, *slow(0)])
@pytest.mark.parametrize("shape", [SHAPES[0], *slow(SHAPES[1], *MORE_SHAPES)], ids=str)
def test_windows_of_several_sequences(
    device: Device, shape: tuple[int, int, int, str], sink: int, decoding: bool
) -> None:
    """Slots between a sequence's sinks and its window are gone and hold NaN."""
    spec = numbers(shape, sliding_window=50, attention_sink=sink, attention_factor=1.1)
    rows = [1, 1, 1, 1] if decoding else [6, 1, 30, 2]
    lens = [93, 20, 70, 0]
    starts = [(sink + 37, sink), (0, 0), (sink + 9, sink), (0, 0)]  # the second and last never slid
    offsets = [4, 0, 0, 0]
    call = Call(device, spec, 3, rows)
    call.keys(lens)
    half = spec.rotary_dim // 2
    raw, visible = [k.copy() for k in call.k], []
    q_positions: list[int] = []
    for i, (n, (start, sinks)) in enumerate(zip(lens, starts, strict=True)):
        slots = np.arange(n)
        sees_always = slots < (sinks or sink)
        place = slots + offsets[i] + np.where(sees_always, 0, sinks - start)
        angle = (place[:, None] * np.array(spec.inv_freq, np.float64))[:, None]
        c, s = 1.1 * np.cos(angle), 1.1 * np.sin(angle)
        a, b = np.split(call.k[i].astype(np.float64), [half], -1)
        call.k[i] = np.concatenate([a * c - b * s, b * c + a * s], -1)
        at = (place[-1] + 1 if n else 0) + np.arange(rows[i])
        q_positions += at.tolist()
        near = (at[:, None] - place < 50 - sink) & (slots >= start)
        visible.append(near | sees_always)
        gone = ~sees_always & (slots < start)
        raw[i][gone] = call.v[i][gone] = np.nan
    rotated, call.k = call.k, raw
    lengths = list(zip(*starts, strict=True))
    call.run(
        "decode" if decoding else "prefill_paged",
        offsets=offsets,
        positions=q_positions,
        lengths=lengths,
        causal=None if decoding else 0,
    )
    call.k = [np.nan_to_num(k) for k in rotated]
    call.v = [np.nan_to_num(v) for v in call.v]
    call.check(visible)


@pytest.mark.emulated(shape=SHAPES[1], name="prefill_paged")
@pytest.mark.parametrize("name", ["decode", "prefill_paged", "prefill_ragged"])
@every_shape
def test_bounded_scores_and_windows_of_layers(
    device: Device, shape: tuple[int, int, int, str], name: str
) -> None:
    """A negative scale is a layer with the window; rows of one paged call may have positions in no
    order, and windows without any key of the call."""
    window = 40
    spec = numbers(shape, softcap=1.5, layer_window=window)
    lens, offsets = [700, 0, 37, 260, 30], [0, 3, 1000, 16, 5]
    rows = [1] * 5 if name == "decode" else [70, 2, 1, 30, 0]
    if name == "prefill_ragged":
        lens = [200, 2, 1, 35, 7]
    call = Call(device, spec, 1, rows)
    call.keys(lens)
    positions, visible = [], []
    for i, (n, offset, count) in enumerate(zip(lens, offsets, rows, strict=True)):
        if name == "prefill_ragged":
            at = offset + n - count + np.arange(count)
        else:
            behind = [window // 2, 0, window + 5, 0, 2 * window][i]
            far = [1, 1, 1, 2 * window, 1][i] if name == "prefill_paged" else 1
            at = offset + n - 1 + behind + call.rng.integers(0, far, count)
        distance = at[:, None] - offset - np.arange(n)
        positions += at.tolist()
        visible.append((distance < window) & ((distance >= 0) | (name != "prefill_ragged")))
    causal = {"decode": None, "prefill_paged": 0, "prefill_ragged": 1}[name]
    for windowed in (True, False):
        call.run(name, offsets=offsets, positions=positions, causal=causal, windowed=windowed)
        if not windowed:
            visible = [causal_mask(r, n, causal or 0) for r, n in zip(rows, lens, strict=True)]
        call.check(visible)


def random_tree(rng: np.random.Generator, nodes: int) -> tuple[list[list[int]], np.ndarray]:
    """The runtime's [place, end of the subtree] of each node, and who sees whom."""
    parents = [int(rng.integers(-1, n)) for n in range(nodes)]
    sees = np.eye(nodes, dtype=bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            sees[node] |= sees[parent]
    order = sorted(range(nodes), key=lambda n: scenarios.ancestors(parents, n))
    place = {node: i for i, node in enumerate(order)}
    size = sees.sum(0)
    return [[place[n], place[n] + int(size[n])] for n in range(nodes)], sees


@pytest.mark.emulated(shape=SHAPES[1])
@pytest.mark.parametrize("paged", [False, True])
@every_shape
@pytest.mark.parametrize("window", [None, 3])
def test_trees(
    device: Device, shape: tuple[int, int, int, str], paged: bool, window: int | None
) -> None:
    # Rows are the last nodes of a tree; the keys before the tree's are seen by all.
    rounds = [([7, 1, 20], [7, 1, 25], [30, 1, 25]), ([3], [40], [75])]
    if window is not None and not paged:  # the runtime's rows are then the whole trees
        rounds = [([7, 1, 25], [7, 1, 25], [30, 1, 25]), ([40], [40], [75])]
    spec = numbers(shape, layer_window=window)
    if paged and "tree_paged" not in kernels(spec, device.limits):
        assert device.name == "webgpu"
        pytest.skip("WebGPU has too few buffers for this kernel, so its cache has none")
    for seed, (rows, nodes, lens) in enumerate(rounds):
        call = Call(device, spec, seed, rows)
        call.keys(lens)
        trees = [random_tree(call.rng, n) for n in nodes]
        visible, positions = [], []
        for (_, sees), r, n in zip(trees, rows, lens, strict=True):
            mask = np.ones((r, n), bool)
            mask[:, n - len(sees) :] = sees[len(sees) - r :]
            depth = sees.sum(1) - 1
            place = 5 + np.concatenate([np.arange(n - len(sees)), n - len(sees) + depth])
            positions += place[n - r :].tolist()
            if window is not None:
                mask &= place[n - r :, None] - place < window
            visible.append(mask)
        orders = np.concatenate([order for order, _ in trees])
        if not device.limits.merged_auxiliary:
            orders = orders.ravel()
        call.run(
            "tree_paged" if paged else "tree_ragged",
            offsets=[5] * len(lens),
            positions=positions,
            windowed=window is not None,
            tree=(indptr(nodes), orders),
        )
        call.check(visible)


@pytest.mark.emulated(shape=SHAPES[1])
@every_shape
def test_merge_state(device: Device, shape: tuple[int, int, int, str]) -> None:
    spec = numbers(shape)
    rng, n = np.random.default_rng(0), 37
    heads, d, dtype = spec.num_qo_heads, spec.head_dim, DTYPES[spec.dtype]
    a, b = (rng.standard_normal((n, heads, d)).astype(dtype) for _ in range(2))
    s, t = ((5 * rng.standard_normal((n, heads))).astype(np.float32) for _ in range(2))
    a[1] = b[2] = a[3] = b[3] = 0
    s[1] = t[2] = s[3] = t[3] = -1e29
    arrays = [device.tensor(x) for x in (a, s, b, t)]
    run(device, spec, "merge_state")(*arrays)
    out, lse = arrays[0].numpy(), arrays[1].numpy()
    w = 1 / (1 + 2.0 ** np.clip((t - s).astype(np.float64), -1e3, 1e3))[..., None]
    rows = [i for i in range(n) if i not in (1, 2, 3)]
    want = w * a + (1 - w) * b
    np.testing.assert_allclose(out[rows], want[rows], atol=TOLERANCE[spec.dtype])
    np.testing.assert_allclose(lse[rows], np.logaddexp2(s, t)[rows], rtol=1e-5, atol=1e-5)
    assert (out[1] == b[1]).all() and (lse[1] == t[1]).all()
    assert (out[2] == a[2]).all() and (lse[2] == s[2]).all()
    assert (out[3] == 0).all() and (lse[3] < -1e28).all()


@pytest.mark.emulated(shape=SHAPES[1])
@every_shape
@pytest.mark.parametrize("window", [None, 100])
def test_split_rotary(device: Device, shape: tuple[int, int, int, str], window: int | None) -> None:
    q_heads, kv_heads, d, dtype = shape
    for rotary in (d, d // 2 // 2 * 2, 0):
        spec = numbers(shape, sliding_window=window, attention_factor=1.25)
        spec = replace(spec, inv_freq=tuple(frequencies(rotary).tolist()))
        rng, n = np.random.default_rng(1), 21
        qkv = rng.standard_normal((n, q_heads + 2 * kv_heads, d)).astype(DTYPES[dtype])
        position = rng.integers(0, 40000, n)
        outs = [
            device.tensor(np.full((n, h, d), np.nan, qkv.dtype))
            for h in (q_heads, kv_heads, kv_heads)
        ]
        freq = np.array(spec.inv_freq, np.float32)
        views = Views(device)
        views(position)
        last = 0 if window else device.tensor(freq if rotary else np.full(1, np.nan, np.float32))
        run(device, spec, "split_rotary")(device.tensor(qkv), *views.tensors(), *outs, last)
        angle = (position.astype(np.float32)[:, None, None] * freq).astype(np.float64)
        c, s = 1.25 * np.cos(angle), 1.25 * np.sin(angle)
        x, half = qkv.astype(np.float64), rotary // 2
        a, b, rest = x[..., :half], x[..., half:rotary], x[..., rotary:]
        turned = np.concatenate([a * c - b * s, b * c + a * s, rest], -1)
        rotated = q_heads if window else q_heads + kv_heads
        want = np.concatenate([turned[:, :rotated], x[:, rotated:]], 1)
        got = np.concatenate([out.numpy() for out in outs], 1)
        scale = 1e-6 if dtype == "float32" else 1e-3
        np.testing.assert_allclose(got, want, atol=5 * scale, rtol=scale)


@pytest.mark.emulated(shape=SHAPES[1])
@every_shape
def test_append_copy_compact_and_read_back(
    device: Device, shape: tuple[int, int, int, str]
) -> None:
    _, kv_heads, d, dtype = shape
    spec = numbers(shape)
    rng = np.random.default_rng(2)
    n, num_pages = 45, 7
    state = rng.standard_normal((num_pages, 2, kv_heads, 16, d)).astype(DTYPES[dtype])
    pages = device.tensor(state)
    k, v = (rng.standard_normal((n, kv_heads, d)).astype(DTYPES[dtype]) for _ in range(2))
    slots = rng.permutation(16 * (num_pages - 2))[:n]
    slots[[3, 20]] = -1  # the runtime's word for a token that is not kept
    views = Views(device)
    views(slots)
    run(device, spec, "transpose_append")(
        pages, device.tensor(k), device.tensor(v), *views.tensors()
    )
    for token, slot in enumerate(slots):
        if slot >= 0:
            state[slot // 16, 0, :, slot % 16] = k[token]
            state[slot // 16, 1, :, slot % 16] = v[token]
    np.testing.assert_array_equal(pages.numpy(), state)

    run(device, spec, "copy_single_page")(pages, 2, 6, 11)
    np.testing.assert_array_equal(pages.numpy()[6, :, :, :11], state[2, :, :, :11])
    np.testing.assert_array_equal(pages.numpy()[:6], state[:6])
    state = pages.numpy()

    # Two sequences; a chain of moves, where a target is an earlier source.
    source, target = [17, 18, 20, 70, 79], [16, 17, 18, 65, 70]
    views = Views(device)
    views([0, 3, 5])
    views([source, target])
    run(device, spec, "compact_copy")(pages, *views.tensors(), 2)
    for a, b in zip(source, target, strict=True):
        state[b // 16, :, :, b % 16] = state[a // 16, :, :, a % 16]
    np.testing.assert_array_equal(pages.numpy(), state)

    slots = rng.permutation(16 * num_pages)[:13]
    poison = np.full((2, 13, kv_heads, d), -1, DTYPES[dtype])
    got = [device.tensor(poison) for _ in range(2)]
    views = Views(device)
    views(slots)
    run(device, spec, "debug_get_kv")(pages, *views.tensors(), *got, 1)
    for kind in range(2):
        assert (got[kind].numpy()[0] == -1).all()
        want = state[slots // 16, kind, :, slots % 16]
        np.testing.assert_array_equal(got[kind].numpy()[1], want)


GROUPS = [
    {"q_heads": 6, "kv_heads": 2, "d": 32},
    {"q_heads": 3, "kv_heads": 3, "d": 64, "dtype": "float16"},
    *slow(
        {"q_heads": 8, "kv_heads": 1, "d": 96, "rotary_dim": 48, "factor": 1.3},
        {"q_heads": 14, "kv_heads": 2, "d": 128, "layers": 2},
        {"q_heads": 2, "kv_heads": 1, "d": 256},
    ),
]


@pytest.mark.emulated(shape=GROUPS[1])
@pytest.mark.parametrize("shape", GROUPS)
def test_prefill_decode_and_batches(gpu_cache: Make, shape: dict[str, Any]) -> None:
    scenarios.prefill_decode_and_batches(gpu_cache, **shape)


@pytest.mark.slow
def test_single_prefills_of_every_small_length(gpu_cache: Make) -> None:
    scenarios.single_prefills(gpu_cache)


def test_chunks_of_odd_lengths_and_long_decode(gpu_cache: Make) -> None:
    scenarios.chunks_of_odd_lengths(gpu_cache)


@pytest.mark.parametrize("position", [17, -1, *slow(1, 15, 16, 32, 40, 48)])
def test_fork(gpu_cache: Make, position: int) -> None:
    scenarios.forks(gpu_cache, position)


@pytest.mark.slow
def test_more_forks_than_the_runtime_keeps_apart(gpu_cache: Make) -> None:
    scenarios.many_forks(gpu_cache)


@pytest.mark.slow
def test_many_sequences_share_a_prefix(gpu_cache: Make) -> None:
    scenarios.shared_prefix(gpu_cache)


def test_popn_and_reuse_of_pages(gpu_cache: Make) -> None:
    scenarios.popn_and_reuse(gpu_cache)


@pytest.mark.parametrize("window", [None, 40])
def test_slots_never_written_may_hold_nan(gpu_cache: Make, window: int | None) -> None:
    scenarios.unwritten_slots(gpu_cache, window)


@pytest.mark.emulated
def test_trees_and_their_commit(gpu_cache: Make) -> None:
    scenarios.trees_and_commit(gpu_cache, [([-1, 0, 0, 1, 2, -1], 2)])


def test_tree_grown_over_rounds(gpu_cache: Make) -> None:
    scenarios.grown_tree(gpu_cache)


@pytest.mark.parametrize("shape", [{"window": 40}, *slow({"window": 33, "dtype": "float16"})])
def test_window_is_exact_far_past_the_wrap(gpu_cache: Make, shape: dict[str, Any]) -> None:
    scenarios.window_past_the_wrap(gpu_cache, **shape)


def test_window_and_chunks_longer_than_it(gpu_cache: Make) -> None:
    scenarios.long_chunks_in_window(gpu_cache)


@pytest.mark.slow
def test_window_smaller_than_what_the_runtime_keeps(gpu_cache: Make) -> None:
    scenarios.roomy_window(gpu_cache)


@pytest.mark.emulated
def test_attention_sinks(gpu_cache: Make) -> None:
    scenarios.attention_sinks(gpu_cache)


@pytest.mark.parametrize(
    "shape",
    [
        {"window": 20, "d": 40, "softcap": 1.5},
        *slow({"window": 45, "dtype": "float16"}, {"window": 7, "d": 256, "rotary_dim": 0}),
    ],
)
def test_layers_with_windows(gpu_cache: Make, shape: dict[str, Any]) -> None:
    scenarios.layer_windows(gpu_cache, **shape)


@pytest.mark.slow
def test_layers_with_windows_share_a_prefix(gpu_cache: Make) -> None:
    scenarios.shared_prefix(gpu_cache, layers=2, layer_window=50)


def test_trees_in_layers_with_windows(device: Device, gpu_cache: Make) -> None:
    shape = {"layers": 2, "layer_window": 2, "softcap": 2.0, "rotary_dim": 0}
    scenarios.trees_and_commit(gpu_cache, [([-1, 0, 0, 1, 2, 4, -1], 2)], **shape)
    if device.name != "webgpu":  # which has no `tree_paged` of such layers
        scenarios.grown_tree(gpu_cache, **shape)


@pytest.mark.emulated
def test_debug_get_kv_returns_rotated_keys_and_values(gpu_cache: Make) -> None:
    scenarios.debug_get_kv(gpu_cache)


@pytest.mark.parametrize("kind", gpu_library.DEVICES.values(), ids=gpu_library.DEVICES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"sliding_window": 64},
        {"sliding_window": 64, "attention_sink": 4},
        {"softcap": 50.0, "layer_window": 64},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [SHAPES[0], *slow((8, 1, 256, "float16"))])
def test_launches_keep_to_the_limits(
    kind: Device, shape: tuple[int, int, int, str], more: dict[str, Any]
) -> None:
    made = kernels(numbers(shape, **more), kind.limits)
    codes = gpu_library.check_limits(kind, gpu_library.build(kind, made))
    assert len(codes) == len(made) + 1  # decode is two
    trees = {name for name in ("tree_ragged", "tree_paged") if name in made}
    if "sliding_window" in more:
        assert not trees
    elif "layer_window" in more and kind.name == "webgpu":
        assert trees == {"tree_ragged"}  # it has too few buffers for the other
    else:
        assert len(trees) == 2


def test_devices_that_cannot() -> None:
    spec = numbers((2, 1, 64, "bfloat16"))
    with pytest.raises(InputError, match="this target has no bfloat16"):
        gpu_kv_cache_kernels(spec, device=WEBGPU)
    spec = numbers((2, 1, 64, "float32"))
    with pytest.raises(InputError, match="256 threads and 10 buffers, the device has 128 and 10"):
        gpu_kv_cache_kernels(spec, device=GPUDevice(max_threads=128))
    with pytest.raises(InputError, match="head_dim 64 is too large"):
        gpu_kv_cache_kernels(spec, device=GPUDevice(shared_bytes=1024))
