"""What the emulated device finds wrong with kernels, and what it lets pass."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import tvm
import tvm_ffi
from cuda_sources import (
    DYNAMIC,
    accepts,
    kernel,
    launch,
    module,
    on_device,
    pointer,
    race,
    refuses,
)

from mlc_compile.errors import InputError
from mlc_compile.runtime.cuda_emulator import Options, options, record, set_options
from mlc_compile.targets.nvidia.packing import CudaModule, save_module

ALL = np.arange(64, dtype=np.float32)
PTX = '#include "ptx.cuh"\n'


# --- bounds and alignment


@pytest.mark.parametrize("index", ["64", "-1", "1000"])
def test_out_of_bounds(index: str) -> None:
    message = refuses("outside of every buffer", kernel(f"if (i == 3) x[{index}] = 1;"), ALL)
    assert "thread 3 writes 4 bytes at k:3" in message
    assert "a buffer of 256 bytes" in message
    assert "reads" in refuses("outside", kernel(f"if (i == 3) x[0] = x[{index}];"), ALL)


def test_an_access_across_the_end() -> None:
    body = "*(float4*)(x + 60) = make_float4(1, 2, 3, 4);"
    np.testing.assert_array_equal(launch(kernel(body), ALL, block=(1,))[0][60:], [1, 2, 3, 4])
    message = refuses("across the end", kernel(body), ALL[:62])
    assert "8 bytes across the end of a buffer of 248 bytes" in message


@pytest.mark.parametrize(("type", "offset"), [("float4", 2), ("float2", 1), ("uint4", 3)])
def test_misaligned(type: str, offset: int) -> None:
    body = f"{type} v = *(const {type}*)(x + {offset}); x[0] = v.x; x[1] = v.y;"
    message = refuses("not a multiple of", kernel(body), ALL)
    assert "reads" in message and "at once at k:3" in message


def test_freed_and_host_memory() -> None:
    tensor = on_device(ALL)
    address = pointer(tensor)
    del tensor
    loaded = module(kernel("x[i] = 1;"), 1)
    extents = (1, 1, 1, 32, 1, 1, 0)
    with pytest.raises(RuntimeError, match="argument 0 is not in memory of the device"):
        loaded["k"](address, *extents)
    with pytest.raises(RuntimeError, match="argument 0 is not in memory of the device"):
        loaded["k"](ctypes.c_void_p(ALL.ctypes.data), *extents)


def test_shared_memory_ends() -> None:
    dynamic = kernel(f"{DYNAMIC}((float*)memory)[i + 1] = x[i];")
    message = refuses("after the end of dynamic shared memory", dynamic, ALL, shared=128)
    assert "of 128 bytes" in message
    accepts(dynamic, ALL, shared=132)
    fixed = kernel("__shared__ float s[32];\ns[i + (int)x[0]] = x[i];")
    accepts(fixed, ALL)
    assert "static shared memory" in refuses("outside", fixed, np.full(32, 1, np.float32))


def test_limits_of_a_launch() -> None:
    source = kernel(f"{DYNAMIC}x[i] = 1;")
    for arch, most in ((75, 64 << 10), (80, 163 << 10), (90, 227 << 10)):
        with options(arch=arch):
            launch(source, ALL, shared=most)
            with pytest.raises(RuntimeError, match=f"bytes of shared memory.*limit is {most}"):
                launch(source, ALL, shared=most + 4)
    with pytest.raises(RuntimeError, match="1056 threads in a block, the limit is 1024"):
        launch(source, ALL, block=(1056,))
    with options(max_threads=31), pytest.raises(RuntimeError, match="the limit is 31"):
        launch(source, ALL)
    with pytest.raises(RuntimeError, match="limit in y and z is 65535"):
        launch(source, ALL, grid=(1, 65536))


def test_what_nobody_wrote_is_nan() -> None:
    body = "__shared__ float s[32];\n__shared__ int n[32];\n"
    body += f"{DYNAMIC}x[i] = s[i];\nx[32 + i] = n[i] + (float)((int*)memory)[i];"
    x = launch(kernel(body), ALL, shared=128)[0]
    assert np.isnan(x[:32]).all() and (x[32:] == -2).all()
    message = refuses("no thread of the block has written", kernel(body), ALL, shared=128,
                      races=True)  # fmt: skip
    assert "static shared memory" in message and "at k:6" in message
    fresh = tvm.runtime.empty((4,), "float32", tvm.device("cuda", 0))
    assert np.isnan(fresh.numpy()).all()


# --- barriers


def test_divergent_barriers() -> None:
    two = "if (i < 5) {\n__syncthreads();\n} else {\n__syncthreads();\n}"
    message = refuses("divergent barriers", kernel(two), ALL, block=(64,))
    assert "at k:4" in message and "at k:6" in message
    wait = "if (i < 5) __syncthreads();\nelse __syncwarp();"
    message = refuses("divergent barriers: nobody can go on", kernel(wait), ALL)
    assert "5 of" in message and "__syncwarp of mask 0xffffffff at k:4" in message


def test_threads_that_have_ended_are_not_waited_for() -> None:
    # CUDA C++ Programming Guide, "Synchronization Functions": all non-exited threads.
    body = "__shared__ float s[64];\nif (i >= 40) return;\ns[i] = x[i];\n__syncthreads();\n"
    x = accepts(kernel(f"{body}x[i] = s[39 - i];"), ALL, block=(64,))[0]
    np.testing.assert_array_equal(x, [*range(39, -1, -1), *range(40, 64)])


def test_counting_barriers() -> None:
    body = "x[i] = __syncthreads_count(i % 3 == 0) + 100 * __syncthreads_or(i == 7)"
    body += " + 1000 * __syncthreads_and(i != 7);"
    assert (accepts(kernel(body), ALL, block=(64,))[0] == 122).all()


# --- races


def test_a_missing_barrier() -> None:
    body = "__shared__ float s[64];\ns[i] = x[i];\n{}\nx[i] = s[63 - i];"
    accepts(kernel(body.format("__syncthreads();")), ALL, block=(64,))
    race_or_unwritten = "race on static shared memory|no thread of the block has written"
    message = refuses(race_or_unwritten, kernel(body.format("")), ALL, races=True, block=(64,))
    assert "at k:6" in message
    # of what was written before
    twice = body.format("__syncthreads();") + "\n{}\ns[i] = 2;"
    accepts(kernel(twice.format("__syncthreads();")), ALL, block=(64,))
    message = race(kernel(twice.format("")), ALL, block=(64,))
    assert "writes at k:8" in message and "reads at k:6" in message
    assert "nothing orders the two" in message


def test_a_warp_is_ordered_by_syncwarp_alone() -> None:
    body = (
        "__shared__ float s[64];\ns[i] = 0;\n__syncthreads();\ns[i] = x[i];\n{}\nx[i] = s[i ^ {}];"
    )
    accepts(kernel(body.format("__syncwarp();", 1)), ALL, block=(64,))
    race(kernel(body.format("__syncwarp();", 32)), ALL, block=(64,))
    race(kernel(body.format("__syncwarp(0xffffu << (i & 16));", 16)), ALL, block=(64,))
    accepts(kernel(body.format("__syncwarp(0xffffu << (i & 16));", 8)), ALL, block=(64,))
    # A shuffle does not order memory, CUDA says.
    race(kernel(body.format("__shfl_sync(0xffffffffu, i, 0);", 1)), ALL, block=(64,))


def test_global_memory() -> None:
    assert "a buffer at byte 4" in race(kernel("x[1] = i;"), ALL)
    accepts(kernel("x[i] = x[i + 32];"), ALL)
    race(kernel("x[i] = x[i + 1];"), ALL)
    # Of the same value: harmless.
    accepts(kernel("x[1] = 5; x[32 + i] = x[1];"), ALL)
    # A lane that reads what all overwrite: TVM's _merge_state_inplace had it.
    body = "const float old = x[0];\n{}\nx[0] = old + 1;\nx[1 + i] = old;"
    race(kernel(body.format("")), ALL)
    accepts(kernel(body.format("__syncthreads();")), ALL)


def test_blocks_are_ordered_by_nothing_but_fences_and_atomics() -> None:
    message = race(kernel("x[i] = blockIdx.x;"), ALL, grid=(2,))
    assert "of block (" in message and "nothing orders the two blocks" in message
    accepts(kernel("x[blockIdx.x * 32 + i] = blockIdx.x;"), ALL, grid=(2,))
    body = """__shared__ unsigned before;
x[1 + blockIdx.x * 32 + i] = i;
{}
__syncthreads();
if (i == 0) before = atomicAdd(arrived, 1u);
__syncthreads();
if (before == gridDim.x - 1 && i == 0) {{
float sum = 0;
for (int k = 0; k < 96; k++) sum += x[1 + k];
x[0] = sum;
}}"""
    arrays = np.zeros(97, np.float32), np.zeros(1, np.uint32)
    fenced, plain = (
        kernel(body.format(fence), "float* x, unsigned* arrived")
        for fence in ("__threadfence();", "")
    )
    x, _ = accepts(fenced, *arrays, grid=(3,))
    assert x[0] == 3 * 496
    race(plain, *arrays, grid=(3,))


def test_halves_and_bytes_beside_each_other() -> None:
    halves = np.zeros(64, np.float16)
    accepts(kernel("h[i] = i; h[32 + i] = h[i];", "half* h"), halves)
    accepts(kernel("c[i] = i; c[32 + i] = c[i] + 1;", "signed char* c"), np.zeros(64, np.int8))
    race(kernel("h[i] = i; *(half2*)(h + i / 2 * 2) = __float2half2_rn(i);", "half* h"), halves)


def test_atomics() -> None:
    body = "atomicAdd(x, 1.0f);\natomicMax((int*)x + 1, i);\natomicExch(x + 2, 4.0f);"
    x = launch(kernel(body), np.zeros(64, np.float32), block=(64,))[0]
    assert x[0] == 64 and x[1:2].view(np.int32) == 63 and x[2] == 4
    accepts(kernel("__shared__ int n;\nif (i == 0) n = 0;\n__syncthreads();\natomicAdd(&n, i);\n"
                   "__syncthreads();\nx[i] = n;"), ALL)  # fmt: skip
    race(kernel("atomicAdd(x, 1.0f);\nx[1] = 1;\nif (i == 1) x[2] = x[0];"), ALL)


# --- asynchronous copies

COPY = """__shared__ __align__(16) float s[128];
mlc::copy_async_16(s + 4 * i, x + 4 * i);
mlc::copy_async_commit();
{}
__syncthreads();
x[i] = s[4 * i + 1];"""


@pytest.mark.parametrize("arch", [80, 90])
def test_a_copy_that_is_not_waited_for(arch: int) -> None:
    x = np.arange(128, dtype=np.float32)
    good, bad = (kernel(COPY.format(f"mlc::copy_async_wait<{n}>();"), head=PTX) for n in (0, 1))
    with options(arch=arch):
        np.testing.assert_array_equal(launch(good, x)[0][:32], x[1::4])
        assert np.isnan(launch(bad, x)[0][:32]).all()
        message = refuses("without a wait for it", bad, x, races=True)
        assert "at k:4 fills" in message and "at k:8" in message
        with options(races=True):
            launch(good, x)
    with options(arch=75):  # it has none: the copy is done where it stands
        np.testing.assert_array_equal(launch(bad, x)[0][:32], x[1::4])


def test_groups_of_copies_come_in_order() -> None:
    body = """__shared__ __align__(16) float s[512];
for (int k = 0; k < 4; k++) {
mlc::copy_async_16(s + 128 * k + 4 * i, x + 128 * k + 4 * i, i != 3);
mlc::copy_async_commit();
}
mlc::copy_async_wait<2>();
__syncthreads();
x[i] = s[4 * i] + s[128 + 4 * i];
mlc::copy_async_wait<0>();
__syncthreads();
x[32 + i] = s[256 + 4 * i] + s[384 + 4 * i];"""
    x = np.arange(512, dtype=np.float32)
    sums = x.reshape(4, 32, 4)[..., 0] * (np.arange(32) != 3)
    (got,) = launch(kernel(body, head=PTX), x)
    np.testing.assert_array_equal(got[:64].reshape(2, 32), sums.reshape(2, 2, 32).sum(1))
    with options(races=True):
        launch(kernel(body, head=PTX), x)
    too_early = body.replace("wait<2>", "wait<3>")
    refuses("without a wait for it", kernel(too_early, head=PTX), x, races=True)


def test_a_copy_over_what_others_read() -> None:
    body = COPY.format("mlc::copy_async_wait<0>();") + "\n{}\nmlc::copy_async_16(s + 4 * i, x);"
    x = np.arange(128, dtype=np.float32)
    body = body.replace("x[i] = s[4 * i + 1]", "float v = s[124 - 4 * i];\n__ldg(&v)")
    body = body.replace("__ldg(&v)", "if (v < 0) x[0] = v")
    with options(races=True):
        launch(kernel(body.format("__syncthreads();"), head=PTX), x)
    what = "race on|without a wait for it"
    refuses(what, kernel(body.format(""), head=PTX), x, races=True)


# --- options


def test_options_are_restored_and_checked() -> None:
    with pytest.raises(RuntimeError), options(max_threads=8):
        launch(kernel("x[i] = 1;"), ALL, block=(9,))
    launch(kernel("x[i] = 1;"), ALL, block=(9,))
    with pytest.raises(InputError, match="ascending, descending, shuffled"):
        set_options(Options(order="random"))
    with pytest.raises(InputError, match="75, 80, 90"):
        set_options(Options(arch=70))


def test_another_order_shows_what_depends_on_it() -> None:
    seen = set()
    for order, seed in (("ascending", 0), ("descending", 0), ("shuffled", 1), ("shuffled", 2)):
        with options(order=order, seed=seed):
            results = {float(launch(kernel("x[0] = i;"), ALL)[0][0]) for _ in range(2)}
            assert len(results) == 1  # the same seed, the same order
            seen |= results
    assert seen >= {31.0, 0.0} and len(seen) >= 3


def test_unchecked_is_the_same_without_checks() -> None:
    body = (
        f"{DYNAMIC}((float*)memory)[i] = x[i];\n__syncthreads();\nx[i] = ((float*)memory)[31 - i];"
    )
    with options(checked=False):
        np.testing.assert_array_equal(launch(kernel(body), ALL, shared=128)[0][:32], ALL[31::-1])


def test_the_architecture_is_what_was_chosen() -> None:
    source = kernel("x[i] = __CUDA_ARCH__;")
    for arch in (75, 80, 90):
        with options(arch=arch):
            assert launch(source, ALL)[0][0] == 10 * arch
            assert tvm.device("cuda", 0).compute_version == f"{arch // 10}.{arch % 10}"


def test_launches_are_recorded() -> None:
    with record() as launches:
        launch(kernel(f"{DYNAMIC}x[i] = 1;"), ALL, grid=(2, 3), block=(4, 2, 2), shared=64)
    (one,) = launches
    assert (one.kernel, one.grid, one.block) == ("k", (2, 3, 1), (4, 2, 2))
    assert one.threads == 16 and one.shared_bytes == 64
    assert not one.replayed and not one.dependent


def test_an_extent_of_zero_is_launched_as_one() -> None:  # by TVM's runtime, too
    assert launch(kernel("x[i] = 5;"), ALL, grid=(0,), block=(1,))[0][0] == 5


def test_what_does_not_compile_is_shown_whole() -> None:
    summary = r"nothing_of_that_name(.|\n)*\nkernel k does not compile: k:3:.* error: 'nothing_of"
    with pytest.raises(RuntimeError, match=summary):
        launch(kernel("x[i] = nothing_of_that_name;"), ALL)


def test_machine_code_is_refused() -> None:
    load = tvm_ffi.get_global_func("ffi.Module.load_from_bytes.cuda")
    with pytest.raises(RuntimeError, match="'fatbin': the emulated device runs source"):
        load(save_module(CudaModule("fatbin", (), b"machine code")))
