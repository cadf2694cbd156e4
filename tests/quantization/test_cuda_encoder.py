"""The encoder of `--device cuda` on the emulated device: numpy's bytes, or the CPU in its place."""

from __future__ import annotations

import ctypes
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError, InputError
from mlc_compile.models import load_model
from mlc_compile.quantization import cuda_encoder
from mlc_compile.quantization.compiled import Encoder, encoder
from mlc_compile.quantization.cuda_encoder import CudaEncoder
from mlc_compile.quantization.scheme import SCHEMES, QuantScheme, get_scheme
from mlc_compile.runtime import cuda_device, cuda_emulator
from mlc_compile.runtime.cuda_emulator import native
from mlc_compile.targets.nvidia.compile import FLAGS, HEADERS
from mlc_compile.targets.nvidia.toolchain import find_nvcc
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.convert import convert_weight

Array = npt.NDArray[Any]
DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32]
SYMMETRIC = [s for s in SCHEMES.values() if s.codes == "symmetric" and not s.is_plain]
QUICK = ("q3f16_0", "q4f16_1", "q4bf16_1", "q8f32_1", "q8f16_pc")
SLOW = Encoder()
INSTALL = cuda_device.install  # while it is not the emulated device's
TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_model"


@pytest.fixture(scope="module")
def gpu() -> Iterator[CudaEncoder]:
    with pytest.MonkeyPatch.context() as patch:
        # nvcc leaves __fmul_rn apart from what follows; the host's compiler must as well.
        patch.setattr(native, "_KERNEL", (*native._KERNEL, "-ffp-contract=off"))
        with cuda_emulator.emulated(arch=80):
            found = encoder("cuda")
            assert isinstance(found, CudaEncoder)
            yield found


def weights(rng: np.random.Generator, n: int, k: int, dtype: Any) -> Array:
    """Rows of many magnitudes, with zeros, ties, denormals and groups whose scale vanishes."""
    w = rng.standard_normal((n, k)).astype(np.float32)
    w *= np.exp2(rng.integers(-12, 3, (n, 1))).astype(np.float32)
    w[0, : k // 2] = 0
    w[1 % n] = np.arange(k, dtype=np.float32) % 15 - 7
    w[2 % n, ::3] = -0.0
    w[3 % n] *= 2.0**-22
    w[4 % n] = rng.integers(0, 3, k) * 2.0**-24
    w[5 % n, ::2] = -1 - 2.0**-20  # as large as 1 once narrowed
    w[5 % n, 1::2] = 1
    return w.astype(dtype)


def assert_same(found: Any, expected: Any) -> None:
    """Two answers of `measured`."""
    for one, other in zip((*found[0], *found[1:]), (*expected[0], *expected[1:]), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.tobytes() == other.tobytes()


def launches(gpu: CudaEncoder, *args: Any, **kwargs: Any) -> tuple[Any, int]:
    """What `measured` returns, and how often the device ran for it."""
    with cuda_emulator.record() as seen:
        found = gpu.measured(*args, **kwargs)
    return found, len(seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(s, id=s.name, marks=() if s.name in QUICK else pytest.mark.slow)
        for s in SYMMETRIC
    ],
)
def test_same_bytes_as_numpy(scheme: QuantScheme, dtype: Any, gpu: CudaEncoder) -> None:
    rng = np.random.default_rng(5)
    for n, k in [(9, 320), (7, 129), (1, 1)]:
        w = weights(rng, n, k, dtype)
        importance = rng.random(k).astype(np.float32)
        importance[::5] = 0
        for scales, counted in [
            ("absmax", None),
            ("signed", None),
            ("auto", None),
            ("mse", None),
            ("mse", importance),
        ]:
            for layout in ("KN", "NK"):
                options: Any = {"scales": scales, "importance": counted, "layout": layout}
                if scales == "mse" and not scheme.group_size:
                    continue
                found, ran = launches(gpu, w, scheme, **options)
                assert ran == 1
                assert_same(found, SLOW.measured(w, scheme, **options))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 90])
def test_many_blocks_and_every_float16(arch: int, gpu: CudaEncoder) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.resize(every[np.isfinite(every)], (64, 1024))
    with cuda_emulator.options(arch=arch, races=True):
        for name in ("q4f16_1", "q4bf16_1", "q3f16_1"):
            scheme = get_scheme(name)
            for scales in ("absmax", "signed", "mse"):
                found, ran = launches(gpu, finite, scheme, scales=scales)
                assert ran == 1
                with np.errstate(over="ignore"):
                    assert_same(found, SLOW.measured(finite, scheme, scales=scales))


def test_buffers_of_threads_are_their_own(gpu: CudaEncoder) -> None:
    scheme = get_scheme("q4f16_1")
    ws = [weights(np.random.default_rng(i), 9 + 8 * i, 64, np.float16) for i in range(3)]
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        for w in ws:  # of growing size, then the largest again
            gpu.measured(w, scheme)
        found[i] = gpu.measured(ws[i], scheme)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, w in enumerate(ws):
        assert_same(found[i], SLOW.measured(w, scheme))
    assert not gpu._failed


@pytest.mark.parametrize("value", [np.inf, np.nan, 65520.0])
def test_refuses_what_the_reference_refuses(value: float, gpu: CudaEncoder) -> None:
    w = np.ones((5, 100), np.float32)
    w[4, 99] = value
    messages = []
    for one in (gpu, SLOW):
        with pytest.raises(InputError, match=r"tensor 'x\.weight' holds a value") as raised:
            one(w, get_scheme("q4f16_1"), name="x.weight")
        messages.append(raised.value.message)
    assert messages[0] == messages[1]
    with pytest.raises(ValueError, match="importance must be"):
        gpu(w, get_scheme("q4f32_1"), scales="mse", importance=np.full(100, -1, np.float32))


def test_the_cpu_does_the_rest(gpu: CudaEncoder) -> None:
    w = weights(np.random.default_rng(1), 8, 256, np.float16)
    wide = w.astype(np.float64)
    for given, name, scales in [
        (w, "q4f16_awq", "absmax"),
        (w, "e4m3f16_1", "absmax"),
        (wide, "q4f16_1", "absmax"),
        (w, "q8f16_pc", "mse"),
    ]:
        options: Any = {"scales": scales}
        found, ran = launches(gpu, given, get_scheme(name), **options)
        assert ran == 0
        assert_same(found, SLOW.measured(given, get_scheme(name), **options))


def test_a_gpu_that_fails_is_left_alone(gpu: CudaEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails(*_: Any) -> None:
        calls.append(1)
        raise RuntimeError("CUDA: out of memory")

    monkeypatch.setattr(gpu, "_run", fails)
    monkeypatch.setattr(gpu, "_failed", False)
    w = weights(np.random.default_rng(1), 8, 64, np.float32)
    for _ in range(2):
        found = gpu.measured(w, get_scheme("q4f32_1"))
        assert_same(found, SLOW.measured(w, get_scheme("q4f32_1")))
    assert len(calls) == 1


def test_a_gpu_is_tried_first(monkeypatch: pytest.MonkeyPatch, gpu: CudaEncoder) -> None:
    monkeypatch.setattr(cuda_encoder, "build_library", lambda path: None)

    def fails(*_: Any) -> None:
        raise RuntimeError("Traceback\nCUDA: no kernel image is available")

    monkeypatch.setattr(cuda_encoder, "_load", lambda path: fails)
    with pytest.raises(EnvironmentLacksError, match=r"cuda: .* no kernel image.*; .*--device cpu"):
        CudaEncoder()
    monkeypatch.setattr(cuda_encoder, "_load", lambda path: lambda *_: None)
    with pytest.raises(CheckFailedError, match="otherwise than the CPU"):
        CudaEncoder()


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: int = 0) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    INSTALL.cache_clear()
    monkeypatch.setattr(cuda_device, "install", INSTALL)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(EnvironmentLacksError, match="--device cuda: no NVIDIA driver") as raised:
        encoder("cuda")
    assert "take --device cpu, which gives the same files" in str(raised.value)
    assert "--target" not in str(raised.value)


def test_a_conversion_is_the_same(gpu: CudaEncoder, tmp_path: Path) -> None:
    files = []
    for device in ("cuda", "numpy"):
        source = open_checkpoint(TINY)
        out = tmp_path / device
        with cuda_emulator.record() as seen:
            convert_weight(
                source,
                load_model(source.config, where="config.json"),
                get_scheme("q4f16_1"),
                out,
                jobs=1,
                device=device,
            )
        assert bool(seen) == (device == "cuda")
        files.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert files[0] == files[1]


@pytest.mark.slow
def test_nvcc_fuses_and_approximates_nothing(tmp_path: Path) -> None:
    numbers = [f"int a{i}" for i in range(11)]
    names = ", ".join(f"a{i}" for i in range(11))
    (tmp_path / "k.cu").write_text(
        '#include "encode.cuh"\n'
        f'extern "C" __global__ void k(unsigned char* m, {", ".join(numbers)}) '
        f"{{ mlc::encode(m, {names}); }}\n"
    )
    command = [*find_nvcc().command, "--ptx", *FLAGS, "-arch=compute_90", "-I", str(HEADERS)]
    subprocess.run([*command, "-o", "k.ptx", "k.cu"], cwd=tmp_path, check=True)
    text = (tmp_path / "k.ptx").read_text()
    found = set(re.findall(r"\b(?:div|mul|fma|add|sub|rcp)\.[\w.]*f32", text))
    # add.f32: of a level and M, whole numbers, which nothing is multiplied before.
    assert {"div.rn.f32", "mul.rn.f32", "add.rn.f32"} <= found
    assert found <= {"div.rn.f32", "mul.rn.f32", "add.rn.f32", "add.f32"}
