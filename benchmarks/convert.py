"""convert_weight beside llama.cpp's quantiser: the same weights, threads, machine, interleaved.

- Both read float16 weights of a Llama of random numbers, made once: `convert_weight` a safetensors
  file, llama.cpp a GGUF file of the same tensors. Rates are megabytes of input a second.
- q4f16_1 stands beside Q4_0 and q8f16_1 beside Q8_0, each of these plain and `--pure`.
- A measurement is a process from its start to its end; a round runs each once, in an order that
  turns; the result is the median. Input files lie in the page cache, output of the process before
  is deleted and written back first. Whole-process CPU seconds are recorded too: they say more where
  others use the machine.
- A virtual machine may give memory that is free for two seconds back to its host, and then pays a
  fault for each page of it, a second or two a gigabyte. So before each run as much page cache as
  the input takes is written and freed: all meet memory that is there, as on a machine of its own.
- What only we do is in our times: hashes of source (BLAKE3), shards and tensors (SHA-256, MD5),
  errors of every tensor, and fsync.

`python benchmarks/convert.py --help`; NOTES.md has results. llama.cpp is the package
llama-cpp-python in a Python of its own (README.md says how), whose `llama_model_quantize` is what
the program llama-quantize calls; or that program itself (--llama-quantize).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float16]
PAIRS = {"q4f16_1": "Q4_0", "q8f16_1": "Q8_0"}
VOCAB, HIDDEN, FFN, KV = 32000, 2048, 8192, 512  # Llama-3.2-1B, with a smaller vocabulary
WORKER = """
import ctypes, sys
import llama_cpp as api
source, target, ftype, threads, pure = sys.argv[1:]
@api.llama_log_callback
def silent(level, text, data): pass
api.llama_log_set(silent, None)
api.llama_backend_init()
params = api.llama_model_quantize_default_params()
params.ftype = getattr(api, "LLAMA_FTYPE_MOSTLY_" + ftype)
params.nthread, params.pure = int(threads), pure == "pure"
sys.exit(api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""


@dataclass(frozen=True)
class Contender:
    """One command; `input` is what it reads, `output` what it writes."""

    name: str
    command: Sequence[str]
    input: Path
    output: Path


@dataclass(frozen=True)
class Sample:
    """Seconds of one process, and its largest resident set in MB."""

    wall: float
    cpu: float
    rss: float


def tensors(layers: int) -> Iterator[tuple[str, str, Array]]:
    """(name in transformers, name in GGUF, values)."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> Array:
        return (rng.standard_normal((rows, columns), np.float32) * 0.02).astype(np.float16)

    ones = np.ones(HIDDEN, np.float16)
    yield "model.embed_tokens.weight", "token_embd.weight", matrix(VOCAB, HIDDEN)
    yield "model.norm.weight", "output_norm.weight", ones
    for i in range(layers):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        yield ours + "input_layernorm.weight", theirs + "attn_norm.weight", ones
        yield ours + "post_attention_layernorm.weight", theirs + "ffn_norm.weight", ones
        for name, other, rows, columns in (
            ("self_attn.q_proj", "attn_q", HIDDEN, HIDDEN),
            ("self_attn.k_proj", "attn_k", KV, HIDDEN),
            ("self_attn.v_proj", "attn_v", KV, HIDDEN),
            ("self_attn.o_proj", "attn_output", HIDDEN, HIDDEN),
            ("mlp.gate_proj", "ffn_gate", FFN, HIDDEN),
            ("mlp.up_proj", "ffn_up", FFN, HIDDEN),
            ("mlp.down_proj", "ffn_down", HIDDEN, FFN),
        ):
            yield f"{ours}{name}.weight", f"{theirs}{other}.weight", matrix(rows, columns)


def make_model(folder: Path, layers: int) -> None:
    """Writes hf/ and model.gguf."""
    import gguf
    from safetensors.numpy import save_file

    hf = folder / "hf"
    hf.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_attention_heads": HIDDEN // 64,
        "num_key_value_heads": KV // 64,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "vocab_size": VOCAB,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
    }
    (hf / "config.json").write_text(json.dumps(config), "utf-8")
    found = list(tensors(layers))
    save_file({name: values for name, _, values in found}, hf / "model.safetensors")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HIDDEN // 64)
    writer.add_head_count_kv(KV // 64)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(b"t%d" % i for i in range(3, VOCAB))])
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3, *[1] * (VOCAB - 3)])
    for _, name, values in found:
        writer.add_tensor(name, values if values.ndim > 1 else values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def contenders(args: argparse.Namespace, schemes: Sequence[str]) -> list[Contender]:
    """All, ours first."""
    work, threads = args.work, str(args.threads)
    hf, gguf_file = work / "hf", work / "model.gguf"
    found = []
    for scheme in schemes:
        out = work / f"out-{scheme}"
        ours = [sys.executable, "-m", "mlc_compile.cli", "convert_weight", str(hf), "-q", "-o"]
        ours += [str(out), "--quantization", scheme, "--jobs", threads, *args.ours]
        found.append(Contender(scheme, ours, hf / "model.safetensors", out))
        # By default the source is hashed by BLAKE3; llama.cpp hashes nothing.
        for kind in ("sha256", "none"):
            other = [*ours, "--source-hash", kind]
            found.append(Contender(f"{scheme} {kind}", other, hf / "model.safetensors", out))
        ftype, out = PAIRS[scheme], work / "out.gguf"
        for kind in ("default", "pure"):
            if args.llama_quantize:
                theirs = [str(args.llama_quantize), *(["--pure"] if kind == "pure" else [])]
                theirs += [str(gguf_file), str(out), ftype, threads]
            else:
                theirs = [str(args.llama_python), "-c", WORKER, str(gguf_file), str(out), ftype]
                theirs += [threads, kind]
            found.append(Contender(f"{ftype} {kind}", theirs, gguf_file, out))
    return found


def remove(path: Path) -> None:
    """A file or a folder, if there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def measure(contender: Contender) -> Sample:
    """One run, from a warm page cache and into memory that is there, nothing left to write back."""
    remove(contender.output)
    os.sync()
    size = 0
    with open(contender.input, "rb", buffering=0) as file:
        buffer = bytearray(2 << 20)
        while count := file.readinto(buffer):
            size += count
    scratch = contender.input.with_name("scratch")
    with open(scratch, "wb", buffering=0) as file:
        for _ in range(0, size, len(buffer)):
            file.write(buffer)
    scratch.unlink()
    started = time.perf_counter()
    # Python's bytecode is kept, as it is of an installed package.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        contender.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{contender.name}: exit code {process.returncode}")
    remove(contender.output)
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3)


def summary(
    every: Sequence[Contender], samples: dict[str, list[Sample]]
) -> tuple[list[dict[str, Any]], str]:
    """The JSON rows and a table."""
    rows = []
    for contender in every:
        taken, size = samples[contender.name], contender.input.stat().st_size / 1e6
        wall, cpu = median(s.wall for s in taken), median(s.cpu for s in taken)
        rows.append(
            {
                "name": contender.name,
                "input_mb": round(size, 1),
                "wall_s": round(wall, 3),
                "cpu_s": round(cpu, 3),
                "mb_per_s": round(size / wall, 1),
                "mb_per_cpu_s": round(size / cpu, 1),
                "best_mb_per_s": round(size / min(s.wall for s in taken), 1),
                "rss_mb": round(max(s.rss for s in taken), 1),
                "wall_samples": [round(s.wall, 3) for s in taken],
                "cpu_samples": [round(s.cpu, 3) for s in taken],
            }
        )
    lines = ["| | wall s | CPU s | MB/s of input | best | MB per CPU s | largest RSS, MB |"]
    lines.append("| --- " * 7 + "|")
    lines += [
        f"| {r['name']} | {r['wall_s']:.2f} | {r['cpu_s']:.2f} | {r['mb_per_s']:.0f} | "
        f"{r['best_mb_per_s']:.0f} | {r['mb_per_cpu_s']:.0f} | {r['rss_mb']:.0f} |"
        for r in rows
    ]
    return rows, "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    llama = parser.add_mutually_exclusive_group(required=True)
    llama.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python")
    llama.add_argument("--llama-quantize", type=Path, help="the program")
    parser.add_argument("--work", type=Path, required=True, help="folder of the models and outputs")
    parser.add_argument("--layers", type=int, default=16, help="of the model; 16 are 2.1 GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--ours", nargs="*", default=[], help="more options of convert_weight")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    if not (args.work / "model.gguf").exists():
        make_model(args.work, args.layers)
    every = contenders(args, args.schemes)
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in every}
    loads = []
    for contender in every:  # kernels and bytecode are built once
        measure(contender)
    for number in range(args.rounds):
        shift = number % len(every)
        for contender in every[shift:] + every[:shift]:
            loads.append(round(os.getloadavg()[0], 2))
            sample = measure(contender)
            samples[contender.name].append(sample)
            print(f"{contender.name}: {sample.wall:.2f} s, CPU {sample.cpu:.2f} s", flush=True)
    rows, table = summary(every, samples)
    print(table)
    if args.json:
        document = {
            "date": datetime.date.today().isoformat(),
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": args.threads,
            "rounds": args.rounds,
            "load_average_before_each": loads,
            "llama": "llama-quantize" if args.llama_quantize else "llama_model_quantize",
            "results": rows,
        }
        args.json.write_text(json.dumps(document, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
