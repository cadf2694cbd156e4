"""The promise of `--max-ram`, as the benchmark measures it, on checkpoints of hundreds of MB."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "convert_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("scheme", "promise", "options"),
    [
        ("q4f16_0", "400MiB", ["--device", "numpy"]),
        # Barely more than the interpreter and one item take.
        ("q0f32", "120MiB", ["--device", "numpy", "--jobs", "8"]),
    ],
)
def test_peak_stays_below_the_promise(
    tmp_path: Path, scheme: str, promise: str, options: list[str]
) -> None:
    spec = importlib.util.spec_from_file_location("convert_memory", SCRIPT)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    result = benchmark.measure([0.15, 0.3], [scheme], promise, tmp_path, options)
    assert result["ok"], result
    assert {run["scheme"] for run in result["runs"]} == {scheme}
