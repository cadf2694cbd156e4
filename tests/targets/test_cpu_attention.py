"""The CPU attention kernels through the real runtime cache, against attention in float64 numpy."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import attention_cache as scenarios
import numpy as np
import pytest
import tvm
from attention_cache import DTYPES, TOLERANCE, Backend, Cache, frequencies
from tvm.script import tirx as T

from mlc_compile.targets.cpu_kernels import _attn_math as math
from mlc_compile.targets.cpu_kernels import attention
from mlc_compile.targets.cpu_kernels.attention import cpu_kv_cache_kernels
from mlc_compile.targets.kv_cache import KVCacheSpec

TARGET = {
    "kind": "llvm",
    "num-cores": 2,
    "mcpu": tvm.get_global_func("target.llvm_get_system_cpu")(),
}


@cache
def backend(vector_bits: int) -> Backend:
    kernels = partial(cpu_kv_cache_kernels, vector_bits=vector_bits)
    return Backend(kernels, tvm.target.Target(dict(TARGET)), "cpu")


def cpu_cache(*, vector_bits: int = 256, **shape: Any) -> Cache:
    return Cache(backend(vector_bits), **shape)


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
    scenarios.prefill_decode_and_batches(cpu_cache, **shape)


def test_single_prefills_of_every_small_length() -> None:
    scenarios.single_prefills(cpu_cache)


def test_chunks_of_odd_lengths_and_long_decode() -> None:
    scenarios.chunks_of_odd_lengths(cpu_cache)


@pytest.mark.parametrize("position", [1, 15, 16, 17, 32, 40, 48, -1])
def test_fork(position: int) -> None:
    scenarios.forks(cpu_cache, position)


def test_more_forks_than_the_runtime_keeps_apart() -> None:
    scenarios.many_forks(cpu_cache)


def test_many_sequences_share_a_prefix() -> None:
    scenarios.shared_prefix(cpu_cache)


def test_popn_and_reuse_of_pages() -> None:
    scenarios.popn_and_reuse(cpu_cache)


@pytest.mark.parametrize("window", [None, 40])
def test_slots_never_written_may_hold_nan(window: int | None) -> None:
    scenarios.unwritten_slots(cpu_cache, window)


def test_trees_and_their_commit() -> None:
    trees = [([-1, 0, 0, 1, 1, 2, -1], 5), ([-1, 0, 1, 0, 3], 4)]
    scenarios.trees_and_commit(cpu_cache, trees)


def test_tree_grown_over_rounds() -> None:
    scenarios.grown_tree(cpu_cache)


WINDOWS = [
    pytest.param({"window": 40}, id="window40"),
    pytest.param({"window": 33, "dtype": "float16", "vector_bits": 512}, id="window33-float16"),
]


@pytest.mark.parametrize("shape", WINDOWS)
def test_window_is_exact_far_past_the_wrap(shape: dict[str, Any]) -> None:
    scenarios.window_past_the_wrap(cpu_cache, **shape)


def test_window_and_chunks_longer_than_it() -> None:
    scenarios.long_chunks_in_window(cpu_cache)


def test_window_smaller_than_what_the_runtime_keeps() -> None:
    scenarios.roomy_window(cpu_cache)


def test_attention_sinks() -> None:
    scenarios.attention_sinks(cpu_cache)


ODD_HEADS = [
    {"d": 36, "q_heads": 2, "kv_heads": 1, "rotary_dim": 10, "dtype": "float16"},
    {"d": 20, "q_heads": 4, "kv_heads": 4},
    {"d": 40, "q_heads": 5, "kv_heads": 1, "vector_bits": 512},
    {"d": 80, "q_heads": 4, "kv_heads": 4, "rotary_dim": 32},
    {"d": 96, "q_heads": 4, "kv_heads": 2, "vector_bits": 128},
    {"d": 112, "q_heads": 4, "kv_heads": 2, "dtype": "bfloat16"},
    {"d": 256, "q_heads": 2, "kv_heads": 1, "dtype": "float16", "vector_bits": 512},
    {"d": 64, "q_heads": 23, "kv_heads": 1},
]


def first_quick(*cases: Any) -> list[Any]:
    """.ci/run does all."""
    return [cases[0], *(pytest.param(case, marks=pytest.mark.slow) for case in cases[1:])]


@pytest.mark.parametrize(
    "shape", first_quick(*ODD_HEADS), ids=lambda s: f"d{s['d']}-{s['q_heads']}heads"
)
def test_uncommon_head_sizes_with_windows_and_softcap(shape: dict[str, Any]) -> None:
    scenarios.layer_windows(cpu_cache, 24, softcap=2.0, **shape)


@pytest.mark.parametrize("window", first_quick(7, 1, 40))
def test_windowed_layers_beside_full_ones(window: int) -> None:
    scenarios.layer_windows(cpu_cache, window, rotary_dim=0 if window == 7 else None)


@pytest.mark.parametrize("window", first_quick(2, 30))
def test_windowed_layers_over_a_shared_prefix(window: int) -> None:
    """With 2 the whole prefix leaves the windows: its part of every row is empty."""
    scenarios.shared_prefix(cpu_cache, layers=2, layer_window=window, softcap=1.5)


def test_rows_whose_window_holds_no_key() -> None:
    """Cached keys 0 to 39, queries from 55 on: a window of 16 ends at 40, one position earlier
    at 39. Values are 1, so that a row that sees a key gives 1."""
    spec = KVCacheSpec(1, 2, 1, 32, "float32", (), layer_window=16)
    made = cpu_kv_cache_kernels(spec)
    kernels = {"decode": made.decode, "paged": made.prefill_paged}
    module = tvm.compile(
        tvm.IRModule({n: k.with_attr("global_symbol", n) for n, k in kernels.items()}),
        tvm.target.Target(dict(TARGET)),
    )

    def tensor(values: Any, dtype: str = "int32") -> Any:
        return tvm.runtime.tensor(np.array(values, dtype), tvm.cpu())

    pages = np.zeros((3, 2, 1, 16, 32), np.float32)
    pages[:, 0] = np.random.default_rng(0).standard_normal(pages[:, 0].shape)
    pages[:, 1] = 1
    cached = [tensor(pages, "float32"), tensor([0, 3]), tensor([0, 1, 2]), tensor([8]), tensor([0])]
    q = np.ones((3, 2, 32), np.float32)
    sizes = [0, 1.0, 1e4, -(32**-0.5)]
    for positions in ([55, 56, 54], [55, 90, 4000]):
        out, lse = tensor(np.full_like(q, 9), "float32"), tensor(np.ones((3, 2)), "float32")
        rows = [tensor([0, 3]), *cached, tensor(positions), out, lse, 0, *sizes]
        module["paged"](tensor(q, "float32"), *rows)
        seen = np.array(positions) < 55
        assert (out.numpy() == seen[:, None, None]).all()
        assert (np.abs(lse.numpy()[seen]) < 100).all() and (lse.numpy()[~seen] < -1e28).all()
    for position, seen in ((54, 1), (55, 0), (56, 0), (8000, 0)):
        out, lse = tensor(q[:1] * 9, "float32"), tensor(np.ones((1, 2)), "float32")
        module["decode"](tensor(q[:1], "float32"), *cached, tensor([position]), out, lse, *sizes)
        assert (out.numpy() == seen).all()
        assert (np.abs(lse.numpy()) < 100).all() if seen else (lse.numpy() < -1e28).all()


@pytest.mark.parametrize("window", [2, 30])
def test_trees_in_windowed_layers(window: int) -> None:
    """A window of 2 is less than the trees' depth."""
    shape = {"layers": 2, "layer_window": window, "softcap": 1.5}
    trees = [([-1, 0, 0, 1, 1, 2, -1], 5), ([-1, 0, 1, 0, 2], 4)]
    scenarios.trees_and_commit(cpu_cache, trees, **shape)
    scenarios.grown_tree(cpu_cache, **shape)


@pytest.mark.parametrize(
    "shape", [{"window": 40}, {"window": 33, "softcap": 1.5, "dtype": "float16"}]
)
def test_sliding_cache_without_rotation_or_with_softcap(shape: dict[str, Any]) -> None:
    rotary_dim = None if "softcap" in shape else 0
    scenarios.window_past_the_wrap(cpu_cache, rotary_dim=rotary_dim, **shape)


@pytest.mark.slow
def test_cache_without_rotation() -> None:
    scenarios.prefill_decode_and_batches(cpu_cache, rotary_dim=0, d=36, q_heads=4)
    scenarios.unwritten_slots(cpu_cache, None, rotary_dim=0, softcap=1.5)


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
    x = np.linspace(1e-6, math.TANH_NEAR, 100001)
    tanh = x * np.polynomial.polynomial.polyval(x * x, math.TANH_COEFFICIENTS)
    assert np.abs(tanh / np.tanh(x) - 1).max() < 9e-9
    assert abs(sum(math.HALF_PI_TERMS) - np.pi / 2) < 1e-13


def test_elementary_functions_as_compiled() -> None:
    n = 4096

    @T.prim_func(s_tir=True)
    def functions(a: T.handle, b: T.handle, c: T.handle, d: T.handle, f: T.handle) -> None:
        T.func_attr({"tirx.is_scheduled": True, "global_symbol": "functions"})
        x = T.match_buffer(a, (n,), "float32")
        y = T.match_buffer(b, (n,), "float32")
        s = T.match_buffer(c, (n,), "float32")
        e = T.match_buffer(d, (n,), "float32")
        h = T.match_buffer(f, (n,), "float32")
        for o in T.serial(n // 16):
            for i in T.vectorized(16):
                s[o * 16 + i] = math.sin(x[o * 16 + i])
                y[o * 16 + i] = math.cos(x[o * 16 + i])
                e[o * 16 + i] = math.exp2(-T.fabs(x[o * 16 + i]))
                h[o * 16 + i] = math.tanh(x[o * 16 + i])

    rng = np.random.default_rng(0)
    x = (rng.uniform(-1, 1, n) * 10 ** rng.uniform(-2, 5, n)).astype(np.float32)
    x[:2] = 0, 1e5
    arrays = [tvm.runtime.tensor(v, tvm.cpu()) for v in [x] * 5]
    module = tvm.compile(tvm.IRModule({"functions": functions}), tvm.target.Target(dict(TARGET)))
    module["functions"](*arrays)
    _, cosine, sine, power, tanh = (v.numpy() for v in arrays)
    wide = x.astype(np.float64)
    in_range = np.abs(x) < 1e5
    assert np.abs(sine - np.sin(wide))[in_range].max() < 2e-7
    assert np.abs(cosine - np.cos(wide))[in_range].max() < 2e-7
    near = np.abs(x) < 125
    assert np.abs(power[near] * 2.0 ** np.abs(wide[near]) - 1).max() < 2e-7
    assert (power[np.abs(x) > 125] == 0).all()
    assert (tanh[x == 0] == 0).all()
    nonzero = x != 0
    assert np.abs(tanh[nonzero] / np.tanh(wide[nonzero]) - 1).max() < 3e-7


def test_debug_get_kv_returns_rotated_keys_and_values() -> None:
    scenarios.debug_get_kv(cpu_cache)
