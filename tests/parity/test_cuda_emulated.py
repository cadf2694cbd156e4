"""Whole models on the emulated CUDA device against transformers: a library for several devices, run
as each of them. Speed, and what nvcc makes of the same source, only a GPU shows
(test_gpu_targets.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from architecture_cases import MECHANISMS, Case
from cases_llama import CASES as LLAMA
from every_scheme import covering
from test_architectures import CASES
from tiny_models import build

from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.runtime import cuda_emulator
from mlc_compile.runtime.verify import verify
from mlc_compile.targets.profile import TARGETS

ARCHS = (75, 80, 90)
# What matrix units and vectors of 16 bytes divide; others are the odd sizes of the tiny models.
EVEN = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64}
ALL = {
    "one-layer": Case("llama", {**EVEN, "num_hidden_layers": 1}),
    "even": Case("llama", EVEN),
    "even-128": Case("qwen3", {**EVEN, "head_dim": 128}),
    **LLAMA,
    **{name: CASES[name] for name in MECHANISMS},
}
WINDOWS = ("mistral", "llama-sinks")
QUICK = {("one-layer", "q4f16_1", 75)}


def cases() -> list[Any]:
    """Every mechanism, and each kind of scheme on even sizes; the devices take turns."""
    wide = [(name, "q4f16_1", ARCHS) for name in ALL if name not in LLAMA or name in WINDOWS]
    wide += [(name, "q0f32", ARCHS) for name in ("llama", *WINDOWS)]
    for scheme in covering("q4f16_1", "q0f32"):
        if scheme not in ("q4f16_1", "q0f32"):
            bfloat16 = SCHEMES[scheme].model_dtype == "bfloat16"
            wide.append(("even", scheme, ARCHS[1:] if bfloat16 else ARCHS))
    found = [(name, scheme, of[i % len(of)]) for i, (name, scheme, of) in enumerate(wide)]
    found += sorted(QUICK - set(found))
    return [c if c in QUICK else pytest.param(*c, marks=pytest.mark.slow) for c in found]


@pytest.mark.parametrize(("name", "scheme", "arch"), cases())
def test_library_equals_transformers(
    name: str, scheme: str, arch: int, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    case = ALL[name]
    source, sizes, skipped = checkpoint(case), case.sizes, case.skipped
    if "sliding_window_size" in sizes:
        sizes = {**sizes, "max_batch_size": TARGETS["cuda"].max_windowed_sequences or 1}
        skipped |= {"ragged_batch", "fork"}
    dtype = SCHEMES[scheme].model_dtype
    target = "cuda:sm_80,sm_90" if dtype == "bfloat16" else "cuda:sm_75,sm_80,sm_90"
    quick = (name, scheme, arch) in QUICK
    steps = 24 if "sliding_window_size" in sizes else 8  # past the window
    # Races are searched for where that takes seconds; the kernels' own tests do as well.
    with cuda_emulator.emulated(arch=arch, races=quick):
        built = build(source, scheme, tmp_path, sizes, target=target)
        report = verify(built.directory, built.library, source, decode_steps=steps)
    print(report.to_text())
    assert report.failures == []
    assert {s.name for s in report.scenarios if s.skipped} == skipped
    worst = max(s.worst("nmse") for s in report.scenarios)
    assert worst < {"float32": 1e-9, "float16": 1e-3, "bfloat16": 3e-2}[dtype]


@pytest.mark.slow
def test_graphs_and_dependent_launches(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    case = ALL["one-layer"]
    source, sizes, skipped = checkpoint(case), case.sizes, case.skipped
    with cuda_emulator.emulated(arch=90, races=True), cuda_emulator.record() as launches:
        built = build(source, "q4f16_1", tmp_path, sizes, opt="O3", target="cuda:sm_90")
        report = verify(built.directory, built.library, source, decode_steps=8)
    assert report.failures == []
    assert {s.name for s in report.scenarios if s.skipped} == skipped
    assert any(launch.replayed for launch in launches)
    assert any(launch.dependent for launch in launches)
