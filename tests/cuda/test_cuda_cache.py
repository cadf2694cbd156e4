"""The paged cache with all of the cuda target's kernels on the emulated device, with races."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial

import attention_cache as scenarios
import pytest
from attention_cache import Backend, Cache, Make

from mlc_compile.runtime import cuda_emulator
from mlc_compile.targets.cuda import BACKEND

ARCHS = (75, 80, 90)
MORE_SHAPES = [
    {"q_heads": 4, "kv_heads": 4, "d": 80, "dtype": "float16"},
    {"q_heads": 4, "kv_heads": 1, "d": 256, "dtype": "float16"},
    {"q_heads": 2, "kv_heads": 2, "d": 96, "dtype": "float32"},
    {"q_heads": 12, "kv_heads": 1, "d": 64, "dtype": "float16"},
]


@cache
def backend(archs: str) -> Backend:
    with cuda_emulator.emulated():  # asks for no compiler
        target = BACKEND.tvm_target(archs, ".so")
    return Backend(BACKEND.kv_cache_kernels(target), target, "cuda", slack=2)


@pytest.fixture(params=ARCHS)
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes a paged cache of a library for all devices, on one of them."""
    with cuda_emulator.options(arch=request.param, races=True):
        yield partial(Cache, backend("75,80,90"))


@pytest.mark.parametrize(
    "shape",
    [
        {"q_heads": 8, "kv_heads": 2, "d": 64, "dtype": "float16"},
        *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_SHAPES),
    ],
    ids=str,
)
def test_prefill_decode_and_batches(make: Make, shape: dict[str, object]) -> None:
    scenarios.prefill_decode_and_batches(make, **shape)


HALF = {"q_heads": 4, "kv_heads": 2, "d": 64, "dtype": "float16"}


@pytest.mark.slow
def test_forks(make: Make) -> None:
    scenarios.forks(partial(make, **HALF), 16)


@pytest.mark.slow
def test_slots_never_written_may_hold_nan(make: Make) -> None:
    scenarios.unwritten_slots(partial(make, **HALF), None)


@pytest.mark.slow
def test_popn_and_reuse(make: Make) -> None:
    scenarios.popn_and_reuse(partial(make, **HALF))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("d", [64, 128])
def test_bfloat16(arch: int, d: int) -> None:
    with cuda_emulator.options(arch=arch, races=True):
        make = partial(Cache, backend("80,90"))
        shape = {"q_heads": 6, "kv_heads": 2, "d": d, "dtype": "bfloat16"}
        scenarios.prefill_decode_and_batches(make, **shape)
