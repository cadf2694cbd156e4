"""How fast the CPU matmul kernels are, next to what this machine can do.

    python benchmarks/kernels_cpu.py [--scheme q4f16_1] [--threads 2] [--models smollm2 llama-1b]

For every weight shape of a model: GEMV (decode) as GB/s of packed weight, "cold" (many copies of
the weight, so that each call reads memory) and "hot" (one copy); GEMM (prefill) as GFLOP/s. Beside
them, from the same run: numpy's float32 product of the same shape (OpenBLAS) and the read bandwidth
of the machine (a float32 GEMV, which does next to no arithmetic per byte). Figures are the best of
many repetitions, as other work on the machine can only make one slower; q25 is the lower quartile.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

# name -> (out_features, in_features, how often in one forward pass)
MODELS: dict[str, dict[str, tuple[int, int, int]]] = {
    "smollm2": {
        "qkv": (960, 576, 30),
        "o": (576, 576, 30),
        "gate_up": (3072, 576, 30),
        "down": (576, 1536, 30),
        "lm_head": (49152, 576, 1),
    },
    "llama-1b": {
        "qkv": (3072, 2048, 16),
        "o": (2048, 2048, 16),
        "gate_up": (16384, 2048, 16),
        "down": (2048, 8192, 16),
        "lm_head": (128256, 2048, 1),
    },
}
COLD_BYTES = 128 << 20  # of copies of one weight: more than the last-level cache keeps
BANDWIDTH_SHAPE = (16384, 4096)  # 256 MiB of float32


def timed(calls: list[Callable[[], object]], seconds: float) -> tuple[float, float]:
    """(best, lower quartile) of single calls, going round `calls`."""
    calls[0]()
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    times.sort()
    return times[0], times[len(times) // 4]


class Bench:
    """Compiles and times kernels for the host; imports TVM late, after the thread count is set."""

    def __init__(self, vector_bits: int, threads: int, seconds: float) -> None:
        import numpy as np
        import tvm

        self.np, self.tvm = np, tvm
        self.vector_bits, self.threads, self.seconds = vector_bits, threads, seconds
        cpu = tvm.target.codegen.llvm_get_system_cpu()
        self.target = tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": threads})
        self.rng = np.random.default_rng(0)
        self.pin_main_thread()

    def pin_main_thread(self) -> None:
        """Keep this thread on the core that TVM's pool leaves free.

        TVM binds its workers to cores 1, 2, … but not the caller, which the system may leave beside
        a worker for seconds: everything then takes twice as long.
        """
        spec = self.spec("q0f32", 64, 64, 1)
        self.kernel(spec)[0](*self.tensors(spec, 1, self.weight(spec)))  # starts the pool
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    def kernel(self, spec: Any) -> tuple[Callable[..., object], float]:
        """The compiled kernel and the seconds it took."""
        from mlc_compile.targets.cpu_kernels.linear import linear_kernel

        start = time.perf_counter()
        func = linear_kernel(spec, vector_bits=self.vector_bits, num_cores=self.threads)
        module = self.tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        run = self.tvm.compile(module, self.target).jit()["main"]
        return run, time.perf_counter() - start

    def spec(self, scheme: str, n: int, k: int, rows: int | None) -> Any:
        from mlc_compile.quantization.scheme import get_scheme
        from mlc_compile.targets.kernels import LinearSpec

        found = get_scheme(scheme)
        dtype = found.model_dtype
        if found.is_plain:
            return LinearSpec(k, n, None, dtype, dtype, rows=rows, weight_dtype=dtype)
        return LinearSpec(k, n, found, dtype, dtype, rows=rows)

    def weight(self, spec: Any) -> list[Any]:
        """Random words and scales: values do not matter for speed while they are normal."""
        from mlc_compile.quantization.scheme import numpy_dtype

        arrays = []
        for _, shape, dtype in spec.weight_shapes():
            if dtype == "uint32":
                array = self.rng.integers(0, 2**32, shape, dtype=self.np.uint32)
            else:
                array = self.rng.random(shape, self.np.float32).astype(numpy_dtype(dtype))
            arrays.append(array)
        return arrays

    def tensors(self, spec: Any, rows: int, weight: list[Any]) -> list[Any]:
        from mlc_compile.quantization.scheme import numpy_dtype

        x = self.rng.standard_normal((rows, spec.in_features)).astype(numpy_dtype(spec.x_dtype))
        out = self.np.zeros((rows, spec.out_features), numpy_dtype(spec.out_dtype))
        return [self.tvm.runtime.tensor(a) for a in (x, *weight, out)]

    def gemv(self, scheme: str, n: int, k: int) -> dict[str, float]:
        spec = self.spec(scheme, n, k, 1)
        run, compile_s = self.kernel(spec)
        weight = self.weight(spec)
        nbytes = sum(a.nbytes for a in weight)
        copies = max(1, COLD_BYTES // nbytes)
        sets = [self.tensors(spec, 1, weight) for _ in range(copies)]
        calls = [lambda t=t: run(*t) for t in sets]
        best, q25 = timed(calls, self.seconds)
        hot, _ = timed(calls[:1], self.seconds)
        return {"bytes": nbytes, "cold": best, "q25": q25, "hot": hot, "compile": compile_s}

    def gemm(self, scheme: str, n: int, k: int, rows: list[int]) -> list[dict[str, float]]:
        spec = self.spec(scheme, n, k, None)
        run, compile_s = self.kernel(spec)
        weight = self.weight(spec)
        found = []
        for count in rows:
            tensors = self.tensors(spec, count, weight)
            best, q25 = timed([lambda t=tensors: run(*t)], self.seconds)
            found.append({"best": best, "q25": q25, "compile": compile_s})
        return found

    def numpy_product(self, n: int, k: int, rows: int) -> float:
        """Seconds of x @ w.T in float32, the weight being warm."""
        x = self.rng.standard_normal((rows, k)).astype(self.np.float32)
        w = self.rng.standard_normal((n, k)).astype(self.np.float32)
        return timed([lambda: x @ w.T], self.seconds)[0]

    def read_bandwidth(self) -> float:
        """Bytes per second."""
        result = self.gemv("q0f32", *BANDWIDTH_SHAPE)
        return result["bytes"] / result["cold"]


def report(bench: Bench, scheme: str, model: str, rows: list[int]) -> None:
    shapes = MODELS[model]
    print(f"\n{model}, {scheme}: decode (1 row)")
    print("shape              cold us  GB/s   q25 us   hot us  GB/s   numpy f32 us  compile s")
    total = total_q25 = 0.0
    for name, (n, k, times) in shapes.items():
        r = bench.gemv(scheme, n, k)
        blas = bench.numpy_product(n, k, 1)
        total, total_q25 = total + times * r["cold"], total_q25 + times * r["q25"]
        print(
            f"{name:8}{n:6}x{k:<5} {r['cold'] * 1e6:7.1f} {r['bytes'] / r['cold'] / 1e9:5.1f}"
            f" {r['q25'] * 1e6:8.1f} {r['hot'] * 1e6:8.1f} {r['bytes'] / r['hot'] / 1e9:5.1f}"
            f" {blas * 1e6:14.1f} {r['compile']:10.2f}",
            flush=True,
        )
    print(
        f"all matmuls of a token: {total * 1e3:.2f} ms ({1 / total:.0f} tok/s),"
        f" q25 {total_q25 * 1e3:.2f} ms ({1 / total_q25:.0f} tok/s)"
    )
    print(f"\n{model}, {scheme}: prefill, layers only (lm_head runs for the last token)")
    print("shape              rows       us  GFLOP/s  q25 GFLOP/s  numpy f32 GFLOP/s  compile s")
    totals = dict.fromkeys(rows, 0.0)
    for name, (n, k, times) in shapes.items():
        if name == "lm_head":
            continue
        for count, r in zip(rows, bench.gemm(scheme, n, k, rows), strict=True):
            flop = 2.0 * n * k * count
            blas = flop / bench.numpy_product(n, k, count) / 1e9
            totals[count] += times * r["best"]
            print(
                f"{name:8}{n:6}x{k:<5} {count:5} {r['best'] * 1e6:8.1f}"
                f" {flop / r['best'] / 1e9:8.1f} {flop / r['q25'] / 1e9:12.1f} {blas:18.1f}"
                f" {r['compile']:10.2f}",
                flush=True,
            )
    for count, seconds in totals.items():
        print(f"{count} rows: {seconds * 1e3:.1f} ms, {count / seconds:.0f} tok/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vector-bits", type=int, default=512, choices=[128, 256, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 128, 512])
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    args = parser.parse_args()
    # OpenBLAS at its own best guess of this machine; TVM halves the cores of x86 unless told.
    for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
        os.environ.pop(name, None)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = str(args.threads)
    bench = Bench(args.vector_bits, args.threads, args.seconds)
    load = os.getloadavg()[0]
    print(f"{args.threads} threads, {args.vector_bits}-bit vectors, load average {load:.1f}")
    print(f"read bandwidth {bench.read_bandwidth() / 1e9:.1f} GB/s")
    for model in args.models:
        report(bench, args.scheme, model, args.rows)


if __name__ == "__main__":
    main()
