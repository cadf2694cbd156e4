"""The portable GPU kernels as Metal code on the emulated device, against numpy, without races."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import attention_cache as scenarios
import numpy as np
import pytest
import tvm
from elementwise_reference import assert_close, random, reference_norm
from linear_reference import TOLERANCE, LinearCase, linear_spec
from metal_kernels import METAL, TARGET, device, on_device
from sampling_reference import random_probs, reference_softmax, sort
from tvm.relax.frontend.nn.llm import kv_cache as tvm_kv_cache

from mlc_compile.runtime.metal_emulator import Mode, load, options, record
from mlc_compile.targets.gpu_kernels import attention, elementwise, linear, sampling
from mlc_compile.targets.kv_cache import KVCacheSpec

WAYS = {
    "ascending": {},
    "descending": {"order": "descending"},
    "shuffled": {"order": "shuffled", "seed": 7},
    "races": {"mode": Mode.RACES},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with options(**WAYS[request.param]):
        yield request.param


def build(**kernels: Any) -> Any:
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    return load(tvm.tirx.build(tvm.IRModule(named), target=TARGET))


@functools.cache
def matmuls(scheme: str) -> tuple[Any, Any]:
    one, many = (linear_spec(scheme, 72, 288, rows=rows) for rows in (1, None))
    made = {n: linear.linear_kernel(s, device=METAL) for n, s in (("one", one), ("many", many))}
    return build(**made), LinearCase.random(many)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f32_1", "q0f16"])
def test_matmuls(scheme: str, way: str) -> None:
    library, case = matmuls(scheme)
    for name, rows in (("one", 1), ("many", 1), ("many", 5), ("many", 70)):
        inputs, out = case.inputs(rows), on_device(case.poisoned(rows))
        library[name](*map(on_device, inputs), out)
        want = inputs[0].astype(np.float64) @ case.exact.T
        size = np.abs(inputs[0].astype(np.float64)) @ np.abs(case.exact).T
        error = np.abs(out.numpy() - want) / size
        assert error.max() < TOLERANCE[case.spec.out_dtype], (name, rows)


@functools.cache
def norm(dtype: str) -> Any:
    return build(norm=elementwise.rms_norm(288, dtype, 1e-5, None, device=METAL))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_norm(dtype: str, way: str) -> None:
    x, w = random(dtype, 3, 288), random(dtype, 288, seed=1)
    out = on_device(np.full_like(x, np.nan))
    norm(dtype)["norm"](on_device(x), on_device(w), out)
    assert_close(out.numpy(), reference_norm(x, w), dtype)


@functools.cache
def samplers() -> Any:
    names = ("softmax_with_temperature", "argsort_probs")
    sizes = {"vocab_size": 4097, "active_vocab_size": 4001}
    return {n: sampling.kernel(n, **sizes, device=METAL) for n in names}


@functools.cache
def sampling_library() -> Any:
    return build(**samplers())


def sample(name: str, *arrays: np.ndarray) -> list[np.ndarray]:
    """All arguments after the call; outputs and workspaces are NaN or -1 before it."""
    symbols: dict[Any, int] = {}
    tensors = [on_device(a) for a in arrays]
    parameters = samplers()[name].params
    for parameter, array in zip(parameters, arrays, strict=False):
        symbols |= dict(zip(parameter.shape, array.shape, strict=True))
    for parameter in parameters[len(arrays) :]:
        shape = [symbols.get(e) or int(e) for e in parameter.shape]
        tensors.append(tvm.runtime.empty(shape, str(parameter.dtype), device()))
    sampling_library()[name](*tensors)
    return [t.numpy() for t in tensors[len(arrays) :]]


def test_sampling(way: str) -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((2, 1, 4097)).astype(np.float32) * 4
    temperature = np.float32([0.7, 1.3])
    probs = sample("softmax_with_temperature", logits, temperature)[0]
    want = reference_softmax(logits, temperature, 4001)
    np.testing.assert_allclose(probs, want, rtol=2e-5, atol=1e-9)
    probs = random_probs(4097, 2, seed=4)
    probs[:, 4001:] = 0
    values, ids = sample("argsort_probs", probs)[:2]
    np.testing.assert_array_equal(values, sort(probs)[0])
    np.testing.assert_array_equal(np.take_along_axis(probs, ids, 1), values)


CACHE = scenarios.Backend(
    partial(attention.gpu_kv_cache_kernels, device=METAL), TARGET, "metal", slack=2
)


def test_paged_cache() -> None:
    device()
    make = partial(scenarios.Cache, CACHE)
    with record() as launches:
        scenarios.prefill_decode_and_batches(make, q_heads=9, kv_heads=3, d=64, dtype="float16")
    names = {launch.kernel for launch in launches}
    assert {"attn_decode_kernel", "attn_prefill_paged_kernel", "attn_merge_state_kernel"} <= names
    assert max(launch.threads for launch in launches) <= METAL.max_threads


@pytest.mark.slow
def test_paged_cache_in_every_way(way: str) -> None:
    device()
    make = partial(scenarios.Cache, CACHE)
    scenarios.prefill_decode_and_batches(make, q_heads=9, kv_heads=3, d=64)
    scenarios.window_past_the_wrap(make, window=40)
    scenarios.forks(make, 16)


def merge(kernel: Any) -> tuple[np.ndarray, np.ndarray]:
    """Largest error of merging two attention states in place: of v and of s."""
    rng = np.random.default_rng(5)
    v, other_v = rng.standard_normal((2, 3, 4, 64)).astype(np.float32)
    s, other_s = rng.standard_normal((2, 3, 4)).astype(np.float32)
    tensors = [on_device(a) for a in (v, s, other_v, other_s)]
    kernel(*tensors)
    top = np.logaddexp2(s.astype(np.float64), other_s)
    want = v * np.exp2(s - top)[..., None] + other_v * np.exp2(other_s - top)[..., None]
    return np.abs(tensors[0].numpy() - want).max(), np.abs(tensors[1].numpy() - top).max()


@functools.cache
def tvm_merge() -> Any:
    """TVM's own kernel, in which every lane reads what every lane then overwrites."""
    kernel = tvm_kv_cache._merge_state_inplace(4, 64, "float32", TARGET, "tvm_merge")
    return build(tvm_merge=kernel)["tvm_merge"]


def test_a_known_race_of_tvm_is_found() -> None:
    with options(mode=Mode.RACES), pytest.raises(RuntimeError, match="race on buffer") as caught:
        merge(tvm_merge())
    assert "tvm_merge_kernel" in str(caught.value)
    assert max(merge(tvm_merge())) > 1e-2  # one lane after the other: wrong


def test_ours_merges_in_every_way(way: str) -> None:
    assert max(merge(our_merge())) < 1e-5


@functools.cache
def our_merge() -> Any:
    frequencies = tuple(scenarios.frequencies(64).tolist())
    spec = KVCacheSpec(1, 4, 2, 64, "float32", frequencies)
    made = attention.gpu_kv_cache_kernels(spec, device=METAL).merge_state
    return build(our_merge=made)["our_merge"]


def test_the_library_keeps_its_msl(tmp_path: Any) -> None:
    library = norm("float32")
    (module,) = library.imports
    assert module.kind == "metal"
    assert "kernel void norm_kernel(" in module.inspect_source()
    # and what is compiled after the device was installed is MSL as before
    kernel = elementwise.rms_norm(64, "float32", 1e-5, None, device=METAL)
    mod = tvm.IRModule({"n": kernel.with_attr("global_symbol", "n")})
    executable = tvm.tirx.build(mod, target=TARGET)
    assert "kernel void n_kernel(" in executable.imports[0].inspect_source()


def test_a_process_ends_well_with_everything_alive() -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import numpy as np\n"
        "import test_metal_kernels as t\n"
        "library = t.norm('float32')\n"
        "ones = np.ones((1, 288), np.float32)\n"
        "x, w, out = t.on_device(ones), t.on_device(ones[0]), t.on_device(ones)\n"
        "f = library['norm']; f(x, w, out)\n"
        "print(out.numpy().sum())\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert abs(float(run.stdout) - 288) < 0.01
