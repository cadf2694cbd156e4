"""What each scheme costs and buys: size, speed and loss of one model through its compiled library.

    python benchmarks/schemes.py MODEL --text FILE [--schemes q4f16_1,q8f16_1] [-o schemes.md]

For each scheme: convert, configure, compile for cpu; then decode and prefill speed (medians, all
schemes interleaved by round), and the mean negative log-likelihood of the text, teacher-forced, in
bits per byte.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mlc_compile.cli import main as mlc_compile
from mlc_compile.runtime.engine import Engine

SCHEMES = "q0f32,q0f16,q8f16_1,q4f32_1,q4f16_1,q3f16_1"
PROMPT, STEPS = 128, 48


@dataclass
class Row:
    """One scheme's figures."""

    scheme: str
    megabytes: float
    bits_per_byte: float
    engine: Engine
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def command(*words: str) -> None:
    """One mlc_compile command; its result is not shown, a failure ends the benchmark."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            mlc_compile.main([*words, "-q"])
    except SystemExit as end:
        if end.code:
            raise


def build(model: str, scheme: str, folder: Path, text: str) -> Row:
    out = str(folder / scheme)
    common = [model, "--quantization", scheme, "-o", out]
    command("convert_weight", *common)
    command("gen_config", *common, "--context-window-size", "1024")
    command("compile", out, "-o", f"{out}/model.so")
    engine = Engine.load(Path(out) / "model.so", Path(out), max_batch=1)
    size = sum(p.stat().st_size for p in Path(out).glob("params_shard_*.bin")) / 1e6
    tokenizer = Tokenizer.from_file(f"{out}/tokenizer.json")
    ids = tokenizer.encode(text).ids[: engine.context]
    engine.add_sequence(0)
    logits = []
    for start in range(0, len(ids), engine.chunk):
        logits.append(engine.verify_tokens(0, ids[start : start + engine.chunk]))
    engine.remove_sequence(0)
    rows = np.concatenate(logits)[:-1].astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(rows).sum(axis=1))
    loss = float((log_sum - rows[np.arange(len(rows)), ids[1:]]).sum())
    read = len(tokenizer.decode(ids[1:]).encode())
    return Row(scheme, size, loss / np.log(2) / read, engine)


def measure(row: Row) -> None:
    engine = row.engine
    engine.add_sequence(0)
    tokens = list(range(100, 100 + PROMPT))
    started = time.perf_counter()
    engine.prefill(0, tokens)
    row.prefill.append(PROMPT / (time.perf_counter() - started))
    times = []
    for token in range(STEPS):
        started = time.perf_counter()
        engine.decode(0, 100 + token)
        times.append(time.perf_counter() - started)
    row.decode.append(1 / statistics.median(times))
    engine.remove_sequence(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        schemes = options.schemes.split(",")
        rows = [build(options.model, scheme, Path(folder), text) for scheme in schemes]
        for _ in range(options.rounds):
            for row in rows:
                measure(row)
    lines = [
        f"{Path(options.model).name}, {options.text.name}, {platform.processor() or 'cpu'}, "
        f"mlc-compile {version('mlc-compile')}, apache-tvm {version('apache-tvm')}",
        "",
        "| scheme | weights | bits per byte | decode tok/s | prefill tok/s |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r.scheme} | {r.megabytes:.1f} MB | {r.bits_per_byte:.3f} | "
        f"{statistics.median(r.decode):.0f} | {statistics.median(r.prefill):.0f} |"
        for r in rows
    ]
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
