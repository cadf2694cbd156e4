"""GPU kernels in whole models: the libraries of the GPU targets with a host for this machine, on a
WebGPU adapter, on the emulated Metal device and, where there is one, on an NVIDIA GPU, against
transformers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architecture_cases import MECHANISMS
from every_scheme import covering
from test_architectures import CASES
from tiny_models import build

from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.runtime.verify import verify
from mlc_compile.targets.profile import TARGETS

# One target for each kind of device that runs kernels here.
DEVICES = {p.device: name for name, p in reversed(TARGETS.items()) if p.device != "cpu"}
FAMILY = ("llama", "mistral", "llama-sinks", "llama-biases", "qwen3", "llama-scaled")
QUICK = {
    ("webgpu", "qwen3", "q0f32"),
    ("webgpu", "llama", "q4f16_1"),
    ("metal", "llama", "q4f16_1"),
    ("cuda", "llama", "q4f16_1"),
}


def cases() -> list[Any]:
    """Each mechanism in float32 and each kind of scheme on every device; the Llama family on one
    each, as its kernels are the same portable ones."""
    turns = itertools.cycle(d for d in DEVICES if d != "cuda")
    found = [(next(turns), name, "q0f32") for name in FAMILY]
    for device, name in itertools.product(DEVICES, MECHANISMS):
        found.append((device, name, "q0f32"))
    for device in DEVICES:
        for scheme in covering("q4f16_1", "q0f32", dtypes=TARGETS[DEVICES[device]].dtypes):
            found.append((device, "llama", scheme))
    found = sorted({*found, *QUICK})
    return [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in found]


def test_every_device_is_among_the_quick_cases() -> None:
    assert {device for device, _, _ in QUICK} == set(DEVICES)


@pytest.mark.parametrize(("device", "name", "scheme"), cases())
def test_library_equals_transformers(
    device: str,
    name: str,
    scheme: str,
    checkpoint: Callable[..., Path],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    if device in ("webgpu", "cuda"):
        request.getfixturevalue(device)
    case = CASES[name]
    source, sizes, skipped = checkpoint(case), case.sizes, case.skipped
    if "sliding_window_size" in sizes:
        sizes = {**sizes, "max_batch_size": TARGETS[DEVICES[device]].max_windowed_sequences or 1}
        skipped |= {"ragged_batch", "fork"}
    target = DEVICES[device] + (":auto" if device == "cuda" else "")
    built = build(source, scheme, tmp_path, sizes, target=target)
    steps = 24 if "sliding_window_size" in sizes else 8  # past the window
    report = verify(built.directory, built.library, source, decode_steps=steps)
    print(report.to_text())
    assert report.failures == []
    assert {s.name for s in report.scenarios if s.skipped} == skipped
    worst = max(s.worst("nmse") for s in report.scenarios)
    assert worst < {"float32": 1e-9, "float16": 1e-3}[SCHEMES[scheme].model_dtype]
