"""The runtime's real paged cache beside attention in float64 numpy, for the kernels of any target.

- `Backend` names a target, its device and how its kernels are made.
- `Cache` keeps a record of every token that it gave to the runtime and checks each row of output.
- The scenarios below it are plain functions of a maker of caches: each target's tests call them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import tvm
from gpu_library import loaded
from tvm import relax
from tvm.relax.frontend import nn
from tvm.runtime import ShapeTuple
from tvm.s_tir import dlight

from mlc_compile.nn.kv_cache import PAGE_SIZE, KernelFactory, PagedKVCache, create_kv_cache
from mlc_compile.targets.parsing import fast_parsing

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TOLERANCE = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


@dataclass(frozen=True)
class Backend:
    """A target's kernels and where they run; `slack` multiplies the tolerance of float32."""

    kernels: KernelFactory
    target: tvm.target.Target
    device: str
    slack: float = 1

    @property
    def gathers(self) -> bool:
        """The runtime hands over its small arrays in one buffer here.

        Where it does not, TVM 0.27 fails ("only support contiguous array") to copy the windows of
        more than one sequence, and moves of more than one accepted tree node.
        """
        return self.device in ("cpu", "cuda")

    def tensor(self, array: np.ndarray) -> Any:
        return tvm.runtime.tensor(array, tvm.device(self.device, 0))

    def compile(self, mod: tvm.IRModule) -> relax.VirtualMachine:
        if self.device == "cpu":
            return relax.VirtualMachine(relax.build(mod, self.target), tvm.cpu())
        with self.target:
            mod = relax.transform.LegalizeOps()(mod)
            mod = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(mod)
        built = relax.build(mod, self.target)
        return relax.VirtualMachine(loaded(built), tvm.device(self.device, 0))


def frequencies(rotary_dim: int) -> np.ndarray:
    """[rotary_dim / 2] float32; none of them for a cache that rotates nothing."""
    return (10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)


def windowed(layer: int) -> bool:
    """Whether `layer_window` bounds this layer: the first one of two and every other."""
    return layer % 2 == 0


def attend(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, softcap: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One row's attention to the keys it sees, and its lse in base 2, in float64.

    q [q, d], k and v [n, kv, d] -> [q, d] and [q]; without a key 0 and -inf. `softcap` bounds the
    scaled scores by softcap * tanh(score / softcap) (Gemma 2, arXiv 2408.00118, section 2).
    """
    if not len(k):
        return np.zeros(q.shape), np.full(len(q), -np.inf)
    group = len(q) // k.shape[1]
    score = np.einsum("hd,nhd->hn", q, np.repeat(k, group, 1)) * scale
    if softcap is not None:
        score = softcap * np.tanh(score / softcap)
    top = score.max(-1)
    p = np.exp(score - top[:, None])
    total = p.sum(-1)
    out = np.einsum("hn,nhd->hd", p / total[:, None], np.repeat(v, group, 1))
    return out, (top + np.log(total)) / np.log(2)


class Attend(nn.Module):
    """Attention of a layer alone (`attend0`, `attend1`): fused q, k, v in, output out."""

    def __init__(self, numbers: dict[str, Any], kernels: KernelFactory) -> None:
        self.numbers = numbers
        self.kernels = kernels

    def create(
        self,
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
    ) -> PagedKVCache:
        return create_kv_cache(
            kernels=self.kernels,
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            **self.numbers,
        )

    def _attend(self, layer: int, qkv: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        heads, d = self.numbers["num_qo_heads"], self.numbers["head_dim"]
        scale = d**-0.5
        if self.numbers["layer_window"] is not None and windowed(layer):
            scale = -scale
        return kv.attention_with_fused_qkv(layer, qkv, heads, scale)

    def attend0(self, qkv: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        return self._attend(0, qkv, kv)

    def attend1(self, qkv: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        return self._attend(1, qkv, kv)


@cache
def library(numbers: tuple[tuple[str, Any], ...], backend: Backend) -> relax.VirtualMachine:
    values = dict(numbers)
    values["inv_freq"] = np.array(values["inv_freq"], np.float32)
    model = Attend(values, backend.kernels)
    heads = values["num_qo_heads"] + 2 * values["num_kv_heads"]
    plain = {"param_mode": "none", "effect_mode": "none"}
    qkv = nn.spec.Tensor([1, "n", heads, values["head_dim"]], values["dtype"])
    sizes = [
        "max_batch_size",
        "max_total_seq_len",
        "prefill_chunk_size",
        "page_size",
        "support_sliding_window",
    ]
    layer = {"qkv": qkv, "kv": nn.spec.Object(object_type=PagedKVCache), "$": plain}
    spec = nn.spec.ModuleSpec.from_raw(
        {
            "create": {**dict.fromkeys(sizes, int), "$": plain},
            **{f"attend{i}": layer for i in range(values["num_layers"])},
        },
        model,
    )
    with fast_parsing():
        mod = model.export_tvm(spec=spec)[0]
    return backend.compile(mod)


def runtime(name: str, *args: Any) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")(*args)


class Cache:
    """A runtime cache beside a plain record of every token, and the check of one by the other.

    `rotary_dim=0` rotates nothing; `layer_window` bounds every other layer, `windowed` says which.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        q_heads: int = 6,
        kv_heads: int = 2,
        d: int = 32,
        dtype: str = "float32",
        rotary_dim: int | None = None,
        factor: float = 1.0,
        layers: int = 1,
        window: int | None = None,
        sink: int = 0,
        softcap: float | None = None,
        layer_window: int | None = None,
        batch: int = 8,
        total: int = 2048,
        chunk: int = 512,
        seed: int = 0,
    ) -> None:
        self.q_heads, self.kv_heads, self.d, self.layers = q_heads, kv_heads, d, layers
        self.dtype, self.window, self.sink, self.factor = dtype, window, sink, factor
        self.softcap, self.layer_window = softcap, layer_window
        self.freq = frequencies(d if rotary_dim is None else rotary_dim)
        self.vm = library(
            (
                ("num_layers", layers),
                ("num_qo_heads", q_heads),
                ("num_kv_heads", kv_heads),
                ("head_dim", d),
                ("dtype", dtype),
                ("inv_freq", tuple(self.freq.tolist())),
                ("attention_factor", factor),
                ("sliding_window", window),
                ("attention_sink", sink),
                ("softcap", softcap),
                ("layer_window", layer_window),
            ),
            backend,
        )
        self.backend = backend
        self.kv = self.vm["create"](
            *(ShapeTuple([x]) for x in (batch, total, chunk, PAGE_SIZE, int(window is not None)))
        )
        self.tokens: dict[int, list[np.ndarray]] = {}
        self.rng = np.random.default_rng(seed)
        self.worst = 0.0

    def add(self, *ids: int) -> None:
        for i in ids:
            runtime("kv_state_add_sequence", self.kv, i)
            if self.window is not None:
                runtime(
                    "attention_kv_cache_enable_sliding_window_for_seq",
                    self.kv,
                    i,
                    self.window,
                    self.sink,
                )
            self.tokens[i] = []

    def fork(self, parent: int, child: int, position: int = -1) -> None:
        runtime("kv_state_fork_sequence", self.kv, parent, child, position)
        kept = len(self.tokens[parent]) if position == -1 else position
        self.tokens[child] = self.tokens[parent][:kept]

    def pop(self, i: int, n: int) -> None:
        runtime("kv_state_popn", self.kv, i, n)
        del self.tokens[i][len(self.tokens[i]) - n :]

    def remove(self, i: int) -> None:
        runtime("kv_state_remove_sequence", self.kv, i)
        self.tokens.pop(i, None)

    def fresh(self, n: int) -> np.ndarray:
        """[layers, n, q + 2 kv, d], values as the cache dtype rounds them."""
        heads = self.q_heads + 2 * self.kv_heads
        x = self.rng.standard_normal((self.layers, n, heads, self.d)).astype(np.float32)
        return x.astype(DTYPES[self.dtype])

    def run(self, ids: Sequence[int], lengths: Sequence[int], tree: Any = None) -> np.ndarray:
        """One round of the runtime on fresh tokens: [layers, sum(lengths), q, d]."""
        qkv = self.fresh(sum(lengths))
        extra = () if tree is None else (ShapeTuple(tree),)
        runtime("kv_state_begin_forward", self.kv, ShapeTuple(ids), ShapeTuple(lengths), *extra)
        outs = [
            self.vm[f"attend{i}"](self.backend.tensor(qkv[i : i + 1]), self.kv).numpy()
            for i in range(self.layers)
        ]
        runtime("kv_state_end_forward", self.kv)
        at = 0
        for i, n in zip(ids, lengths, strict=True):
            self.tokens[i].extend(qkv[:, at + j] for j in range(n))
            at += n
        return np.concatenate(outs)

    def step(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """A round whose rows are all checked."""
        out = self.run(ids, lengths)
        at = 0
        for i, n in zip(ids, lengths, strict=True):
            self.check(out[:, at : at + n], self.expected(i, n), f"sequence {i}, {n} rows")
            at += n

    def check(self, got: np.ndarray, want: np.ndarray, what: str) -> None:
        error = float(np.abs(got.astype(np.float64) - want).max())
        slack = self.backend.slack if self.dtype == "float32" else 1
        assert error < TOLERANCE[self.dtype] * slack, (what, error)
        self.worst = max(self.worst, error)

    def visible(self, length: int, row: int, layer: int) -> np.ndarray:
        keys = np.arange(length)
        mask = keys <= row
        if self.window is not None:
            near = keys > row - (self.window - self.sink)
            mask &= near | (keys < self.sink)
        if self.layer_window is not None and windowed(layer):
            mask &= keys > row - self.layer_window
        return mask

    def rotate(self, x: np.ndarray, position: Any) -> np.ndarray:
        half = len(self.freq)
        # transformers' angle is a float32 product; ours too, but of positions in the window.
        if self.window is None:
            angle = np.asarray(position, np.float32)[..., None, None] * self.freq
        else:
            angle = np.asarray(position, np.float64)[..., None, None] * self.freq
        c = self.factor * np.cos(angle.astype(np.float64))
        s = self.factor * np.sin(angle.astype(np.float64))
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return np.concatenate([a * c - b * s, b * c + a * s, rest], -1)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        return x.astype(DTYPES[self.dtype]).astype(np.float64)

    def expected(self, i: int, rows: int) -> np.ndarray:
        """Attention of the last `rows` tokens of sequence i: [layers, rows, q, d] float64."""
        tokens = np.stack(self.tokens[i], 1).astype(np.float64)
        n = tokens.shape[1]
        q, k, v = np.split(tokens, [self.q_heads, self.q_heads + self.kv_heads], 2)
        near = self.rounded(self.rotate(k, np.arange(n)))
        out = np.empty((self.layers, rows, self.q_heads, self.d))
        for r, row in enumerate(range(n - rows, n)):
            qr = self.rounded(self.rotate(q[:, row], np.full(self.layers, row)))
            keys = near
            if self.sink:
                # Attention sinks keep the distance that a token at the end of the window has.
                gone = max(n - rows - self.window, 0) if self.window else 0
                keys = near.copy()
                first = np.arange(self.sink)
                keys[:, : self.sink] = self.rotate(k[:, : self.sink], first[:n] + gone)
            for i in range(self.layers):
                keep = self.visible(n, row, i)
                out[i, r], _ = attend(qr[i], keys[i, keep], v[i, keep], self.d**-0.5, self.softcap)
        return out


Make = Callable[..., Cache]
"""Makes a cache of one backend from `Cache`'s other arguments."""


def prefill_decode_and_batches(make: Make, **shape: Any) -> None:
    cache = make(**shape)
    cache.add(0)
    cache.step([0], [37])
    cache.step([0], [1])
    cache.step([0], [29])  # a chunk on top of cached pages: self part, cached part and their merge
    cache.add(1, 2)
    cache.step([1, 0, 2], [50, 3, 17])  # new and old sequences in one round
    for _ in range(3):
        cache.step([2, 0, 1], [1, 1, 1])


def single_prefills(make: Make) -> None:
    cache = make()
    for n in [1, 2, 9, 10, 11, 15, 16, 17, 31, 32, 33, 48, 130]:
        cache.add(0)
        cache.step([0], [n])
        cache.step([0], [1])
        cache.remove(0)


def chunks_of_odd_lengths(make: Make) -> None:
    cache = make()
    cache.add(0)
    for n in [3, 13, 16, 1, 31, 100, 7, 256, 5]:
        cache.step([0], [n])
    for _ in range(18):  # over a page boundary, with several splits of the key range
        cache.step([0], [1])


def forks(make: Make, position: int) -> None:
    cache = make()
    cache.add(0)
    cache.step([0], [48])
    cache.fork(0, 1, position)
    cache.step([1, 0], [1, 1])
    cache.step([0, 1], [5, 21])
    cache.fork(1, 2)
    cache.fork(1, 3, min(18, len(cache.tokens[1])))
    cache.step([3, 0, 2, 1], [1, 1, 1, 1])
    cache.step([0, 1, 2, 3], [1, 7, 1, 30])
    cache.remove(1)
    cache.step([2, 3, 0], [1, 1, 1])


def many_forks(make: Make) -> None:
    cache = make()
    cache.add(0)
    cache.step([0], [20])
    for child in range(1, 6):
        cache.fork(child - 1, child)
        cache.step([child], [19])
    cache.step(list(range(6)), [1] * 6)
    cache.step([5, 2], [1, 1])


def shared_prefix(make: Make, **shape: Any) -> None:
    # Enough that the runtime joins their decode steps over the prefix into one prefill.
    cache = make(batch=48, total=4096, **shape)
    cache.add(0)
    cache.step([0], [64])
    for child in range(1, 40):
        cache.fork(0, child)
    cache.step(list(range(40)), [1] * 40)
    cache.step(list(range(40)), [1] * 40)
    if cache.layer_window is not None:
        # One call over the prefix whose rows have positions, so bounds, in no order.
        cache.step(list(range(40)), [1 + 11 * i % 23 for i in range(40)])
        cache.step(list(range(40)), [1] * 40)


def popn_and_reuse(make: Make) -> None:
    cache = make(total=256, chunk=256)
    cache.add(0, 1)
    cache.step([0, 1], [70, 20])
    cache.pop(0, 1)
    cache.step([0], [1])
    cache.pop(0, 40)
    cache.step([0, 1], [1, 1])
    cache.pop(0, 5)
    cache.step([0], [33])
    cache.remove(1)
    cache.add(1)  # takes pages that hold old tokens
    cache.step([1, 0], [45, 2])
    cache.fork(0, 2, 34)
    cache.pop(2, 20)  # into the shared prefix
    cache.step([2, 0], [1, 1])


def unwritten_slots(make: Make, window: int | None, **shape: Any) -> None:
    cache = make(total=64, chunk=64, batch=1, window=window, **shape)
    pages = runtime("attention_kv_cache_get_num_available_pages", cache.kv)
    heads = cache.q_heads + 2 * cache.kv_heads
    bad = np.full((1, 16 * (pages - 1), heads, cache.d), np.nan, DTYPES[cache.dtype])
    for n in (5, 60):
        # Fill the pages with NaN, then see that nothing of it comes back.
        cache.add(7)
        for half in np.array_split(bad, 2, 1):
            runtime(
                "kv_state_begin_forward", cache.kv, ShapeTuple([7]), ShapeTuple([half.shape[1]])
            )
            cache.vm["attend0"](cache.backend.tensor(half), cache.kv)
            runtime("kv_state_end_forward", cache.kv)
        cache.remove(7)
        cache.add(0)
        for m in (n, 3, 1):
            cache.step([0], [m])
        cache.remove(0)


def ancestors(parents: Sequence[int], node: int) -> list[int]:
    path = []
    while node != -1:
        path.append(node)
        node = parents[node]
    return path[::-1]


def check_tree(
    cache: Cache, i: int, parents: Sequence[int], out: np.ndarray, nodes: Sequence[int]
) -> None:
    """`out` rows are `nodes` of the tree that ends sequence i."""
    tokens = cache.tokens[i]
    stem, tree = tokens[: len(tokens) - len(parents)], tokens[len(tokens) - len(parents) :]
    for row, node in enumerate(nodes):
        cache.tokens[i] = stem + [tree[a] for a in ancestors(parents, node)]
        cache.check(out[:, row : row + 1], cache.expected(i, 1), f"node {node}")
    cache.tokens[i] = tokens


def trees_and_commit(make: Make, trees: Sequence[tuple[list[int], int]], **shape: Any) -> None:
    """trees: parents of the nodes and the accepted leaf, a tree for each sequence."""
    cache = make(**shape)
    ids = list(range(len(trees)))
    cache.add(*ids)
    cache.step(ids, [21 + 13 * i for i in ids])
    sizes = [len(parents) for parents, _ in trees]
    out = cache.run(ids, sizes, tree=[p for parents, _ in trees for p in parents])
    at = 0
    for i, (parents, _) in enumerate(trees):
        check_tree(cache, i, parents, out[:, at : at + len(parents)], range(len(parents)))
        at += len(parents)
    runtime(
        "attention_kv_cache_commit_accepted_token_tree_nodes",
        cache.kv,
        ShapeTuple(ids),
        ShapeTuple([leaf for _, leaf in trees]),
    )
    for i, (parents, leaf) in enumerate(trees):
        tokens = cache.tokens[i]
        tree = tokens[len(tokens) - len(parents) :]
        kept = [tree[a] for a in ancestors(parents, leaf)]
        cache.tokens[i] = tokens[: len(tokens) - len(parents)] + kept
    cache.step(ids, [1] * len(ids))  # wrong if the accepted nodes were not moved
    cache.step(ids, [3 + 17 * i for i in ids])


def grown_tree(make: Make, **shape: Any) -> None:
    cache = make(**shape)
    cache.add(0)
    cache.step([0], [18])
    grown: list[int] = []
    for parents in ([-1, 0], [0, 1, 0], [3]):
        out = cache.run([0], [len(parents)], tree=parents)
        grown += parents
        check_tree(cache, 0, grown, out, range(len(grown) - len(parents), len(grown)))


def window_past_the_wrap(make: Make, **shape: Any) -> None:
    """transformers' mask: a token at p attends positions > p - window, whatever the chunks."""
    cache = make(total=shape["window"] + 32, batch=2, **shape)
    cache.add(0)
    cache.step([0], [5])
    for _ in range(shape["window"] + 20):  # one by one through the first wrap
        cache.step([0], [1])
    for n in [17, 1, 32, 9, 16, 1, 1, 31]:
        cache.step([0], [n])
    if not cache.backend.gathers:
        return
    cache.add(1)
    cache.step([1, 0], [30, 20])
    cache.step([0, 1], [13, 29])
    for _ in range(20):
        cache.step([1, 0], [1, 1])


def long_chunks_in_window(make: Make) -> None:
    cache = make(window=40)
    cache.add(0)
    for n in [40, 1, 40, 39, 41, 90, 1, 200, 3]:
        cache.step([0], [n])


def roomy_window(make: Make) -> None:
    """The compiled window is the mask; a larger one in the runtime leaves room to take back."""
    cache = make(window=40)
    runtime("kv_state_add_sequence", cache.kv, 0)
    runtime("attention_kv_cache_enable_sliding_window_for_seq", cache.kv, 0, 40 + 19, 0)
    cache.tokens[0] = []
    for n in [30, 30, 1, 17]:
        cache.step([0], [n])
        cache.step([0], [20])
        cache.pop(0, 20)
    cache.step([0], [1])


def attention_sinks(make: Make) -> None:
    """The first tokens stay; the window counts them, and the token itself."""
    shape = {"q_heads": 4, "kv_heads": 1, "d": 48, "rotary_dim": 16, "factor": 1.2}
    cache = make(window=40, sink=5, total=128, **shape)
    cache.add(0)
    cache.step([0], [3])
    for _ in range(50):
        cache.step([0], [1])
    for n in [17, 1, 32, 9, 40]:
        cache.step([0], [n])
    if cache.backend.gathers:
        cache.add(1)
        cache.step([1, 0], [39, 1])
        cache.step([0, 1], [13, 29])
    else:
        cache.remove(0)
    cache.add(2)
    cache.step([2], [60])  # a chunk beyond the window sees its own first tokens
    cache.step(list(cache.tokens), [1] * len(cache.tokens))


def layer_windows(make: Make, window: int, **shape: Any) -> None:
    """Two layers, one windowed: chunks within and beyond the window, decode, batches and forks."""
    cache = make(layers=2, layer_window=window, **shape)
    cache.add(0)
    for n in [3, 1, window, 1, window + 1, 3 * window + 7, 2, 16]:
        cache.step([0], [n])
    for _ in range(18):  # over a page boundary
        cache.step([0], [1])
    cache.add(1, 2)
    cache.step([1, 0, 2], [2 * window + 3, 5, 1])
    for _ in range(3):
        cache.step([2, 0, 1], [1, 1, 1])
    cache.fork(0, 3, 20)
    cache.fork(1, 4)
    ids = [3, 0, 4, 1, 2]
    cache.step(ids, [1] * 5)
    cache.step(ids, [7, 1, window + 2, 1, 1])
    cache.pop(0, 21)
    cache.pop(4, 3)
    cache.step(ids, [1] * 5)
    cache.step(ids, [2, 40, 1, 17, window])


def debug_get_kv(make: Make) -> None:
    cache = make(layers=1)
    cache.add(0)
    cache.step([0], [20])
    k, v = (cache.backend.tensor(np.zeros((1, 12, 2, 32), np.float32)) for _ in range(2))
    runtime("attention_kv_cache_debug_get_kv", cache.kv, 0, 5, 17, k, v)
    tokens = np.stack(cache.tokens[0], 1).astype(np.float64)
    want = cache.rotate(tokens[:, :, 6:8], np.arange(20))[:, 5:17]
    np.testing.assert_allclose(k.numpy(), want, atol=1e-5)
    np.testing.assert_array_equal(v.numpy(), tokens[:, 5:17, 8:])
