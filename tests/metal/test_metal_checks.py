"""What the emulated Metal device refuses while a kernel runs, each beside one that it takes."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from metal_kernels import launch, msl, on_device, pointer

from mlc_compile.runtime import metal_emulator
from mlc_compile.runtime.metal_emulator import Mode, Options, options, set_options

TWO = "device float* x [[ buffer(0) ]],\n  device float* y [[ buffer(1) ]]"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
DEVICE_BARRIER = "threadgroup_barrier(mem_flags::mem_device);"
ALL = np.arange(64, dtype=np.float32)


def refuses(words: str, source: str, *arrays: Any, mode: Mode = Mode.CHECKED, **how: Any) -> str:
    with options(mode=mode), pytest.raises(RuntimeError, match=words) as caught:
        launch(source, *arrays, **how)
    return str(caught.value)


def accepts(source: str, *arrays: Any, mode: Mode = Mode.CHECKED, **how: Any) -> Any:
    with options(mode=mode):
        return launch(source, *arrays, **how)


# --- memory


def test_reads_and_writes_within_a_buffer() -> None:
    source = msl("  y[group * 32 + i] = x[group * 32 + i] * 2.0f;", TWO)
    for mode in Mode:
        _, y = accepts(source, ALL, np.zeros(64, np.float32), groups=2, mode=mode)
        assert (y == ALL * 2).all()


@pytest.mark.parametrize("mode", [Mode.CHECKED, Mode.RACES])
def test_a_read_past_the_end_names_kernel_thread_buffer_and_line(mode: Mode) -> None:
    source = msl("  int far = (int)i + 33;\n  y[i] = x[far];", TWO)
    message = refuses("out of bounds", source, ALL, np.zeros(64, np.float32), mode=mode)
    line = source.splitlines().index("  y[i] = x[far];") + 1
    assert "k, threadgroup (0, 0, 0), thread (31, 0, 0)" in message
    assert (
        f"read of 4 bytes out of bounds (line {line}): buffer(0) 'x' at byte 256 of 256" in message
    )
    accepts(source, np.zeros(65, np.float32), np.zeros(64, np.float32), mode=mode)


def test_a_write_before_the_start() -> None:
    source = msl("  y[(int)i - 1] = x[i];", TWO)
    message = refuses("out of bounds", source, ALL, np.zeros(64, np.float32))
    assert "write of 4 bytes" in message and "buffer(1) 'y' at byte -4" in message


def test_vectors_at_the_end_of_a_buffer() -> None:
    source = msl("  *(device float4*)(y + i * 4) = *(device float4*)(x + i * 4);", TWO)
    _, y = accepts(source, ALL, np.zeros(64, np.float32), threads=16)
    assert (y == ALL).all()
    assert "of 16 bytes" in refuses("out of bounds", source, ALL[:62], ALL, threads=16)
    assert "write" in refuses("out of bounds", source, ALL, ALL[:62], threads=16)


def test_misaligned_vectors() -> None:
    source = msl("  *(device float4*)(y + i * 4) = *(device float4*)(x + i * 4 + 1);", TWO)
    refuses("read of 16 bytes not aligned to 16", source, ALL, ALL, threads=8)


def test_threadgroup_and_thread_arrays() -> None:
    source = msl(
        "  threadgroup float s[32];\n  threadgroup float after[32];\n"
        f"  s[i] = x[i];\n  after[i] = 0.0f;\n  {BARRIER}\n  x[i] = s[31 - i + (int)x[32]];"
    )
    (x,) = accepts(source, ALL * (ALL != 32))
    assert (x[:32] == ALL[31::-1]).all()
    message = refuses("out of bounds", source, ALL * (ALL != 32) + (ALL == 32))
    assert "threadgroup array 's' at byte 128 of 128" in message
    source = msl("  thread float v[4];\n  v[(int)x[i]] = 1.0f;\n  x[i] = v[(int)x[i]];")
    accepts(source, ALL % 4)
    refuses("element 4 of an array of the thread of 4", source, ALL % 5)


def test_memory_that_is_not_the_devices() -> None:
    source = msl("  x[i] = 1.0f;")
    host = np.zeros(64, np.float32)
    refuses(
        r"buffer\(0\) 'x' is not in memory of the device", source, ctypes.c_void_p(host.ctypes.data)
    )
    tensor = on_device(host)
    address = pointer(tensor)
    accepts(source, address)
    del tensor
    refuses("not in memory of the device, or was freed", source, address)


def test_fresh_memory_is_poisoned() -> None:
    import tvm

    for dtype, poison in (("float32", np.nan), ("float16", np.nan), ("int32", -1)):
        fresh = tvm.runtime.empty((5,), dtype, tvm.device("metal", 0)).numpy()
        np.testing.assert_array_equal(fresh, np.full(5, poison, dtype))
    source = msl("  threadgroup float s[32];\n  if (i < 16) { s[i] = 1.0f; }\n"
                 f"  {BARRIER}\n  x[i] = s[i];")  # fmt: skip
    (x,) = accepts(source, ALL)
    assert (x[:16] == 1).all() and np.isnan(x[16:32]).all()
    refuses("threadgroup array 's' at byte 64 of 128 is read before any thread has written it",
            source, ALL, mode=Mode.RACES)  # fmt: skip


# --- barriers


def test_a_barrier_that_some_threads_skip() -> None:
    source = msl(f"  if (i < (int)x[0]) {{\n    {BARRIER}\n  }}\n  x[i + 1] = 1.0f;")
    accepts(source, ALL + 32)
    accepts(source, ALL)
    message = refuses("divergent barrier", source, ALL + 20)
    assert "20 of 32 threads wait" in message and "thread (31, 0, 0) ended without it" in message


def test_different_barriers() -> None:
    source = msl(f"  if (x[i] < 1.0f) {{\n    {BARRIER}\n  }} else {{\n    {BARRIER}\n  }}")
    accepts(source, ALL * 0)
    message = refuses("divergent barriers", source, ALL)
    assert "thread (0, 0, 0) waits in line 9, thread (1, 0, 0) in line 11" in message


def test_barriers_in_loops_and_groups_of_every_size() -> None:
    source = msl(
        f"""  threadgroup float s[256];
  s[i] = x[group * n[0] + i];
  {BARRIER}
  for (int step = 1; step < n[0]; step = step * 2) {{
    float other = (int)i >= step ? s[(int)i - step] : 0.0f;
    {BARRIER}
    s[i] = s[i] + other;
    {BARRIER}
  }}
  x[group * n[0] + i] = s[i];""",
        "device float* x [[ buffer(0) ]],\n  constant a_t& a [[ buffer(1) ]]",
        "struct a_t {\n  int n[2];\n};",
    ).replace("n[0]", "a.n[0]")
    rng = np.random.default_rng(0)
    for threads in (1, 3, 32, 33, 256):
        x = rng.integers(0, 9, (3, threads)).astype(np.float32)
        for order in ("ascending", "descending", "shuffled"):
            for mode in Mode:
                with options(order=order, seed=threads, mode=mode):
                    (y,) = launch(
                        source, x.reshape(-1), groups=3, threads=threads, scalars=[threads]
                    )
                np.testing.assert_array_equal(y.reshape(3, -1), x.cumsum(1))


def test_too_many_threads() -> None:
    with options(max_threads=64):
        launch(msl("  x[i] = 1.0f;"), ALL, threads=64)
        with pytest.raises(RuntimeError, match="65 threads in a threadgroup, the limit is 64"):
            launch(msl("  x[i] = 1.0f;"), ALL, threads=65)


# --- races


def race(body: str, *arrays: Any, **how: Any) -> str:
    return refuses("race", msl(body), *(arrays or (ALL,)), mode=Mode.RACES, **how)


def no_race(body: str, *arrays: Any, **how: Any) -> Any:
    return accepts(msl(body), *(arrays or (ALL,)), mode=Mode.RACES, **how)


def test_neighbours_without_a_barrier() -> None:
    body = f"  threadgroup float s[32];\n  s[i] = 0.0f;\n  {BARRIER}\n  s[i] = x[i];\n"
    body += "  BETWEEN\n  x[i] = s[31 - i];"
    no_race(body.replace("BETWEEN", BARRIER))
    # thread 16 is the first one that finds its element read already
    message = race(body.replace("BETWEEN", ""))
    assert "thread (16, 0, 0): race on threadgroup array 's' at byte 64 of 128" in message
    assert "it writes (line 11) what thread (15, 0, 0) reads (line 13)" in message
    with options(order="descending"):
        message = race(body.replace("BETWEEN", ""))
    assert "thread (15, 0, 0): race on threadgroup array 's' at byte 60 of 128" in message


def test_a_missing_barrier_before_reuse() -> None:
    body = f"  threadgroup float s[1];\n  if (i == 0) {{ s[0] = x[0]; }}\n  {BARRIER}\n"
    body += "  float v = s[0];\n  BETWEEN\n  if (i == 31) { s[0] = 7.0f; }\n  x[i] = v;"
    no_race(body.replace("BETWEEN", BARRIER))
    message = race(body.replace("BETWEEN", ""))
    assert "it writes (line 13) what thread (0, 0, 0) reads (line 11)" in message


def test_two_writers() -> None:
    message = race("  threadgroup float s[1];\n  s[0] = x[i];")
    assert "it writes (line 9) what thread (0, 0, 0) writes (line 9)" in message
    # the same value from every thread changes nothing, whichever comes last
    no_race("  threadgroup float s[1];\n  s[0] = 3.0f;\n  x[i] = s[0];")


def test_device_memory_needs_a_device_barrier() -> None:
    body = "  x[i] = 1.0f + x[i];\n  {}\n  x[32 + i] = x[31 - i];"
    no_race(body.format(DEVICE_BARRIER))
    assert "without a barrier with mem_device in between" in race(body.format(BARRIER))


def test_a_write_behind_a_barrier_does_not_harm_what_was_read_before_it() -> None:
    no_race(f"  float v = x[0];\n  {BARRIER}\n  if (i == 31) {{ x[0] = 7.0f; }}\n  x[i + 1] = v;")


def test_in_place_update_of_what_all_lanes_read() -> None:
    # The form of TVM's _merge_state_inplace.
    body = "  float old = x[0];\n  {}\n  x[0] = old + 1.0f;\n  x[1 + i] = old;"
    assert race(body.format(""))
    no_race(body.format(DEVICE_BARRIER))


def test_threadgroups_that_meet_in_device_memory() -> None:
    message = race("  x[i] = (float)group;", groups=2)
    assert "of threadgroup (0, 0, 0)" in message and "nothing orders two threadgroups" in message
    no_race("  x[group * 32 + i] = (float)group;", groups=2)
    assert race("  x[32 * group + i] = x[32 * (1 - group) + i] + 1.0f;", groups=2)


def test_two_launches_do_not_race() -> None:
    tensor = on_device(ALL)
    for shift in range(2):
        no_race(f"  x[32 + (int)i] = x[{shift} * (int)i];", tensor)


def test_words_of_half_a_granule() -> None:
    arguments = "device half* h [[ buffer(0) ]],\n  device float* x [[ buffer(1) ]]"
    halves = np.zeros(64, np.float16)
    accepts(msl("  h[i * 2] = (half)x[i];", arguments), halves, ALL, mode=Mode.RACES)
    body = "  h[i] = (half)x[i];\n  *(device half2*)(h + (i / 2) * 2) = half2((half)2.0f, (half)i);"
    refuses("race", msl(body, arguments), halves, ALL, mode=Mode.RACES)


# --- SIMD groups


@pytest.mark.parametrize("mode", list(Mode))
def test_shuffles(mode: Mode) -> None:
    source = msl(
        "  float v = x[i];\n  y[i] = simd_shuffle(v, (ushort)(31 - i % 32));\n"
        "  y[64 + i] = simd_shuffle_down(v, 4);\n  y[128 + i] = simd_shuffle_up(v, 4);\n"
        "  y[192 + i] = simd_sum(v);\n  y[256 + i] = simd_shuffle_xor(v, 1);\n"
        "  y[320 + i] = simd_max(v);",
        TWO,
    )
    _, y = accepts(source, ALL, np.zeros(384, np.float32), threads=64, mode=mode)
    y, lanes = y.reshape(6, 2, 32), ALL.reshape(2, 32)
    i = np.arange(32)
    np.testing.assert_array_equal(y[0], lanes[:, ::-1])
    np.testing.assert_array_equal(y[1], lanes[:, np.where(i + 4 < 32, i + 4, i)])
    np.testing.assert_array_equal(y[2], lanes[:, np.where(i >= 4, i - 4, i)])
    np.testing.assert_array_equal(y[3], np.repeat(lanes.sum(1, keepdims=True), 32, 1))
    np.testing.assert_array_equal(y[4], lanes[:, i ^ 1])
    np.testing.assert_array_equal(y[5], np.repeat(lanes.max(1, keepdims=True), 32, 1))


def test_shuffles_from_lanes_that_are_not_there() -> None:
    source = msl("  x[i] = simd_shuffle(x[i], (ushort)(i + 1));")
    refuses("outside of the SIMD group, lane 32", source, ALL)
    refuses("a lane that does not take part, lane 20", source, ALL, threads=20)
    half = msl("  if (i < 16) {\n    x[i] = simd_shuffle(x[i], (ushort)(i ^ MASK));\n  }")
    accepts(half.replace("MASK", "8"), ALL)
    refuses("a lane that does not take part, lane 16", half.replace("MASK", "16"), ALL)


def test_a_simdgroup_barrier_orders_lanes_of_one_simd_group() -> None:
    body = "  threadgroup float s[64];\n  s[i] = x[i];\n"
    body += "  simdgroup_barrier(mem_flags::mem_threadgroup);\n  x[i] = s[i ^ {}];"
    no_race(body.format(1), threads=64)
    race(body.format(32), threads=64)
    refuses("16 of the 32 lanes of a SIMD group meet at the simdgroup_barrier",
            msl("  if (i < 16) { simdgroup_barrier(mem_flags::mem_none); }"), ALL)  # fmt: skip


@pytest.mark.parametrize("mode", list(Mode))
def test_simdgroup_matrices(mode: Mode) -> None:
    source = msl(
        f"""  threadgroup half s[64];
  s[i] = a[i];
  s[i + 32] = a[i + 32];
  simdgroup_half8x8 ma[1];
  simdgroup_half8x8 mb[1];
  simdgroup_float8x8 mc[1];
  mc[0] = make_filled_simdgroup_matrix<float, 8, 8>(0.000000e+00f);
  {BARRIER}
  simdgroup_load(ma[0], (&(s[0])), 8, 0, false);
  simdgroup_load(mb[0], b, 8, 0, true);
  simdgroup_multiply_accumulate(mc[0], ma[0], mb[0], mc[0]);
  simdgroup_store(mc[0], c, 8, 0, false);""",
        "device half* a [[ buffer(0) ]],\n  device half* b [[ buffer(1) ]],\n"
        "  device float* c [[ buffer(2) ]]",
    )
    rng = np.random.default_rng(1)
    a, b = rng.integers(-4, 5, (2, 8, 8)).astype(np.float16)
    *_, c = accepts(source, a, b, np.zeros((8, 8), np.float32), mode=mode)
    np.testing.assert_array_equal(c, a.astype(np.float32) @ b.T.astype(np.float32))
    refuses("out of bounds", source, a, b[:7], np.zeros((8, 8), np.float32))


# --- orders


def test_another_order_shows_what_depends_on_it() -> None:
    source = msl("  threadgroup float s[1];\n  s[0] = (float)i;\n  x[i] = s[0];")
    seen = set()
    for order, seed in (("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)):
        with options(order=order, seed=seed):
            (x,) = launch(msl("  x[0] = (float)i;"), ALL)
            seen.add(float(x[0]))
            (again,) = launch(msl("  x[0] = (float)i;"), ALL)
            assert again[0] == x[0]  # the same seed, the same order
            launch(source, ALL)
    assert seen >= {31.0, 0.0} and len(seen) >= 3


def test_options_are_restored_and_checked() -> None:
    from mlc_compile.errors import InputError

    with pytest.raises(RuntimeError), options(max_threads=8):
        launch(msl("  x[i] = 1.0f;"), ALL, threads=9)
    launch(msl("  x[i] = 1.0f;"), ALL, threads=9)
    with pytest.raises(InputError, match="ascending, descending, shuffled"):
        set_options(Options(order="random"))


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlc_compile.errors import InputError

    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    assert metal_emulator._environment_options() == Options(workers=3)
    monkeypatch.setenv("MLC_COMPILE_METAL_MODE", "races")
    monkeypatch.setenv("MLC_COMPILE_METAL_ORDER", "shuffled:12")
    assert metal_emulator._environment_options() == Options(Mode.RACES, "shuffled", 12, 3)
    for name, bad in [("ORDER", "random"), ("ORDER", "shuffled:x"), ("MODE", "strict")]:
        with monkeypatch.context() as patch:
            patch.setenv(f"MLC_COMPILE_METAL_{name}", bad)
            with pytest.raises(InputError, match=f"MLC_COMPILE_METAL_{name} is '{bad}'"):
                metal_emulator._environment_options()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_share_the_groups(workers: int) -> None:
    n = 1000 * 64
    source = msl("  x[group * 64 + i] = x[group * 64 + i] + (float)group;")
    barrier = msl(
        f"  threadgroup float s[64];\n  s[i] = x[group * 64 + i];\n  {BARRIER}\n"
        "  x[group * 64 + i] = s[63 - i];"
    )
    x = np.arange(n, dtype=np.float32)
    with options(workers=workers):
        (y,) = launch(source, x, groups=1000, threads=64)
        (z,) = launch(barrier, x, groups=1000, threads=64)
        with pytest.raises(RuntimeError, match=r"threadgroup \(999, 0, 0\).*out of bounds"):
            launch(source, x[: n - 1], groups=1000, threads=64)
    np.testing.assert_array_equal(y, x + np.arange(n) // 64)
    np.testing.assert_array_equal(z, x.reshape(1000, 64)[:, ::-1].reshape(-1))
