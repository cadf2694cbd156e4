"""Speed of whole models through WGSL kernels on this machine's GPU (PyPI `wgpu`), random weights.

    python benchmarks/webgpu_model.py LIBRARY.so... [--json FILE]

LIBRARY: `mlc_compile compile DIR --target webgpu -o LIBRARY.so`. Needs numpy, wgpu, a Vulkan, Metal
or Direct3D driver, and of TVM only the runtime (TVM_USE_RUNTIME_LIB=1); no parameters and no
tokenizer: weights are random words, so the text is noise and the time is real.

Each dispatch costs tens of microseconds of Python here, so decode of small models measures the
host. Memory is the peak of all buffers against the plan without its reserve.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.runtime import webgpu_device
from mlc_compile.runtime.engine import Engine, Library


def random_params(library: Library) -> list[Any]:
    """Any bits for words, small numbers for floats."""
    rng = np.random.default_rng(0)
    params = []
    for param in library.params:
        if param.dtype == "uint32":
            array = rng.integers(0, 1 << 32, param.shape, dtype=np.uint32)
        else:
            array = (rng.standard_normal(param.shape, np.float32) * 0.01).astype(param.dtype)
        params.append(library.tensor(array))
    return params


def steady(step: Any, seconds: float, least: int) -> float:
    """Median seconds of a step after two for warming up."""
    times: list[float] = []
    for _ in range(2):
        step()
    started = time.perf_counter()
    while len(times) < least or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def measure(path: Path, seconds: float) -> dict[str, Any]:
    """Prefill and decode of one library."""
    library = Library(path)
    before, _ = webgpu_device.memory_bytes()
    started = time.perf_counter()
    engine = Engine.with_params(library, random_params(library))
    load = time.perf_counter() - started
    plan = library.metadata["mlc_compile"]["memory_plan"]
    result: dict[str, Any] = {
        "library": path.name,
        "quantization": library.metadata["quantization"],
        "weights": plan["weights"],
        "load_s": round(load, 1),
    }
    for rows in (128, 512):
        if rows > engine.chunk:
            continue

        def prefill(rows: int = rows) -> None:
            engine.clear()
            engine.add_sequence(0)
            engine.prefill(0, [1] * rows)

        result[f"prefill_{rows}"] = round(rows / steady(prefill, seconds, 3), 1)
    for depth in (128, 2048):
        if depth + 64 > engine.context:
            continue
        engine.clear()
        engine.add_sequence(0)
        engine.prefill(0, [1] * depth)

        def decode() -> None:
            engine.decode(0, 1)
            engine.pop(0, 1)

        took = steady(decode, seconds, 5)
        result[f"decode_{depth}"] = round(1 / took, 1)
        result[f"decode_{depth}_GB_s"] = round(plan["weights"] / took / 1e9, 1)
    result["peak_bytes"] = webgpu_device.memory_bytes()[1] - before
    result["planned_bytes"] = plan["total"] - plan["reserve"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("libraries", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    adapter = webgpu_device.install()
    print(adapter)
    results = []
    for path in args.libraries:
        results.append(measure(path, args.seconds))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        document = {"adapter": adapter, "results": results}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
