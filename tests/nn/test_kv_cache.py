"""The KV cache front end: argument checks, the exported library, what it does not consult."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax.frontend import nn
from tvm.runtime import ShapeTuple

from mlc_compile.errors import InputError
from mlc_compile.nn.kv_cache import KVCacheSpec, PagedKVCache, create_kv_cache
from mlc_compile.targets.cpu_kernels.attention import cpu_kv_cache_kernels
from mlc_compile.targets.parsing import fast_parsing

HEADS, D = 2, 16
SIZES = [
    "max_batch_size",
    "max_total_seq_len",
    "prefill_chunk_size",
    "page_size",
    "support_sliding_window",
]


class Model(nn.Module):
    def __init__(self, inv_freq: np.ndarray, **numbers: Any) -> None:
        self.inv_freq = inv_freq
        self.numbers = numbers

    def create_tir_paged_kv_cache(
        self,
        max_batch_size: Any,
        max_total_seq_len: Any,
        prefill_chunk_size: Any,
        page_size: Any,
        support_sliding_window: Any,
    ) -> PagedKVCache:
        return create_kv_cache(
            kernels=partial(cpu_kv_cache_kernels, vector_bits=128),
            num_layers=1,
            num_qo_heads=HEADS,
            num_kv_heads=HEADS,
            head_dim=D,
            dtype="float32",
            inv_freq=self.inv_freq,
            attention_factor=1.0,
            max_batch_size=max_batch_size,
            max_total_seq_len=max_total_seq_len,
            prefill_chunk_size=prefill_chunk_size,
            page_size=page_size,
            support_sliding_window=support_sliding_window,
            **self.numbers,
        )

    def attend(self, qkv: nn.Tensor, kv: PagedKVCache) -> nn.Tensor:
        return kv.attention_with_fused_qkv(0, qkv, HEADS, D**-0.5)

    def graph(self) -> tvm.IRModule:
        plain = {"param_mode": "none", "effect_mode": "none"}
        kv = nn.spec.Object(object_type=PagedKVCache)
        spec = {
            "create_tir_paged_kv_cache": {**dict.fromkeys(SIZES, int), "$": plain},
            "attend": {
                "qkv": nn.spec.Tensor([1, "n", 3 * HEADS, D], "float32"),
                "kv": kv,
                "$": plain,
            },
        }
        with fast_parsing():
            return self.export_tvm(spec=nn.spec.ModuleSpec.from_raw(spec, self))[0]


def call(name: str, *args: Any) -> Any:
    return tvm.get_global_func(f"vm.builtin.{name}")(*args)


def create(vm: relax.VirtualMachine, page_size: int = 16, sliding: int = 0) -> Any:
    numbers = (2, 64, 32, page_size, sliding)
    return vm["create_tir_paged_kv_cache"](*(ShapeTuple([x]) for x in numbers))


def attend(vm: relax.VirtualMachine, kv: Any, qkv: np.ndarray) -> np.ndarray:
    call("kv_state_add_sequence", kv, 0)
    call("kv_state_begin_forward", kv, ShapeTuple([0]), ShapeTuple([qkv.shape[1]]))
    out = vm["attend"](tvm.runtime.tensor(qkv, tvm.cpu()), kv).numpy()
    call("kv_state_end_forward", kv)
    return out


def reference(qkv: np.ndarray, inv_freq: np.ndarray) -> np.ndarray:
    """Causal attention of one sequence from position 0: [1, n, q, d] float64."""
    q, k, v = np.split(qkv[0].astype(np.float64), 3, 1)
    n, half = len(q), len(inv_freq)
    angle = (np.arange(n)[:, None] * inv_freq.astype(np.float64))[:, None]

    def rotate(x: np.ndarray) -> np.ndarray:
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        c, s = np.cos(angle), np.sin(angle)
        return np.concatenate([a * c - b * s, b * c + a * s, rest], -1)

    score = np.einsum("ihd,jhd->hij", rotate(q), rotate(k)) * D**-0.5
    score[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
    p = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v)[None]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared library whose frequencies are no formula's: they must come from its constant."""
    path = tmp_path_factory.mktemp("kv") / "lib.so"
    module = Model(frequencies()).graph()
    relax.build(module, tvm.target.Target("llvm")).export_library(str(path))
    return path


def frequencies() -> np.ndarray:
    return np.random.default_rng(3).uniform(0, 1, D // 2).astype(np.float32)


def test_table_survives_export_and_load(library: Path) -> None:
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    qkv = np.random.default_rng(0).standard_normal((1, 20, 3 * HEADS, D)).astype(np.float32)
    out = attend(vm, create(vm), qkv)
    np.testing.assert_allclose(out, reference(qkv, frequencies()), atol=5e-6)


def test_callers_page_size_and_window_flag_are_not_consulted(library: Path) -> None:
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    qkv = np.random.default_rng(0).standard_normal((1, 20, 3 * HEADS, D)).astype(np.float32)
    out = attend(vm, create(vm, page_size=32, sliding=1), qkv)
    np.testing.assert_allclose(out, reference(qkv, frequencies()), atol=5e-6)


def test_full_attention_refuses_a_window(library: Path) -> None:
    vm = relax.VirtualMachine(tvm.runtime.load_module(str(library)), tvm.cpu())
    kv = create(vm)
    call("kv_state_add_sequence", kv, 0)
    with pytest.raises(tvm.error.InternalError, match="does not support sliding window"):
        call("attention_kv_cache_enable_sliding_window_for_seq", kv, 0, 8, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "6 query heads do not divide into 4"),
        ({"inv_freq": (1.0,) * 9}, "rotary_dim 18 exceeds head_dim 16"),
        ({"dtype": "float64"}, "float64.*use one of float32, float16, bfloat16"),
        ({"attention_sink": 4}, "sinks need a sliding window"),
        ({"sliding_window": 4, "attention_sink": 4}, "4 must be less than sliding_window_size 4"),
        ({"sliding_window": 0}, "must be less than sliding_window_size 0"),
    ],
)
def test_numbers_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    numbers: dict[str, Any] = {
        "num_layers": 1,
        "num_qo_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 16,
        "dtype": "float32",
        "inv_freq": (1.0,) * 8,
    }
    KVCacheSpec(**numbers)
    with pytest.raises(InputError, match=message):
        KVCacheSpec(**{**numbers, **change})


@pytest.mark.parametrize(
    "table", [np.ones(8), np.ones((2, 4), np.float32)], ids=["float64", "two axes"]
)
def test_table_of_wrong_kind(table: np.ndarray) -> None:
    with pytest.raises(InputError, match="inv_freq must be float32 of rank 1"):
        Model(table).graph()
