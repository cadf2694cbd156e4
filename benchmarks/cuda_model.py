"""Speed and memory of whole models on this machine's NVIDIA GPU, random weights.

    python benchmarks/cuda_model.py LIBRARY.so... [--json FILE]

LIBRARY: `mlc_compile compile DIR --target cuda -o LIBRARY.so`. Needs numpy, ml_dtypes, a driver,
libcudart.so.13 and of TVM only the runtime (TVM_USE_RUNTIME_LIB=1); no parameters and no tokenizer:
weights are random words, so the text is noise and the time is real.

- A step is timed from the call to the device's being idle; logits stay on the device.
- `copy_GB_s`: a device-to-device copy of 1 GiB, bytes read plus bytes written, in the same run.
- Memory: what the driver reports as used on the device before the process touched it and at the
  peak, so on a shared card other processes disturb it; beside the plan.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.runtime.engine import Engine, Library

DEPTHS = (512, 8192)
PREFILLS = (128, 512, 1024, 2048)


def used_bytes() -> int:
    """Device memory in use, of every process; -1 where nvidia-smi is missing."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return -1
    return int(output.split()[0]) << 20


def random_params(library: Library) -> list[Any]:
    """Any bits for words, small numbers for floats; equal shapes hold equal values."""
    rng = np.random.default_rng(0)
    made: dict[tuple[Any, str], Any] = {}
    params = []
    for param in library.params:
        key = (tuple(param.shape), param.dtype)
        if key not in made:
            if param.dtype == "uint32":
                made[key] = rng.integers(0, 1 << 32, param.shape, dtype=np.uint32)
            else:
                made[key] = (rng.standard_normal(param.shape, np.float32) * 0.01).astype(
                    param.dtype
                )
        params.append(library.tensor(made[key]))
    return params


def steady(step: Callable[[], None], sync: Callable[[], None], seconds: float, least: int) -> float:
    """Median seconds of a step, warmed up for a quarter of the time."""
    times: list[float] = []
    started = time.perf_counter()
    step()
    while time.perf_counter() - started < seconds / 4:
        step()
    sync()
    started = time.perf_counter()
    while len(times) < least or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        step()
        sync()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def copy_bandwidth(library: Library) -> float:
    """GB/s, bytes read plus bytes written."""
    size = 1 << 30
    tvm = library._tvm
    source = tvm.runtime.empty((size,), "uint8", library.device)
    target = tvm.runtime.empty((size,), "uint8", library.device)
    took = steady(lambda: source.copyto(target), library.device.sync, 0.5, 5)
    return 2 * size / took / 1e9


class Steps:
    """The library's functions on one cache, without copies to the host."""

    def __init__(self, library: Library, engine: Engine) -> None:
        self.library, self.engine = library, engine
        self.ids = {n: library.tensor(np.ones(n, np.int32)) for n in range(1, 9)}
        self.prompts: dict[int, Any] = {}

    def prompt(self, rows: int) -> Any:
        if rows not in self.prompts:
            tokens = np.random.default_rng(rows).integers(0, 32000, rows).astype(np.int32)
            self.prompts[rows] = self.library.tensor(tokens)
        return self.prompts[rows]

    def fill(self, sequences: int, depth: int) -> None:
        """`sequences` sequences of `depth` tokens each."""
        self.engine.clear()
        for s in range(sequences):
            self.engine.add_sequence(s)
            for start in range(0, depth, self.engine.chunk):
                count = min(self.engine.chunk, depth - start)
                ids = self.prompt(count)
                self.engine._forward("prefill_tokens", [s], [count], ids)

    def prefill(self, rows: int) -> None:
        self.engine.clear()
        self.engine.add_sequence(0)
        self.engine._forward("prefill_tokens", [0], [rows], self.prompt(rows))

    def decode(self) -> None:
        self.engine._forward("decode_tokens", [0], [1], self.ids[1])
        self.engine.pop(0, 1)

    def batch_decode(self, batch: int) -> None:
        x = self.library.vm["embed"](self.ids[batch], self.engine.params)
        x = x._create_view([batch, 1, x.shape[1]])
        sequences = list(range(batch))
        self.engine._forward("batch_decode", sequences, [1] * batch, x)
        for s in sequences:
            self.engine.pop(s, 1)


def measure(path: Path, seconds: float) -> dict[str, Any]:
    """Prefill and decode of one library."""
    before = used_bytes()
    library = Library(path)
    sync = library.device.sync
    context = used_bytes() - before
    started = time.perf_counter()
    params = random_params(library)
    engine = Engine.with_params(library, params)
    load = time.perf_counter() - started
    meta = library.metadata
    plan = meta["mlc_compile"]["memory_plan"]
    result: dict[str, Any] = {
        "library": path.name,
        "device": library.device.device_name,
        "quantization": meta["quantization"],
        "opt": meta["mlc_compile"]["opt"],
        "tvm_target": meta["mlc_compile"]["tvm_target"],
        "weights": plan["weights"],
        "load_s": round(load, 1),
    }
    steps = Steps(library, engine)
    for rows in PREFILLS:
        if rows <= engine.chunk:
            took = steady(lambda rows=rows: steps.prefill(rows), sync, seconds, 5)
            result[f"prefill_{rows}"] = round(rows / took, 1)
    for depth in DEPTHS:
        if depth + 8 > engine.context:
            continue
        steps.fill(1, depth)
        took = steady(steps.decode, sync, seconds, 20)
        result[f"decode_{depth}"] = round(1 / took, 1)
        took = steady(lambda: steps.batch_decode(1), sync, seconds, 20)
        result[f"batch1_{depth}"] = round(1 / took, 1)
    for batch in (2, 4, 8):
        if batch <= meta["max_batch_size"]:
            steps.fill(batch, 512)
            took = steady(lambda batch=batch: steps.batch_decode(batch), sync, seconds, 20)
            result[f"batch{batch}_512"] = round(batch / took, 1)
    result["used_bytes"] = used_bytes() - before
    result["context_bytes"] = context
    result["planned_bytes"] = plan["total"]
    result["planned_reserve"] = plan["reserve"]
    result["copy_GB_s"] = round(copy_bandwidth(library), 0)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("libraries", nargs="+", type=Path)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for path in args.libraries:
        results.append(measure(path, args.seconds))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
