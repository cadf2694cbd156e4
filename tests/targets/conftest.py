"""The devices that run portable GPU kernels here, and what of their tests runs by default."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_library import DEVICES, Device

from mlc_compile.runtime import metal_emulator

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "emulated(name=value, ...): not slow on the emulated Metal device with these parameters",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the emulated Metal device everything is slow but what a mark `emulated` names."""
    for item in items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if item.path.parent != HERE or not parameters or parameters.get("device") != "metal":
            continue
        chosen = [mark.kwargs for mark in item.iter_markers("emulated")]
        assert all(kwargs.keys() <= parameters.keys() for kwargs in chosen), item.nodeid
        if not any(all(parameters[k] == v for k, v in kwargs.items()) for kwargs in chosen):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=list(DEVICES))
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """Each device in turn. What runs by default on the emulated one is searched for races; the
    slow rest is, too, with MLC_COMPILE_METAL_MODE=races.
    """
    chosen = DEVICES[request.param]
    if chosen.name == "webgpu":
        request.getfixturevalue("webgpu")
        yield chosen
        return
    slow = request.node.get_closest_marker("slow")
    changes = {} if slow else {"mode": metal_emulator.Mode.RACES}
    with chosen.strict(), metal_emulator.options(**changes):
        yield chosen
