"""The devices that run portable GPU kernels here, and what of their tests runs by default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_library import DEVICES, Device

from mlc_compile.runtime import cuda_emulator, metal_emulator

HERE = Path(__file__).parent
# Of the portable kernels the cuda target uses these where it has others for the rest.
QUICK_ON_CUDA = {"test_gpu_attention.py", "test_gpu_sampling.py"}
EVERYTHING = bool(os.environ.get("MLC_COMPILE_CUDA_EVERYTHING"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "emulated(name=value, ...): not slow on the emulated devices with these parameters",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the emulated devices everything is slow but what a mark `emulated` names; of that, the
    portable kernels' whole sweeps on cuda are for MLC_COMPILE_CUDA_EVERYTHING=1: they run on Metal,
    and whole models on cuda contain those that it uses."""
    left_out: list[pytest.Item] = []
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if item.path.parent != HERE or not parameters:
            continue
        device = parameters.get("device")
        if device not in ("metal", "cuda"):
            continue
        if device == "cuda" and item.path.name not in QUICK_ON_CUDA:
            left_out.append(item)
            continue
        chosen = [mark.kwargs for mark in item.iter_markers("emulated")]
        assert all(kwargs.keys() <= parameters.keys() for kwargs in chosen), item.nodeid
        if not any(all(parameters[k] == v for k, v in kwargs.items()) for kwargs in chosen):
            if device == "cuda" and not EVERYTHING:
                left_out.append(item)
            item.add_marker(pytest.mark.slow)
    if left_out and not EVERYTHING:
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(params=list(DEVICES))
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Each device in turn. What runs by default on the emulated ones is searched for races; the
    slow rest is, too, with MLC_COMPILE_METAL_MODE=races or MLC_COMPILE_CUDA_RACES=1.
    """
    chosen = DEVICES[request.param]
    if chosen.name == "webgpu":
        request.getfixturevalue("webgpu")
        yield chosen
        return
    slow = request.node.get_closest_marker("slow")
    if chosen.name == "cuda":
        races = slow is None or bool(os.environ.get("MLC_COMPILE_CUDA_RACES"))
        with cuda_emulator.options(races=races):  # TVM's own kernels take 1024 threads
            yield chosen
        return
    changes = {} if slow else {"mode": metal_emulator.Mode.RACES}
    with chosen.strict(), metal_emulator.options(**changes):
        yield chosen
