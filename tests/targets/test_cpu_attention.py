"""The CPU attention kernels through the real runtime cache, against attention in float64 numpy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.runtime import ShapeTuple
from tvm.script import tirx as T

from mlc_compile.nn.kv_cache import PAGE_SIZE, PagedKVCache, create_kv_cache
from mlc_compile.targets.cpu_kernels import _attn_math as math
from mlc_compile.targets.cpu_kernels import attention
from mlc_compile.targets.cpu_kernels.attention import cpu_kv_cache_kernels
from mlc_compile.targets.kv_cache import KVCacheSpec
from mlc_compile.targets.parsing import fast_parsing

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
TOLERANCE = {"float32": 5e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
TARGET = {
    "kind": "llvm",
    "num-cores": 2,
    "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")(),
}


def frequencies(rotary_dim: int) -> np.ndarray:
    return (10000.0 ** (-np.arange(0, rotary_dim, 2) / rotary_dim)).astype(np.float32)


class Attend(nn.Module):
    """Layers of attention alone: fused q, k, v in, attention output out."""

    def __init__(self, numbers: dict[str, Any], vector_bits: int) -> None:
        self.numbers = numbers
        self.vector_bits = vector_bits

    def create(
        self,
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
    ) -> PagedKVCache:
        return create_kv_cache(
            kernels=partial(cpu_kv_cache_kernels, vector_bits=self.vector_bits),
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            **self.numbers,
        )

    def attend(self, qkv: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        layers, heads = self.numbers["num_layers"], self.numbers["num_qo_heads"]
        d = self.numbers["head_dim"]
        if layers == 1:
            return kv.attention_with_fused_qkv(0, qkv, heads, d**-0.5)
        outs = [
            kv.attention_with_fused_qkv(
                i, nn.op.take(qkv, nn.Tensor.from_const(np.array([i])), 0), heads, d**-0.5
            )
            for i in range(layers)
        ]
        return nn.op.concat(outs, 0)


@cache
def library(numbers: tuple[tuple[str, Any], ...], vector_bits: int = 256) -> relax.VirtualMachine:
    values = dict(numbers)
    values["inv_freq"] = np.array(values["inv_freq"], np.float32)
    model = Attend(values, vector_bits)
    heads = values["num_qo_heads"] + 2 * values["num_kv_heads"]
    plain = {"param_mode": "none", "effect_mode": "none"}
    qkv = nn.spec.Tensor([values["num_layers"], "n", heads, values["head_dim"]], values["dtype"])
    sizes = [
        "max_batch_size",
        "max_total_seq_len",
        "prefill_chunk_size",
        "page_size",
        "support_sliding_window",
    ]
    spec = nn.spec.ModuleSpec.from_raw(
        {
            "create": {**dict.fromkeys(sizes, int), "$": plain},
            "attend": {
                "qkv": qkv,
                "kv": nn.spec.Object(object_type=PagedKVCache),
                "$": plain,
            },
        },
        model,
    )
    with fast_parsing():
        mod = model.export_tvm(spec=spec)[0]
    target = tvm.target.Target(dict(TARGET))
    return relax.VirtualMachine(relax.build(mod, target), tvm.cpu())


def runtime(name: str, *args: Any) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")(*args)


class Cache:
    """A runtime cache beside a plain record of every token, and the check of one by the other."""

    def __init__(
        self,
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
        vector_bits: int = 256,
        batch: int = 8,
        total: int = 2048,
        chunk: int = 512,
        seed: int = 0,
    ) -> None:
        self.q_heads, self.kv_heads, self.d, self.layers = q_heads, kv_heads, d, layers
        self.dtype, self.window, self.sink, self.factor = dtype, window, sink, factor
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
            ),
            vector_bits,
        )
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
        out = self.vm["attend"](tvm.runtime.tensor(qkv, tvm.cpu()), self.kv).numpy()
        runtime("kv_state_end_forward", self.kv)
        at = 0
        for i, n in zip(ids, lengths, strict=True):
            self.tokens[i].extend(qkv[:, at + j] for j in range(n))
            at += n
        return out

    def step(self, ids: Sequence[int], lengths: Sequence[int]) -> None:
        """A round whose rows are all checked."""
        out = self.run(ids, lengths)
        at = 0
        for i, n in zip(ids, lengths, strict=True):
            self.check(out[:, at : at + n], self.expected(i, n), f"sequence {i}, {n} rows")
            at += n

    def check(self, got: np.ndarray, want: np.ndarray, what: str) -> None:
        error = float(np.abs(got.astype(np.float64) - want).max())
        assert error < TOLERANCE[self.dtype], (what, error)
        self.worst = max(self.worst, error)

    def visible(self, length: int, row: int) -> np.ndarray:
        keys = np.arange(length)
        mask = keys <= row
        if self.window is not None:
            near = keys > row - (self.window - self.sink)
            mask &= near | (keys < self.sink)
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
            keep = self.visible(n, row)
            qr = self.rounded(self.rotate(q[:, row], np.full(self.layers, row)))
            keys = near
            if self.sink:
                # Attention sinks keep the distance that a token at the end of the window has.
                gone = max(n - rows - self.window, 0) if self.window else 0
                keys = near.copy()
                first = np.arange(self.sink)
                keys[:, : self.sink] = self.rotate(k[:, : self.sink], first[:n] + gone)
            out[:, r] = self.attention(qr, keys[:, keep], v[:, keep])
        return out

    def attention(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """q [layers, q, d], k and v [layers, n, kv, d] -> [layers, q, d]"""
        group = self.q_heads // self.kv_heads
        k, v = np.repeat(k, group, 2), np.repeat(v, group, 2)
        score = np.einsum("lhd,lnhd->lhn", q, k) * self.d**-0.5
        p = np.exp(score - score.max(-1, keepdims=True))
        return np.einsum("lhn,lnhd->lhd", p / p.sum(-1, keepdims=True), v)


GROUPS = [
    pytest.param({"q_heads": 6, "kv_heads": 2, "d": 32}, id="gqa3-d32"),
    pytest.param(
        {"q_heads": 3, "kv_heads": 3, "d": 64, "dtype": "bfloat16", "vector_bits": 128},
        id="mha-d64-bfloat16-128bit",
    ),
    pytest.param({"q_heads": 4, "kv_heads": 1, "d": 80, "vector_bits": 512}, id="gqa4-d80-512bit"),
    pytest.param(
        {"q_heads": 8, "kv_heads": 1, "d": 96, "rotary_dim": 48, "factor": 1.3},
        id="gqa8-d96-partial",
    ),
    pytest.param(
        {"q_heads": 14, "kv_heads": 2, "d": 128, "dtype": "float16", "layers": 2},
        id="gqa7-d128-float16",
    ),
]


@pytest.mark.parametrize("shape", GROUPS)
def test_prefill_decode_and_batches(shape: dict[str, Any]) -> None:
    cache = Cache(**shape)
    cache.add(0)
    cache.step([0], [37])
    cache.step([0], [1])
    cache.step([0], [29])  # a chunk on top of cached pages: self part, cached part and their merge
    cache.add(1, 2)
    cache.step([1, 0, 2], [50, 3, 17])  # new and old sequences in one round
    for _ in range(3):
        cache.step([2, 0, 1], [1, 1, 1])


def test_single_prefills_of_every_small_length() -> None:
    cache = Cache()
    for n in [1, 2, 9, 10, 11, 15, 16, 17, 31, 32, 33, 48, 130]:
        cache.add(0)
        cache.step([0], [n])
        cache.step([0], [1])
        cache.remove(0)


def test_chunks_of_odd_lengths_and_long_decode() -> None:
    cache = Cache()
    cache.add(0)
    for n in [3, 13, 16, 1, 31, 100, 7, 256, 5]:
        cache.step([0], [n])
    for _ in range(18):  # over a page boundary, with several splits of the key range
        cache.step([0], [1])


@pytest.mark.parametrize("position", [1, 15, 16, 17, 32, 40, 48, -1])
def test_fork(position: int) -> None:
    cache = Cache()
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


def test_more_forks_than_the_runtime_keeps_apart() -> None:
    cache = Cache()
    cache.add(0)
    cache.step([0], [20])
    for child in range(1, 6):
        cache.fork(child - 1, child)
        cache.step([child], [19])
    cache.step(list(range(6)), [1] * 6)
    cache.step([5, 2], [1, 1])


def test_many_sequences_share_a_prefix() -> None:
    # Enough that the runtime joins their decode steps over the prefix into one prefill.
    cache = Cache(batch=48, total=4096)
    cache.add(0)
    cache.step([0], [64])
    for child in range(1, 40):
        cache.fork(0, child)
    cache.step(list(range(40)), [1] * 40)
    cache.step(list(range(40)), [1] * 40)


def test_popn_and_reuse_of_pages() -> None:
    cache = Cache(total=256, chunk=256)
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


@pytest.mark.parametrize("window", [None, 40])
def test_slots_never_written_may_hold_nan(window: int | None) -> None:
    cache = Cache(total=64, chunk=64, batch=1, window=window)
    pages = runtime("attention_kv_cache_get_num_available_pages", cache.kv)
    bad = np.full((1, 16 * (pages - 1), 10, 32), np.nan, np.float32)
    for n in (5, 60):
        # Fill the pages with NaN, then see that nothing of it comes back.
        cache.add(7)
        for half in np.array_split(bad, 2, 1):
            runtime(
                "kv_state_begin_forward", cache.kv, ShapeTuple([7]), ShapeTuple([half.shape[1]])
            )
            cache.vm["attend"](tvm.runtime.tensor(half, tvm.cpu()), cache.kv)
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


def test_trees_and_their_commit() -> None:
    cache = Cache()
    cache.add(0, 1)
    cache.step([0, 1], [21, 34])
    first, second = [-1, 0, 0, 1, 1, 2, -1], [-1, 0, 1, 0, 3]
    out = cache.run([0, 1], [7, 5], tree=first + second)
    check_tree(cache, 0, first, out[:, :7], range(7))
    check_tree(cache, 1, second, out[:, 7:], range(5))
    runtime(
        "attention_kv_cache_commit_accepted_token_tree_nodes",
        cache.kv,
        ShapeTuple([0, 1]),
        ShapeTuple([5, 4]),
    )
    for i, parents, leaf in ((0, first, 5), (1, second, 4)):
        tokens = cache.tokens[i]
        tree = tokens[len(tokens) - len(parents) :]
        kept = [tree[a] for a in ancestors(parents, leaf)]
        cache.tokens[i] = tokens[: len(tokens) - len(parents)] + kept
    cache.step([0, 1], [1, 1])  # wrong if the accepted nodes' keys or values were not moved
    cache.step([0, 1], [3, 20])


def test_tree_grown_over_rounds() -> None:
    cache = Cache()
    cache.add(0)
    cache.step([0], [18])
    grown: list[int] = []
    for parents in ([-1, 0], [0, 1, 0], [3]):
        out = cache.run([0], [len(parents)], tree=parents)
        grown += parents
        check_tree(cache, 0, grown, out, range(len(grown) - len(parents), len(grown)))


WINDOWS = [
    pytest.param({"window": 40}, id="window40"),
    pytest.param({"window": 33, "dtype": "float16", "vector_bits": 512}, id="window33-float16"),
]


@pytest.mark.parametrize("shape", WINDOWS)
def test_window_is_exact_far_past_the_wrap(shape: dict[str, Any]) -> None:
    """transformers' mask: a token at p attends positions > p - window, whatever the chunks."""
    cache = Cache(total=shape["window"] + 32, batch=2, **shape)
    cache.add(0)
    cache.step([0], [5])
    for _ in range(shape["window"] + 20):  # one by one through the first wrap
        cache.step([0], [1])
    for n in [17, 1, 32, 9, 16, 1, 1, 31]:
        cache.step([0], [n])
    cache.add(1)
    cache.step([1, 0], [30, 20])
    cache.step([0, 1], [13, 29])
    for _ in range(20):
        cache.step([1, 0], [1, 1])


def test_window_and_chunks_longer_than_it() -> None:
    cache = Cache(window=40)
    cache.add(0)
    for n in [40, 1, 40, 39, 41, 90, 1, 200, 3]:
        cache.step([0], [n])


def test_window_smaller_than_what_the_runtime_keeps() -> None:
    """The compiled window is the mask; a larger one in the runtime leaves room to take back."""
    cache = Cache(window=40)
    runtime("kv_state_add_sequence", cache.kv, 0)
    runtime("attention_kv_cache_enable_sliding_window_for_seq", cache.kv, 0, 40 + 19, 0)
    cache.tokens[0] = []
    for n in [30, 30, 1, 17]:
        cache.step([0], [n])
        cache.step([0], [20])
        cache.pop(0, 20)
    cache.step([0], [1])


def test_attention_sinks() -> None:
    """The first tokens stay; the window counts them, and the token itself."""
    shape = {"q_heads": 4, "kv_heads": 1, "d": 48, "rotary_dim": 16, "factor": 1.2}
    cache = Cache(window=40, sink=5, total=128, **shape)
    cache.add(0)
    cache.step([0], [3])
    for _ in range(50):
        cache.step([0], [1])
    for n in [17, 1, 32, 9, 40]:
        cache.step([0], [n])
    cache.add(1)
    cache.step([1, 0], [39, 1])
    cache.step([0, 1], [13, 29])
    cache.add(2)
    cache.step([2], [60])  # a chunk beyond the window sees its own first tokens
    cache.step([2, 1, 0], [1, 1, 1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merge_of_empty_sides(dtype: str) -> None:
    spec = KVCacheSpec(1, 2, 1, 32, dtype, tuple(frequencies(32).tolist()))
    kernel = attention._merge_state(spec, attention.Tiling.of(spec, 256))
    kernel = kernel.with_attr("global_symbol", "merge")
    merge = tvm.compile(tvm.IRModule({"merge": kernel}), tvm.target.Target(dict(TARGET)))["merge"]
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((4, 2, 32)).astype(DTYPES[dtype]) for _ in range(2))
    a[1] = b[2] = a[3] = b[3] = 0
    s, t = (rng.standard_normal((4, 2)).astype(np.float32) for _ in range(2))
    s[1] = t[2] = s[3] = t[3] = -1e29
    arrays = [tvm.runtime.tensor(x, tvm.cpu()) for x in (a, s, b, t)]
    merge(*arrays)
    out, lse = arrays[0].numpy(), arrays[1].numpy()
    w = 1 / (1 + 2.0 ** (t[0] - s[0]))[:, None]
    np.testing.assert_allclose(out[0], w * a[0] + (1 - w) * b[0], atol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse[0], np.log2(2.0 ** s[0] + 2.0 ** t[0]), rtol=1e-6, atol=1e-6)
    assert (out[1] == b[1]).all() and (lse[1] == t[1]).all()
    assert (out[2] == a[2]).all() and (lse[2] == s[2]).all()
    assert (out[3] == 0).all() and (lse[3] < -1e28).all()


def test_polynomials() -> None:
    """The documented errors of the compiled-in coefficients."""
    t = np.linspace(-0.5, 0.5, 100001)
    exp2 = np.polynomial.polynomial.polyval(t, math.EXP2_COEFFICIENTS)
    assert np.abs(exp2 / 2.0**t - 1).max() < 2e-8
    r = np.linspace(0, np.pi / 4, 100001)
    sine = r * np.polynomial.polynomial.polyval(r * r, math.SIN_COEFFICIENTS)
    cosine = np.polynomial.polynomial.polyval(r * r, math.COS_COEFFICIENTS)
    assert np.abs(sine - np.sin(r)).max() < 4e-9
    assert np.abs(cosine - np.cos(r)).max() < 3e-9
    assert abs(sum(math.HALF_PI_TERMS) - np.pi / 2) < 1e-13


def test_elementary_functions_as_compiled() -> None:
    n = 4096

    @T.prim_func(s_tir=True)
    def functions(a: T.handle, b: T.handle, c: T.handle, d: T.handle) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "functions"})
        x = T.match_buffer(a, (n,), "float32")
        y = T.match_buffer(b, (n,), "float32")
        s = T.match_buffer(c, (n,), "float32")
        e = T.match_buffer(d, (n,), "float32")
        for o in T.serial(n // 16):
            for i in T.vectorized(16):
                s[o * 16 + i] = math.sin(x[o * 16 + i])
                y[o * 16 + i] = math.cos(x[o * 16 + i])
                e[o * 16 + i] = math.exp2(-T.fabs(x[o * 16 + i]))

    rng = np.random.default_rng(0)
    x = (rng.uniform(-1, 1, n) * 10 ** rng.uniform(-2, 5, n)).astype(np.float32)
    x[:2] = 0, 1e5
    arrays = [tvm.runtime.tensor(v, tvm.cpu()) for v in (x, x, x, x)]
    module = tvm.compile(tvm.IRModule({"functions": functions}), tvm.target.Target(dict(TARGET)))
    module["functions"](*arrays)
    _, cosine, sine, power = (v.numpy() for v in arrays)
    wide = x.astype(np.float64)
    in_range = np.abs(x) < 1e5
    assert np.abs(sine - np.sin(wide))[in_range].max() < 2e-7
    assert np.abs(cosine - np.cos(wide))[in_range].max() < 2e-7
    near = np.abs(x) < 125
    assert np.abs(power[near] * 2.0 ** np.abs(wide[near]) - 1).max() < 2e-7
    assert (power[np.abs(x) > 125] == 0).all()


def test_debug_get_kv_returns_rotated_keys_and_values() -> None:
    cache = Cache(layers=1)
    cache.add(0)
    cache.step([0], [20])
    k, v = (tvm.runtime.tensor(np.zeros((1, 12, 2, 32), np.float32), tvm.cpu()) for _ in range(2))
    runtime("attention_kv_cache_debug_get_kv", cache.kv, 0, 5, 17, k, v)
    tokens = np.stack(cache.tokens[0], 1).astype(np.float64)
    want = cache.rotate(tokens[:, :, 6:8], np.arange(20))[:, 5:17]
    np.testing.assert_allclose(k.numpy(), want, atol=1e-5)
    np.testing.assert_array_equal(v.numpy(), tokens[:, 5:17, 8:])
