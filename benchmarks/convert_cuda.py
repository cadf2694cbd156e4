"""Encodes random weights on a real GPU and compares every byte with numpy; prints MB/s of input.

    python benchmarks/convert_cuda.py [--million 64] [--jobs 8] [--library encoder.so]

Needs a driver, and nvcc; or with --library neither nvcc nor TVM's compiler.
Ends with ALL EQUAL (exit 0), or says what differs (exit 1).
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# ruff: noqa: E402 - what the environment says must be said before TVM and numpy are imported
if any(word.startswith("--library") for word in sys.argv):  # made before: TVM's runtime will do
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import ml_dtypes
import numpy as np

parser = argparse.ArgumentParser()
parser.add_argument("--million", type=int, default=64)
parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1))
parser.add_argument("--emulated", action="store_true")
parser.add_argument("--library", type=Path, help="built by cuda_encoder.build_library")
arguments = parser.parse_args()
BLOCK = 1 << 20  # weights a call, as convert_weight has it
K = 4096
DTYPES = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


started = time.time()
print("RSS before", resident(), "MiB", flush=True)
if arguments.emulated:
    from mlc_compile.runtime import cuda_emulator
    from mlc_compile.runtime.cuda_emulator import native

    native._KERNEL = (*native._KERNEL, "-ffp-contract=off")
    context = cuda_emulator.emulated(arch=80, checked=False)
    context.__enter__()
from mlc_compile.errors import InputError
from mlc_compile.quantization.compiled import Encoder
from mlc_compile.quantization.cuda_encoder import CudaEncoder
from mlc_compile.quantization.scheme import get_scheme

GPU = CudaEncoder(None if arguments.emulated else arguments.library)
print(f"RSS with the GPU {resident()} MiB; ready after {time.time() - started:.1f} s", flush=True)
REFERENCE = Encoder()


def special(rng, n, k):
    """Rows with zeros, ties, denormals and groups whose scale vanishes."""
    w = rng.standard_normal((n, k)).astype(np.float32)
    w *= np.exp2(rng.integers(-12, 3, (n, 1))).astype(np.float32)
    w[0, : k // 2] = 0
    w[1 % n] = np.arange(k, dtype=np.float32) % 15 - 7
    w[2 % n, ::3] = -0.0
    w[3 % n] *= 2.0**-22
    w[4 % n] = rng.integers(0, 3, k) * 2.0**-24
    w[5 % n, ::2] = -1 - 2.0**-20
    w[5 % n, 1::2] = 1
    return w


def in_blocks(encode, weight, jobs, pool):
    """encode's results for blocks of rows."""
    step = max(1, BLOCK // weight.shape[1])
    starts = range(0, len(weight), step)
    return list(pool.map(lambda i: encode(weight[i : i + step]), starts))


def same(one, other):
    def flat(found):
        return [a for arrays, *sums in found for a in (*arrays, *sums)]

    one, other = flat(one), flat(other)
    return len(one) == len(other) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()
        for a, b in zip(one, other, strict=False)
    )


bad = []


def check(label, weight, scheme, rule, pool, importance=None, layout=None, limit=None):
    def encode(encoder):
        return lambda rows: encoder.measured(
            rows, scheme, scales=rule, importance=importance, layout=layout
        )

    in_blocks(
        encode(GPU), weight[: arguments.jobs * BLOCK // weight.shape[1]], arguments.jobs, pool
    )
    t = time.perf_counter()
    found = in_blocks(encode(GPU), weight, arguments.jobs, pool)
    seconds = time.perf_counter() - t
    part = weight[: limit or len(weight)]
    t = time.perf_counter()
    expected = in_blocks(encode(REFERENCE), part, arguments.jobs, pool)
    reference = time.perf_counter() - t
    equal = same(found[: len(expected)], expected) and not GPU._failed
    if not equal:
        bad.append(label)
    print(
        f"{label:34s} {'equal' if equal else 'DIFFERENT'}  {weight.size / 1e6:6.1f} M weights, "
        f"{weight.nbytes / seconds / 1e6:8.0f} MB/s = {weight.size / seconds / 1e6:7.0f} M/s "
        f"(numpy {part.size / reference / 1e6:6.0f} M/s of {part.size / 1e6:.1f} M)",
        flush=True,
    )


with ThreadPoolExecutor(arguments.jobs) as pool:
    before = resident()
    block = np.random.default_rng(0).standard_normal((BLOCK // K, K), np.float32).astype(np.float16)

    def one(_):
        return GPU.measured(block, get_scheme("q4f16_1"), scales="signed") and None

    for _ in range(3):
        list(pool.map(one, range(4 * arguments.jobs)))
    print(f"RSS {before} -> {resident()} MiB with {arguments.jobs} threads at work", flush=True)
    rows = max(64, arguments.million * 1_000_000 // K)
    seeds = np.random.SeedSequence(7).spawn(16)

    def make(i):
        return np.random.default_rng(seeds[i]).standard_normal((-(-rows // 16), K), np.float32)

    wide = np.concatenate(list(pool.map(make, range(16))))
    wide *= np.exp2(np.random.default_rng(3).integers(-8, 2, (len(wide), 1))).astype(np.float32)
    wide[:64] = special(np.random.default_rng(5), 64, K)
    sources = {}
    for name, dtype in DTYPES.items():
        parts = pool.map(lambda i, to=dtype: wide[i : i + 256].astype(to), range(0, len(wide), 256))
        sources[name] = np.concatenate(list(parts))
    print(
        f"weights {wide.shape}, {arguments.jobs} threads, {time.time() - started:.1f} s", flush=True
    )
    for name in ("q4f16_1", "q3f16_1", "q8f16_1", "q4f32_1", "q4bf16_1", "q3f16_0", "q8f32_pc"):
        for rule in ("absmax", "signed"):
            for source, weight in sources.items():
                check(f"{name} {rule} from {source}", weight, get_scheme(name), rule, pool)
    importance = np.random.default_rng(9).random(K).astype(np.float32)
    importance[::5] = 0
    limit = max(64, min(rows, 8_000_000 // K // 256 * 256))
    for name in ("q4f16_1", "q3f16_0", "q8f16_1", "q4f32_1", "q4bf16_1"):
        for source, weight in sources.items():
            scheme = get_scheme(name)
            check(f"{name} mse from {source}", weight, scheme, "mse", pool, limit=limit)
        weight = sources["f16"]
        check(f"{name} mse weighted", weight, scheme, "mse", pool, importance, limit=limit)
    print("RSS after", resident(), "MiB", f"{time.time() - started:.1f} s", flush=True)

    # Odd shapes, layouts, every float16, refusals.
    small = 0
    for name in ("q4f16_0", "q4f16_1", "q3f16_0", "q3f16_1", "q8f16_0", "q4f32_1", "q8f16_pc"):
        scheme = get_scheme(name)
        for source, dtype in DTYPES.items():
            for rule in ("absmax", "signed", "mse"):
                for n, k in [(9, 320), (7, 129), (1, 1), (33, 4100)]:
                    w = special(np.random.default_rng(n), n, k).astype(dtype)
                    for layout in ("KN", "NK"):
                        one = [GPU.measured(w, scheme, scales=rule, layout=layout)]
                        two = [REFERENCE.measured(w, scheme, scales=rule, layout=layout)]
                        small += 1
                        if not same(one, two):
                            bad.append(f"{name} {source} {rule} {n}x{k} {layout}")
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    w = np.resize(every[np.isfinite(every)], (64, 1024))
    for name in ("q4f16_1", "q4bf16_1", "q8f32_1"):
        for rule in ("absmax", "signed", "mse"):
            one = [GPU.measured(w, get_scheme(name), scales=rule)]
            if not same(one, [REFERENCE.measured(w, get_scheme(name), scales=rule)]):
                bad.append(f"every float16 {name} {rule}")
    for value in (np.inf, np.nan, 65520.0):
        w = np.ones((5, 100), np.float32)
        w[4, 99] = value
        try:
            GPU(w, get_scheme("q4f16_1"), name="x")
            bad.append(f"{value} was taken")
        except InputError:
            pass
    print(f"{small} small cases", flush=True)
    for jobs in (1, 2, 4, 8, 16):
        with ThreadPoolExecutor(jobs) as fewer:

            def encode(rows):
                return GPU.measured(rows, get_scheme("q4f16_1"), scales="signed")

            weight = sources["f16"]
            in_blocks(encode, weight[: jobs * 512], jobs, fewer)
            t = time.perf_counter()
            in_blocks(encode, weight, jobs, fewer)
            seconds = time.perf_counter() - t
        print(f"q4f16_1 signed from f16, {jobs} threads: {weight.nbytes / seconds / 1e6:.0f} MB/s")
    if GPU._failed:
        bad.append("the GPU failed on the way")
print(f"{time.time() - started:.1f} s")
print("DIFFERENT: " + "; ".join(bad) if bad else "ALL EQUAL")
sys.exit(bool(bad))
