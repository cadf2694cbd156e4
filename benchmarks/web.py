"""Sizes and times of WebAssembly libraries, and web-llm on the software adapter beside `cpu`.

    python benchmarks/web.py MODEL [MODEL ...] [--quantization q4f32_1] [--cold] [--json FILE]

MODEL is a checkpoint. For each: seconds of `compile --target webgpu` (--cold: with an empty cache
too, which compiles TVM's web runtime and zig's C++ library), bytes of the library raw and gzipped;
then in headless Chromium the seconds from a served model to a loaded one, tokens per second of
prefill and decode, and the same of the `cpu` library through `mlc_compile bench`. The adapter is
SwiftShader on this machine's processor: the figures compare versions of ours with each other and
say nothing about a GPU. Needs Node, npm and Chromium, as tests/browser does, whose drivers it uses.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "browser")]

from browser_harness import (  # noqa: E402  (the drivers live with the tests)
    chromium,
    command,
    install_npm_packages,
    run_steps,
    served,
)

PROMPT = "The weather was fine, and so they all went down to the river. " * 4


def compile_seconds(directory: Path, cache: str | None = None) -> float:
    """Wall seconds of one compilation to model.wasm."""
    words = ["compile", str(directory), "--target", "webgpu", "-o", str(directory / "model.wasm")]
    environment = dict(os.environ) | ({} if cache is None else {"MLC_COMPILE_CACHE": cache})
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "mlc_compile.cli", *words, "-q"],
        check=True,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return round(time.perf_counter() - started, 1)


def in_chromium(directory: Path, tokens: int) -> dict[str, Any]:
    """Load seconds, and speeds of a second request: the first one still compiles shaders."""
    request = {
        "prompt": PROMPT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    steps: list[dict[str, Any]] = [{"do": "load", "model": directory.name}]
    steps += [{"do": "ask", "request": request}] * 2
    with served(directory) as url:
        load, _, answer = run_steps(url, steps, seconds=3000)
    extra = answer["usage"]["extra"]
    return {
        "adapter": load["adapter"],
        "load_s": round(load["milliseconds"] / 1000, 1),
        "prefill_tok_s": round(extra["prefill_tokens_per_s"], 2),
        "decode_tok_s": round(extra["decode_tokens_per_s"], 2),
    }


def measure(checkpoint: Path, scheme: str, cold: bool, tokens: int) -> dict[str, Any]:
    """All figures of one model."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / checkpoint.stem
        common = (checkpoint, "--quantization", scheme, "-o", out)
        command("convert_weight", *common)
        sizes = ("--context-window-size", "1024", "--prefill-chunk-size", "64")
        command("gen_config", *common, *sizes)
        result: dict[str, Any] = {"model": checkpoint.stem, "quantization": scheme}
        if cold:
            with tempfile.TemporaryDirectory() as cache:
                result["first_compile_s"] = compile_seconds(out, cache)
        compile_seconds(out)  # fills the cache
        result["compile_s"] = compile_seconds(out)
        data = (out / "model.wasm").read_bytes()
        result["wasm_bytes"] = len(data)
        result["wasm_gzip_bytes"] = len(gzip.compress(data, 9))
        result["chromium"] = in_chromium(out, tokens)
        library = out / "model.so"
        command("compile", out, "-o", library)
        report = json.loads(command("bench", out, "--lib", library, "--json"))
        result["cpu"] = {k: round(report[k], 1) for k in ("prefill_rate", "decode_rate")}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--quantization", default="q4f32_1")
    parser.add_argument("--cold", action="store_true", help="also compile with an empty cache")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    chromium()
    install_npm_packages()
    results = []
    for model in args.models:
        results.append(measure(model, args.quantization, args.cold, args.tokens))
        print(json.dumps(results[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
