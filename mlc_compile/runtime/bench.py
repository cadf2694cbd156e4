"""Speed and memory of a compiled library on this machine.

- The work is done in a process of its own, so that the number of threads holds from the start and
  the peak memory is that of the library alone. The process reads one JSON request from stdin and
  writes one JSON object a line: `progress`, then `result` or `error` (benchmarks/ uses it too).
- The read bandwidth of the machine is measured in the same process, after the model: decoding
  reads every weight once a token, so the fraction it reaches says how much there is to gain.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mlc_compile.compiler.memory import format_bytes
from mlc_compile.errors import CheckFailedError, EnvironmentLacksError, InputError, MlcError
from mlc_compile.manifest import tool_versions
from mlc_compile.runtime.threads import (
    THREADS_VARIABLE,
    available_cpus,
    choose_pool_size,
    pinned_caller,
)

if TYPE_CHECKING:
    from mlc_compile.quantization.policy import StoredParam

Progress = Callable[[str, int, int], None]

MODULE: Final = "mlc_compile.runtime.bench"
BANDWIDTH_BYTES: Final = 1 << 30
BANDWIDTH_REPEATS: Final = 5
_ERRORS: Final = {
    error.__name__: error for error in (CheckFailedError, EnvironmentLacksError, InputError)
}


@dataclass(frozen=True)
class BenchReport:
    """What was measured. Rates are tokens per second, one per repeat; sizes are bytes.

    Decoding starts `prompt_tokens` deep. weight_bytes_per_token: what one step reads of the
    weights. bandwidth: bytes per second. peak_rss: of the process, before the bandwidth was
    measured; base_rss: the same before the library was loaded, which is Python and TVM. machine
    and versions: what it ran on.
    """

    library: str
    model_type: str
    quantization: str
    threads: int
    prompt_tokens: int
    decode_tokens: int
    prefill_rates: tuple[float, ...]
    decode_rates: tuple[float, ...]
    load_seconds: float
    base_rss: int
    peak_rss: int
    weight_bytes: int
    weight_bytes_per_token: int
    bandwidth: float
    machine: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def prefill_rate(self) -> float:
        """Median prompt tokens per second."""
        return median(self.prefill_rates)

    @property
    def decode_rate(self) -> float:
        """Median generated tokens per second."""
        return median(self.decode_rates)

    @property
    def bandwidth_fraction(self) -> float:
        """Weight bytes per second in decoding, as a part of the machine's read bandwidth."""
        return self.weight_bytes_per_token * self.decode_rate / self.bandwidth

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            **asdict(self),
            "prefill_rate": self.prefill_rate,
            "decode_rate": self.decode_rate,
            "bandwidth_fraction": self.bandwidth_fraction,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BenchReport:
        """What to_json gave."""
        fields = {name: data[name] for name in cls.__dataclass_fields__}
        for name in ("prefill_rates", "decode_rates"):
            fields[name] = tuple(fields[name])
        return cls(**fields)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        decoded = self.weight_bytes_per_token * self.decode_rate
        depth = f"{self.prompt_tokens} to {self.prompt_tokens + self.decode_tokens} tokens deep"
        return [
            ("prefill", f"{_rates(self.prefill_rates)}, {self.prompt_tokens} tokens"),
            ("decode", f"{_rates(self.decode_rates)}, {depth}"),
            (
                "weights read",
                f"{decoded / 1e9:.1f} GB/s in decode, {self.bandwidth_fraction:.0%} of the "
                f"{self.bandwidth / 1e9:.1f} GB/s this machine reads",
            ),
            (
                "memory",
                f"{format_bytes(self.peak_rss)} at peak, {format_bytes(self.base_rss)} before "
                f"loading; weights {format_bytes(self.weight_bytes)}",
            ),
            ("loading", f"{self.load_seconds:.2f} s"),
            ("threads", f"{self.threads} on {self.machine['cpu']} ({self.machine['cores']} cores)"),
            ("versions", ", ".join(f"{name} {found}" for name, found in self.versions.items())),
        ]

    def to_text(self) -> str:
        """The same for people."""
        rows = self.rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            [
                f"{self.library}: {self.model_type} {self.quantization}",
                *(f"  {name:<{width}}  {value}" for name, value in rows),
            ]
        )


def _rates(rates: Sequence[float]) -> str:
    spread = f" ({min(rates):.1f} to {max(rates):.1f})" if len(rates) > 1 else ""
    return f"{median(rates):.1f} tok/s{spread}"


def bench(
    directory: Path,
    library: Path,
    *,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure in a process of its own. threads: all cores this process may use by default.

    Raises:
        InputError: more threads than cores, more tokens than the context window holds, or parts
            that do not belong together.
    """
    cores = available_cpus()
    if threads is not None and threads > cores:
        raise InputError(f"--threads {threads}: this process may use {cores} cores")
    request = {
        "directory": str(directory),
        "library": str(library),
        "prompt_tokens": prompt_tokens,
        "decode_tokens": decode_tokens,
        "repeats": repeats,
        "bandwidth_bytes": BANDWIDTH_BYTES,
    }
    environment = os.environ | {THREADS_VARIABLE: str(threads or cores)}
    with subprocess.Popen(
        [sys.executable, "-m", MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as worker:
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(json.dumps(request))
            worker.stdin.close()
            for line in worker.stdout:
                message = json.loads(line)
                if "progress" in message and progress is not None:
                    progress(*message["progress"])
                elif "error" in message:
                    raise _ERRORS[message["error"]](message["message"], hint=message["hint"])
                elif "result" in message:
                    return BenchReport.from_json(message["result"])
        except BaseException:
            worker.kill()
            raise
    # Whatever ended it said so on stderr, which is ours too.
    raise RuntimeError(f"the measuring process ended with status {worker.returncode}")


def measure(
    directory: Path,
    library: Path,
    *,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    bandwidth_bytes: int,
    progress: Progress,
) -> BenchReport:
    """Measure in this process, with as many threads as TVM has in it.

    bandwidth_bytes: size of the buffer for read_bandwidth.
    """
    from mlc_compile.compiler.tvm_pair import require_tvm
    from mlc_compile.runtime.engine import Engine

    require_tvm()
    choose_pool_size()
    import tvm  # here, so that neither time nor memory of the import count as loading

    threads = int(tvm.get_global_func("runtime.NumThreads")())
    base_rss = peak_rss()
    steps = repeats + 3
    progress("load", 0, steps)
    started = time.perf_counter()
    engine = Engine.load(library, directory, max_batch=1)
    load_seconds = time.perf_counter() - started
    if prompt_tokens + decode_tokens > engine.context:
        raise InputError(
            f"--prompt-tokens {prompt_tokens} and --decode-tokens {decode_tokens} do not fit in "
            f"the context window of {engine.context}",
            hint="ask for fewer, or compile with a larger --context-window-size",
        )
    metadata = engine.library.metadata
    random = np.random.default_rng(0)
    tokens = random.integers(0, metadata["active_vocab_size"], prompt_tokens + decode_tokens)
    prompt, rest = tokens[:prompt_tokens].tolist(), tokens[prompt_tokens:].tolist()

    def once(decoded: Sequence[int]) -> tuple[float, float]:
        engine.add_sequence(0)
        try:
            start = time.perf_counter()
            engine.prefill(0, prompt)
            middle = time.perf_counter()
            for token in decoded:
                engine.decode(0, token)
            return middle - start, time.perf_counter() - middle
        finally:
            engine.remove_sequence(0)

    progress("warm up", 1, steps)
    times = []
    engine.start_pool()
    with pinned_caller():
        once(rest[:2])
        for i in range(repeats):
            progress(f"measure {i + 1} of {repeats}", 2 + i, steps)
            times.append(once(rest))
    # Before the buffer for the bandwidth, which is larger than many models.
    rss = peak_rss()
    progress("read bandwidth", steps - 1, steps)
    bandwidth = read_bandwidth(threads, bandwidth_bytes)
    params = engine.library.params
    return BenchReport(
        library=library.name,
        model_type=metadata["model_type"],
        quantization=metadata["quantization"],
        threads=threads,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        prefill_rates=tuple(prompt_tokens / prefill for prefill, _ in times),
        decode_rates=tuple(decode_tokens / decode for _, decode in times),
        load_seconds=load_seconds,
        base_rss=base_rss,
        peak_rss=rss,
        weight_bytes=sum(param.nbytes for param in params),
        weight_bytes_per_token=weight_bytes_per_token(params),
        bandwidth=bandwidth,
        machine=machine(),
        versions=tool_versions() | {"numpy": np.__version__, "python": platform.python_version()},
    )


def weight_bytes_per_token(params: Sequence[StoredParam]) -> int:
    """Bytes of weights that one decoding step reads.

    The embedding counts only where it is the output head too; otherwise one row of it is read.
    """
    tied = not any(param.name.startswith("lm_head.") for param in params)
    embedding = "model.embed_tokens."
    return sum(p.nbytes for p in params if tied or not p.name.startswith(embedding))


def read_bandwidth(
    threads: int, nbytes: int = BANDWIDTH_BYTES, repeats: int = BANDWIDTH_REPEATS
) -> float:
    """Bytes per second that `threads` threads read from memory, the best of `repeats` times.

    memchr looks for a byte that is not there: the C library's fastest plain read, outside the GIL.
    The buffer must be larger than the caches.
    """
    memchr = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None).memchr
    memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    memchr.restype = ctypes.c_void_p
    # Written once: pages never written are all the same page of zeros.
    parts = np.array_split(np.ones(nbytes, np.uint8), threads)

    def read(part: Any) -> None:
        found = memchr(part.ctypes.data, 0xFF, part.nbytes)
        assert found is None

    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(read, parts))
            best = min(best, time.perf_counter() - started)
    return nbytes / best


def peak_rss() -> int:
    """The most memory this process has held so far, in bytes; 0 where the system does not say."""
    try:
        # Linux counts what the parent held when it forked into ru_maxrss, but not into this.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def machine() -> dict[str, Any]:
    """The processor's name, the cores to use, the system."""
    name = ""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
    except OSError:
        pass
    return {
        "cpu": name or platform.processor() or platform.machine(),
        "cores": available_cpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def main() -> None:
    """The measuring process, see the module's docstring."""

    def send(message: Mapping[str, Any]) -> None:
        print(json.dumps(message), flush=True)

    request = json.load(sys.stdin)
    try:
        report = measure(
            Path(request.pop("directory")),
            Path(request.pop("library")),
            progress=lambda *step: send({"progress": step}),
            **request,
        )
    except MlcError as error:
        send({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    else:
        send({"result": report.to_json()})


if __name__ == "__main__":
    main()
