"""Hopper's barriers in shared memory, bulk copies and warpgroup products on the emulated device."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
from cuda_sources import DYNAMIC, accepts, kernel, launch, module, on_device, pointer, refuses

from mlc_compile.runtime.cuda_emulator import options

PTX = '#include "ptx_attention_sm90.cuh"\nusing namespace mlc;\n'
X = np.arange(512, dtype=np.float32)


@pytest.fixture(autouse=True)
def hopper() -> Iterator[None]:
    with options(arch=90):
        yield


# A producer (warp 0) fills two places in turn, the consumers (the other warps) empty them.
PIPELINE = """__shared__ __align__(128) float s[2][64];
__shared__ uint64_t full[2], empty[2];
if (i == 0) {
  for (int n = 0; n < 2; n++) { barrier_init(&full[n], 1); barrier_init(&empty[n], 64); }
  barrier_init_done();
}
__syncthreads();
if (i < 32) {
  if (i == 0)
    for (int n = 0; n < 6; n++) {
      WAIT_EMPTY;
      barrier_arrive_expect(&full[n % 2], 256);
      copy_bulk(s[n % 2], x + 64 * n, 256, &full[n % 2]);
    }
} else {
  float sum = 0;
  for (int n = 0; n < 6; n++) {
    WAIT_FULL;
    sum += s[n % 2][95 - i];
    barrier_arrive(&empty[n % 2]);
  }
  y[i - 32] = sum;
}"""
EMPTY = "barrier_wait(&empty[n % 2], n / 2 % 2 ^ 1)"
FULL = "barrier_wait(&full[n % 2], n / 2 % 2)"


def pipeline(empty: str = EMPTY, full: str = FULL) -> str:
    body = PIPELINE.replace("WAIT_EMPTY", empty).replace("WAIT_FULL", full)
    return kernel(body, "float* x, float* y", PTX)


def test_a_pipeline() -> None:
    y = accepts(pipeline(), X, np.zeros(64, np.float32), block=(96,))[1]
    np.testing.assert_array_equal(y, X[:384].reshape(6, 64).sum(0)[::-1])


def test_a_pipeline_that_does_not_wait() -> None:
    more = {"races": True, "block": (96,)}
    out = np.zeros(64, np.float32)
    what = "race on|without a wait|no thread of the block has written|too many|nobody can go on"
    refuses(what, pipeline(full="(void)0"), X, out, **more)
    refuses(what, pipeline(empty="(void)0"), X, out, **more)
    stuck = pipeline(empty=EMPTY.replace(" ^ 1", ""))
    message = refuses("nobody can go on", stuck, X, out, block=(96,))
    assert "a wait for a barrier in shared memory" in message
    short = pipeline().replace("x + 64 * n, 256", "x + 64 * n, 128")
    refuses("nobody can go on", short, X, out, block=(96,))
    unknown = pipeline().replace("barrier_init(&empty[n], 64);", "")
    refuses("a barrier that was not initialised", unknown, X, out, block=(96,))


def test_named_barriers() -> None:
    body = """__shared__ float s[128];
s[i] = x[i];
named_barrier(1 + i / 64, 64);
x[i] = s[i ^ {}];"""
    (x,) = accepts(kernel(body.format(63), head=PTX), X, block=(128,))
    np.testing.assert_array_equal(x[:128], X[np.arange(128) ^ 63])
    what = "race on|no thread of the block has written"
    refuses(what, kernel(body.format(64), head=PTX), X, block=(128,), races=True)


def test_transposed_stores() -> None:
    body = """__shared__ __align__(16) unsigned short s[256];
uint32_t r[4];
for (int n = 0; n < 4; n++) r[n] = a[(n * 32 + i) * 2] | (uint32_t)a[(n * 32 + i) * 2 + 1] << 16;
store_matrix_x4_trans(s + i * 8, r[0], r[1], r[2], r[3]);
__syncwarp();
for (int n = i; n < 256; n += 32) a[n] = s[n];"""
    a = np.arange(256, dtype=np.uint16)
    (got,) = accepts(kernel(body, "unsigned short* a", PTX), a)
    np.testing.assert_array_equal(got.reshape(4, 8, 8), a.reshape(4, 8, 8).transpose(0, 2, 1))


# b lies in shared memory as the PTX ISA's figures of the 128-byte swizzle have it: rows of 64
# elements, of which the 16-byte pieces are permuted by the row.
PRODUCT = """DYNAMIC
auto* s = (unsigned short*)((uintptr_t(memory) + 1023) / 1024 * 1024);
const int warp = i / 32, g = i % 32 / 4, t = i % 4 * 2;
auto place = [&](int row, int piece) { return s + row * 64 + (piece ^ row % 8) * 8; };
for (int n = i; n < ROWS * 64; n += 128) place(n / 64, n % 64 / 8)[n % 8] = b[n];
__syncthreads();
float d[COUNT];
for (int n = 0; n < COUNT; n++) d[n] = 1;
uint32_t fa[K / 16][4];
for (int k = 0; k < K / 16; k++)
  for (int n = 0; n < 4; n++) {
    auto* p = a + (warp * 16 + g + n % 2 * 8) * K + 16 * k + t + n / 2 * 8;
    fa[k][n] = (uint32_t)p[0] | (uint32_t)p[1] << 16;
  }
wgmma_fence();
for (int k = 0; k < K / 16; k++) STEP;
wgmma_commit();
WAIT;
for (int n = 0; n < COUNT; n++) {
  int row = warp * 16 + g + n % 4 / 2 * 8, column = n / 4 * 8 + t + n % 2;
  c[row * 2 * COUNT + column] = d[n];
}"""


def product(count: int, k: int, rows: int, step: str, wait: str = "wgmma_wait<0>()") -> str:
    body = PRODUCT.replace("DYNAMIC", DYNAMIC).replace("WAIT", wait).replace("STEP", step)
    body = body.replace("COUNT", str(count)).replace("ROWS", str(rows))
    for before, after in ((" K ", f" {k} "), ("K /", f"{k} /"), (" K +", f" {k} +")):
        body = body.replace(before, after)
    return kernel(body, "unsigned short* a, unsigned short* b, float* c", PTX)


def matrices(k: int, n: int, short: type) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    a = rng.integers(-4, 5, (64, k)).astype(short)
    b = rng.integers(-4, 5, (k, n)).astype(short)
    return a, b, a.astype(np.float32) @ b.astype(np.float32)


@pytest.mark.parametrize(("element", "short"), [("half", np.float16),
                                                ("__nv_bfloat16", ml_dtypes.bfloat16)])  # fmt: skip
@pytest.mark.parametrize("count", [32, 64, 128])
def test_products_with_k_along_rows(count: int, element: str, short: type) -> None:
    n = 2 * count
    a, b, wanted = matrices(64, n, short)
    step = f"wgmma_m64k16(d, fa[k], wgmma_descriptor(s) + 2 * k, {element}())"
    source = product(count, 64, n, step)
    out = np.zeros((64, n), np.float32)
    inputs = a.view(np.uint16), np.ascontiguousarray(b.T).view(np.uint16)
    *_, got = launch(source, *inputs, out, block=(128,), shared=n * 128 + 1024)
    np.testing.assert_array_equal(got, wanted + 1)


@pytest.mark.parametrize("add", ["true", "false"])
@pytest.mark.parametrize("count", [32, 64])
def test_products_with_columns_along_rows(count: int, add: str) -> None:
    n, k = 2 * count, 32
    a, b, wanted = matrices(k, n, np.float16)
    # [64 columns][k][64 elements]
    blocks = np.ascontiguousarray(b.reshape(k, n // 64, 64).transpose(1, 0, 2))
    step = (
        f"product<true, {add}>(d, fa[k], attention::block_descriptor<{k}>(s) "
        "+ k * (2048 >> 4), half())"
    )
    step = step.replace("product<", "attention::product<")
    source = product(count, k, blocks.size // 64, step)
    out = np.zeros((64, n), np.float32)
    inputs = a.view(np.uint16), blocks.view(np.uint16)
    *_, got = launch(source, *inputs, out, block=(128,), shared=blocks.nbytes + 1024)
    last = a[:, 16:].astype(np.float32) @ b[16:].astype(np.float32)
    np.testing.assert_array_equal(got, wanted + 1 if add == "true" else last)


def test_products_that_are_not_waited_for() -> None:
    a, b, _ = matrices(64, 64, np.float16)
    step = "wgmma_m64k16(d, fa[k], wgmma_descriptor(s) + 2 * k, half())"
    inputs = a.view(np.uint16), np.ascontiguousarray(b.T).view(np.uint16)
    out = np.zeros((64, 64), np.float32)
    for wait in ("(void)0", "wgmma_wait<1>()"):
        source = product(32, 64, 64, step, wait)
        assert np.isnan(launch(source, *inputs, out, block=(128,), shared=9216)[2]).all()
    outside = product(32, 64, 64, step.replace("2 * k", "2 * k + 512"))
    refuses("outside of every buffer|across the end", outside, *inputs, out, block=(128,),
            shared=9216)  # fmt: skip


def test_tiles_that_others_still_read() -> None:
    a, b, _ = matrices(64, 64, np.float16)
    step = "wgmma_m64k16(d, fa[k], wgmma_descriptor(s) + 2 * k, half())"
    inputs = a.view(np.uint16), np.ascontiguousarray(b.T).view(np.uint16)
    out = np.zeros((64, 64), np.float32)
    late = "if (i == 0) s[5] = 0;\nwgmma_wait<0>()"
    source = product(32, 64, 64, step, late)
    refuses("race on dynamic", source, *inputs, out, block=(128,), shared=9216, races=True)
    with options(races=True):
        good = "wgmma_wait<0>();\n__syncthreads();\nif (i == 0) s[5] = 0"
        launch(product(32, 64, 64, step, good), *inputs, out, block=(128,), shared=9216)


# --- dependent launches

DEPENDENT = """#include "ptx.cuh"
namespace mlc {
__device__ void fill(float* x) { x[threadIdx.x] = threadIdx.x; }
__device__ void add_dependent(const float* x, const float* weight, float* y) {
  const int i = threadIdx.x;
  float w = weight[i];
  EARLY
  if (WAIT) grid_dependency_wait();
  grid_dependency_launch();
  y[i] = x[i] + w;
}
}
extern "C" __global__ void a(float* x, float* w, float* y) { mlc::fill(x); }
extern "C" __global__ void b(float* x, float* w, float* y) { mlc::add_dependent(x, w, y); }
"""


def dependent(wait: str = "true", early: str = "", again: bool = False) -> np.ndarray:
    source = DEPENDENT.replace("WAIT", wait).replace("EARLY", early)
    loaded = module(source, 3)
    tensors = [on_device(np.full(32, n, np.float32)) for n in range(3)]
    for name in ("a", "b", "b") if again else ("a", "b"):
        loaded[name](*map(pointer, tensors), 1, 1, 1, 32, 1, 1, 0)
    return tensors[2].numpy()


def test_dependent_launches() -> None:
    with pytest.raises(RuntimeError, match=r"thread 3 .*ends without grid_dependency_wait"):
        dependent(wait="i != 3")
    with options(races=True):
        np.testing.assert_array_equal(dependent(), np.arange(32) + 1)
        dependent(again=True)
        with pytest.raises(RuntimeError, match=r"race on .* reads .* of a writes .*may not have"):
            dependent(early="if (i == 7) w += x[7];")
        with pytest.raises(RuntimeError, match=r"race on .* writes .* of b "):
            dependent(early="y[i] = 0;", again=True)
        with options(arch=80):  # where launches wait for each other
            dependent(early="if (i == 7) w += 0 * x[7];")


COPIERS = """__shared__ __align__(16) float s[2][128];
__shared__ uint64_t full[2], empty[2];
if (i == 0)
  for (int n = 0; n < 2; n++) { barrier_init(&full[n], 32); barrier_init(&empty[n], 1); }
__syncthreads();
if (i < 32) {
  for (int n = 0; n < 4; n++) {
    barrier_wait(&empty[n % 2], n / 2 % 2 ^ 1);
    copy_async_16(s[n % 2] + 4 * i, x + 128 * n + 4 * i);
    attention::arrive_with_copies(&full[n % 2]);
  }
  return;
}
float sum = 0;
for (int n = 0; n < 4; n++) {
  WAIT;
  sum += s[n % 2][127 - i];
  __syncwarp();
  if (i == 32) barrier_arrive(&empty[n % 2]);
}
y[i - 32] = sum;"""


def test_arrivals_with_copies() -> None:
    source = kernel(COPIERS.replace("WAIT", FULL), "float* x, float* y", PTX)
    _, y = accepts(source, X, np.zeros(32, np.float32), block=(64,))
    np.testing.assert_array_equal(y, X.reshape(4, 128).sum(0)[95:63:-1])
    hasty = COPIERS.replace("WAIT", "if (n == 0) __nanosleep(1)")
    source = kernel(hasty, "float* x, float* y", PTX)
    what = "without a wait|no thread of the block has written|race on|nobody can go on"
    refuses(what, source, X, np.zeros(32, np.float32), block=(64,), races=True)
