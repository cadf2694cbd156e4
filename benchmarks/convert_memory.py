"""Peak memory and speed of `convert_weight --max-ram`, on synthetic checkpoints of several sizes.

    python benchmarks/convert_memory.py --sizes 1 3 --max-ram 1GiB --json benchmarks/results/x.json

Each conversion is a process of its own; its peak resident memory is what the system counted for it
(VmHWM), interpreter and imports included. The checkpoints are float16
models of Llama's shape, random in 32 MiB and repeated, written once into a scratch folder. The
peak must stay below the promise and must not grow with the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlc_compile.cli._params import SIZE
from mlc_compile.models import load_model
from mlc_compile.weights.parts import expected_shapes

WORKER = """
import atexit, os, sys
from mlc_compile.cli import main
def report():
    used = os.times()
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    print(used.user + used.system, peak, file=sys.stderr)
atexit.register(report)
main.main(sys.argv[1:])
"""
_PATTERN = 32 << 20
GROWTH = 1.1
"""What the largest checkpoint may take more than the smallest."""


def make_checkpoint(directory: Path, gigabytes: float) -> int:
    """A float16 checkpoint of about so many GB in files of up to 1 GB; its bytes."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "num_hidden_layers": 1,
    }

    def shapes() -> dict[str, tuple[int, ...]]:
        model = load_model(config, where="config.json")
        return {k: v for s in model.parameters() for k, v in expected_shapes(s).items()}

    def size() -> int:
        return sum(2 * int(np.prod(shape)) for shape in shapes().values())

    one = size()
    layer = (config.update(num_hidden_layers=2), size())[1] - one
    config["num_hidden_layers"] = max(1, 1 + round((gigabytes * 1e9 - one) / layer))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    pattern = (rng.standard_normal(_PATTERN // 2) * 0.02).astype(np.float16).tobytes()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    used = 0
    for name, shape in shapes().items():
        if used > 1e9:
            groups.append({})
            used = 0
        groups[-1][name] = shape
        used += 2 * int(np.prod(shape))
    places = {}
    for i, group in enumerate(groups):
        file = f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors"
        _write(directory / file, group, pattern)
        places.update(dict.fromkeys(group, file))
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return size()


def _write(path: Path, shapes: dict[str, tuple[int, ...]], pattern: bytes) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, len(pattern)):
            file.write(pattern[: min(len(pattern), end - start)])


def convert(source: Path, out: Path, scheme: str, max_ram: str, *options: str) -> dict[str, Any]:
    """One conversion in a process of its own."""
    words = ["convert_weight", str(source), "-q", "--quantization", scheme, "-o", str(out)]
    words += ["--json", "--max-ram", max_ram, *options]
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", WORKER, *words], capture_output=True, text=True)
    seconds = time.monotonic() - started
    if done.returncode:
        raise SystemExit(f"convert_weight failed: {done.stderr}")
    cpu, peak = done.stderr.split()[-2:]
    return {
        "scheme": scheme,
        "options": list(options),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(float(cpu), 2),
        "peak_rss_mib": round(int(peak) / 1024, 1),
        "output_bytes": json.loads(done.stdout)["parameter_bytes"],
    }


def measure(
    sizes: list[float], schemes: list[str], max_ram: str, scratch: Path, options: list[str]
) -> dict[str, Any]:
    """All of them; `ok` says whether the promise was kept and the peak did not grow."""
    runs = []
    # The smallest twice: the very first run may also build kernels.
    for gigabytes in (min(sizes), *sorted(sizes)):
        source = scratch / f"source{gigabytes:g}"
        nbytes = make_checkpoint(source, gigabytes)
        for scheme in schemes:
            run = convert(source, scratch / "out", scheme, max_ram, *options)
            shutil.rmtree(scratch / "out")
            run["source_bytes"] = nbytes
            run["mb_per_second"] = round(nbytes / 1e6 / run["seconds"], 1)
            print(json.dumps(run), file=sys.stderr, flush=True)
            runs.append(run)
        shutil.rmtree(source)
    promise = SIZE.convert(max_ram, None, None) / (1 << 20)
    grown = {
        scheme: runs[-len(schemes) + i]["peak_rss_mib"] / runs[len(schemes) + i]["peak_rss_mib"]
        for i, scheme in enumerate(schemes)
    }
    return {
        "max_ram": max_ram,
        "cores": os.cpu_count(),
        "runs": runs,
        "growth": {scheme: round(ratio, 3) for scheme, ratio in grown.items()},
        "ok": all(run["peak_rss_mib"] < promise for run in runs)
        and all(ratio < GROWTH for ratio in grown.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 3], help="GB")
    parser.add_argument("--schemes", nargs="+", default=["q4f16_1", "q4f16_0", "q0f16"])
    parser.add_argument("--max-ram", default="1GiB")
    parser.add_argument("--scratch", type=Path, help="where the checkpoints are made")
    parser.add_argument("--json", type=Path)
    known, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(dir=known.scratch) as scratch:
        result = measure(known.sizes, known.schemes, known.max_ram, Path(scratch), options)
    text = json.dumps(result, indent=2) + "\n"
    if known.json:
        known.json.write_text(text)
    print(text, end="")
    raise SystemExit(0 if result["ok"] else 1)


if __name__ == "__main__":
    main()
