"""Warp operations, matrix fragments and short floats of the emulated device against numpy."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cuda_sources import accepts, kernel, launch, refuses

from mlc_compile.runtime.cuda_emulator import options

ALL = np.arange(64, dtype=np.float32)
PTX = '#include "ptx.cuh"\n'
FULL = "0xffffffffu"


def test_shuffles() -> None:
    forms = [
        f"__shfl_sync({FULL}, v, 31 - i % 32)",
        f"__shfl_sync({FULL}, v, i + 1, 8)",
        f"__shfl_down_sync({FULL}, v, 4)",
        f"__shfl_up_sync({FULL}, v, 4)",
        f"__shfl_xor_sync({FULL}, v, 5)",
        f"__shfl_down_sync({FULL}, v, 3, 16)",
        f"__shfl_xor_sync({FULL}, v, 9, 8)",
    ]
    body = "float v = x[i];\n" + "".join(f"y[{64 * n} + i] = {f};\n" for n, f in enumerate(forms))
    out = np.zeros(64 * len(forms), np.float32)
    _, y = accepts(kernel(body, "float* x, float* y"), ALL, out, block=(64,))
    y, lanes, i = y.reshape(-1, 2, 32), ALL.reshape(2, 32), np.arange(32)
    wanted = [
        31 - i,
        i // 8 * 8 + (i + 1) % 8,
        np.where(i + 4 < 32, i + 4, i),
        np.where(i >= 4, i - 4, i),
        i ^ 5,
        np.where(i % 16 + 3 < 16, i + 3, i),
        np.where((i ^ 9) < (i | 7) + 1, i ^ 9, i),
    ]
    for got, source in zip(y, wanted, strict=True):
        np.testing.assert_array_equal(got, lanes[:, source])


def test_shuffles_of_other_types() -> None:
    body = f"""half2 h = __floats2half2_rn(i, 2 * i);
h = __shfl_xor_sync({FULL}, h, 1);
double d = __shfl_xor_sync({FULL}, (double)i, 2);
unsigned long long n = __shfl_xor_sync({FULL}, 1ull << i, 4);
x[i] = (float)h.x + (float)h.y + (float)d;
x[32 + i] = __ffsll(n) - 1;"""
    (x,) = accepts(kernel(body), ALL)
    i = np.arange(32)
    np.testing.assert_array_equal(x[:32], 3 * (i ^ 1) + (i ^ 2))
    np.testing.assert_array_equal(x[32:], i ^ 4)


def test_votes_and_masks() -> None:
    body = f"""x[i] = __popc(__ballot_sync({FULL}, i % 3 == 0)) + 100 * __any_sync({FULL}, i == 77)
+ 1000 * __all_sync({FULL}, i < 64);
if (i % 32 < 16) x[i] += 10000 * __popc(__ballot_sync(0xffffu, i % 2));
x[i] += 100000 * __popc(__match_any_sync({FULL}, i / 8));"""
    (x,) = accepts(kernel(body), ALL, block=(64,))
    low = np.where(np.arange(64) % 32 < 16, 80000, 0)
    np.testing.assert_array_equal(x, 11 + 1000 + low + 800000)


def test_reductions() -> None:
    body = f"x[i] = __reduce_add_sync({FULL}, i) + 1000 * __reduce_max_sync({FULL}, i % 7);"
    assert (accepts(kernel(body), ALL)[0][:32] == 496 + 6000).all()
    with options(arch=75), pytest.raises(RuntimeError, match="__reduce_add_sync"):
        launch(kernel(body), ALL)  # which it lacks


def test_lanes_that_do_not_come() -> None:
    shuffle = f"__shfl_xor_sync({FULL}, x[i], 1)"
    message = refuses("nobody can go on", kernel(f"if (i < 20) x[i] = {shuffle};"), ALL)
    assert "20 of its 32 lanes have come, lane 20 has ended" in message
    message = refuses("nobody can go on", kernel(f"x[i] = {shuffle};"), ALL, block=(20,))
    assert "lane 20 does not exist" in message
    other = "if (i < 16) __syncwarp(); else __ballot_sync(0xffffffffu, 1);"
    assert "is in a vote of mask" in refuses("nobody can go on", kernel(other), ALL)
    own = "if (i == 16) __syncwarp(0xffffu);"
    assert "(lane 16) is not in the mask 0xffff of __syncwarp" in refuses(
        "not in the mask", kernel(own), ALL
    )
    lane = "if (i < 16) x[i] = __shfl_sync(0xffffu, x[i], 20);"
    refuses("a shuffle reads a lane that is not in its mask", kernel(lane), ALL)


# --- matrices

FLOATS = {"half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16}


def words(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint16)


def small(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers that every short float holds exactly, and whose sums are exact."""
    return rng.integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("arch", [75, 80])
@pytest.mark.parametrize("element", FLOATS)
def test_matrix_products(arch: int, element: str) -> None:
    # Fragments as the PTX ISA's figures have them, element by element.
    body = f"""int g = i / 4, t = i % 4 * 2;
auto pair = [](const unsigned short* p, int second) {{
  return (uint32_t)p[0] | (uint32_t)p[second] << 16;
}};
uint32_t fa[4], fb[2];
for (int n = 0; n < 4; n++) fa[n] = pair(a + (g + n % 2 * 8) * 16 + t + n / 2 * 8, 1);
for (int n = 0; n < 2; n++) fb[n] = pair(b + (t + n * 8) * 8 + g, 8);
float d[4];
for (int n = 0; n < 4; n++) d[n] = c[(g + n / 2 * 8) * 8 + t + n % 2];
mlc::mma_m16n8k16(d, fa, fb, {element}());
for (int n = 0; n < 4; n++) c[(g + n / 2 * 8) * 8 + t + n % 2] = d[n];"""
    rng = np.random.default_rng(1)
    a, b, c = small(rng, 16, 16), small(rng, 16, 8), small(rng, 16, 8)
    source = kernel(body, "unsigned short* a, unsigned short* b, float* c", PTX)
    short = FLOATS[element]
    with options(arch=arch):
        got = accepts(source, words(a.astype(short)), words(b.astype(short)), c)[2]
    works = arch >= 80 or element == "half"  # bfloat16 is for sm_80 and later
    np.testing.assert_array_equal(got, c + a @ b if works else c)


@pytest.mark.parametrize("suffix", ["", "_trans"])
def test_matrix_loads(suffix: str) -> None:
    body = f"""__shared__ __align__(16) unsigned short s[4 * 64];
for (int n = i; n < 256; n += 32) s[n] = a[n];
__syncwarp();
uint32_t r[4];
mlc::load_matrix_x4{suffix}(r, s + i * 8);
for (int n = 0; n < 4; n++) {{
  out[(n * 32 + i) * 2] = r[n];
  out[(n * 32 + i) * 2 + 1] = r[n] >> 16;
}}"""
    a = np.arange(256, dtype=np.uint16)
    source = kernel(body, "unsigned short* a, unsigned short* out", PTX)
    _, out = accepts(source, a, np.zeros(256, np.uint16))
    matrices = a.reshape(4, 8, 8)
    wanted = matrices.transpose(0, 2, 1) if suffix else matrices
    np.testing.assert_array_equal(out.reshape(4, 8, 8), wanted)
    refuses("16-byte aligned", source.replace("s + i * 8", "s + i * 8 + (i == 3)"),
            a, np.zeros(256, np.uint16))  # fmt: skip
    without = source.replace("__syncwarp();", "")
    what = "race on|no thread of the block has written"
    refuses(what, without, a, np.zeros(256, np.uint16), races=True)


# --- short floats


def every_half(rng: np.random.Generator, short: Any, count: int) -> np.ndarray:
    """Random bits, without NaN, biased to magnitudes that meet in a sum."""
    x = rng.integers(0, 1 << 16, count).astype(np.uint16).view(short)
    near = rng.standard_normal(count).astype(short)
    x = np.where(rng.random(count) < 0.5, near, x)
    return np.where(np.isfinite(x.astype(np.float32)), x, short(1))


@pytest.mark.parametrize("element", FLOATS)
def test_arithmetic_is_rounded_once(element: str) -> None:
    short = FLOATS[element]
    rng = np.random.default_rng(2)
    count = 4096
    a, b, c = (every_half(rng, short, count) for _ in range(3))
    body = f"""for (int n = i; n < {count}; n += 32) {{
  out[n] = __hadd(a[n], b[n]);
  out[{count} + n] = __hmul(a[n], b[n]);
  out[2 * {count} + n] = a[n] - b[n];
  out[3 * {count} + n] = __hfma(a[n], b[n], c[n]);
}}"""
    pointers = ", ".join(f"{element}* {name}" for name in ("a", "b", "c", "out"))
    out = np.zeros(4 * count, np.uint16)
    with options(checked=False):
        *_, got = launch(kernel(body, pointers), words(a), words(b), words(c), out)
    x, y, z = (v.astype(np.longdouble) for v in (a, b, c))
    pairs = ((x, y), (x * y, 0 * x), (x, -y), (x * y, z))  # whose sums are wanted
    for bits, (p, q) in zip(got.reshape(4, count), pairs, strict=True):
        np.testing.assert_array_equal(bits.view(short), nearest(p, q, short))


def nearest(p: np.ndarray, q: np.ndarray, short: Any) -> np.ndarray:
    """p + q rounded once: of all numbers of the type the nearest, of two the even one."""
    numbers = np.arange(0x7F80 if short is ml_dtypes.bfloat16 else 0x7C00, dtype=np.uint16)
    finite = numbers.view(short).astype(np.longdouble)
    exact = p + q
    part = exact - p
    rest = (p - (exact - part)) + (q - part)  # what `exact` lacks (Knuth's TwoSum)
    rest = np.where(np.signbit(exact), -rest, rest)
    # What rounds to infinity is half a step beyond the largest.
    edges = np.append(finite, 2 * finite[-1] - finite[-2])
    size = np.abs(exact)
    above = np.clip(np.searchsorted(edges, size, side="left"), 1, len(edges) - 1)
    low, high = edges[above - 1], edges[above]
    tie = size - low == high - size
    up = np.where(tie, (rest > 0) | ((rest == 0) & (above % 2 == 0)), size - low > high - size)
    index = np.where(size > edges[-1], len(finite), np.where(up, above, above - 1))
    sign = np.where(np.signbit(exact), 0x8000, 0)
    return (index | sign).astype(np.uint16).view(short)


def test_conversions_and_bytes() -> None:
    body = """x[0] = (float)__float2half_rn(1.0f + 1.0f / 2048);
x[1] = (float)__float2half_rn(1.0f + 3.0f / 2048);
x[2] = (float)__float2bfloat16(1.0f + 1.0f / 256);
x[3] = (float)(half)65520.0f;
x[4] = (float)__byte_perm(0x33221100, 0x77665544, 0x7410);
x[5] = (int)(half)-2.75f;
float2 f = __half22float2(__hfma2(__floats2half2_rn(1, 2), __float2half2_rn(3),
                                  __half2half2((half)4.0f)));
x[6] = f.x; x[7] = f.y;
x[8] = __popc(0xF0F0u) + __clz(1) * 100;
x[9] = max(3, 2) + min(1.5f, 2.5f);
x[10] = __uint_as_float(0x3F800000u);"""
    (x,) = accepts(kernel(body), ALL, block=(1,))
    wanted = [1, 1 + 2 / 1024, 1, np.inf, 0x77441100, -2, 7, 10, 8 + 3100, 4.5, 1]
    np.testing.assert_array_equal(x[: len(wanted)], np.float32(wanted))
