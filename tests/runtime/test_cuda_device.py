"""What is said where a library for NVIDIA GPUs cannot run; the driver here is made up."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "targets"))
from nvidia_library import cubin, fatbin

from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.runtime import cuda_device
from mlc_compile.targets.nvidia import driver
from mlc_compile.targets.nvidia.driver import GPU, load_driver, this_gpu


class Driver:
    """The functions of libcuda that are called."""

    def __init__(
        self, status: int = 0, count: int = 1, version: int = 13000, major: int = 8
    ) -> None:
        self.status = status
        self.major = major
        self.values = {"cuDeviceGetCount": count, "cuDriverGetVersion": version, "cuDeviceGet": 7}

    def __getattr__(self, name: str) -> Any:
        if name not in self.values:
            raise AttributeError(name)

        def call(result: Any, *arguments: Any) -> int:
            result._obj.value = self.values[name]
            return self.status

        return call

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetName(self, text: Any, size: int, device: ctypes.c_int) -> int:
        text.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, result: Any, attribute: int, device: ctypes.c_int) -> int:
        result._obj.value = {75: self.major, 76: 6}[attribute]
        return 0

    def cuGetErrorName(self, status: int, text: Any) -> int:
        text._obj.value = b"CUDA_ERROR_NO_DEVICE" if status == 100 else None
        return 0


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    cuda_device.install.cache_clear()
    yield
    cuda_device.install.cache_clear()


def use(monkeypatch: pytest.MonkeyPatch, made_up: Driver) -> None:
    monkeypatch.setattr(driver, "load_driver", lambda: made_up)


def test_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Driver(version=12090))
    assert this_gpu() == GPU("GPU 7", 86, (12, 9))


def test_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: int = 0) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(EnvironmentLacksError, match=r"no NVIDIA driver.*docker run --gpus"):
        load_driver()
    with pytest.raises(EnvironmentLacksError, match="no NVIDIA driver"):
        cuda_device.install()


@pytest.mark.parametrize(
    ("made_up", "says"),
    [
        (Driver(status=100), "cuInit says CUDA_ERROR_NO_DEVICE.*nvidia-smi"),
        (Driver(status=5), "cuInit says error 5"),
        (Driver(count=0), "sees no GPU.*CUDA_VISIBLE_DEVICES"),
        (Driver(major=6), r"GPU 7 is sm_66, and CUDA 13.* begins with sm_75.*CUDA 12"),
        (Driver(version=12080), r"knows CUDA 12\.8, and TVM's runtime is of CUDA 13\.0.*580"),
    ],
)
def test_a_driver_that_does_not_do(
    made_up: Driver, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, made_up)
    with pytest.raises(EnvironmentLacksError, match=says) as raised:
        cuda_device.install()
    assert raised.value.exit_code == 3


def test_a_machine_without_the_runtime_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(monkeypatch, Driver())
    monkeypatch.setattr(cuda_device, "package_folder", lambda: tmp_path)
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cuda_device, "CUDART", "libcudart-of-nobody.so.13")
    with pytest.raises(EnvironmentLacksError, match=r"pip install 'nvidia-cuda-runtime==13\.0"):
        cuda_device.install()


def test_a_tvm_without_its_side_car(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tvm

    use(monkeypatch, Driver())
    monkeypatch.setattr(tvm, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(EnvironmentLacksError, match=r"no CUDA runtime .*wheels for Linux"):
        cuda_device.install()


def test_the_library_must_hold_code_for_the_gpu(tmp_path: Path) -> None:
    path = tmp_path / "model.so"

    def check(arch: int, *fatbins: bytes) -> None:
        path.write_bytes(b"\x7fELF" + b"".join(fatbins))
        cuda_device.check_code(path, GPU("NVIDIA T4", arch, (13, 0)))

    hopper = fatbin((2, 90, cubin()), (1, 90, b"//PTX"))
    both = fatbin((2, 75, cubin()), (2, 90, cubin()), (1, 90, b"//PTX"))
    for arch in (75, 90, 100, 120):
        check(arch, both)
    check(90, hopper, hopper)
    with pytest.raises(
        EnvironmentLacksError,
        match=r"machine code for sm_90 and PTX for sm_90 and later, which NVIDIA T4 \(sm_75\) "
        r"does not run; compile it with --target cuda:sm_75",
    ):
        check(75, hopper)
    with pytest.raises(EnvironmentLacksError, match="which NVIDIA T4"):
        check(75, both, hopper)  # every module of a library must run
    check(86, fatbin((2, 80, cubin()), (1, 90, b"//PTX")))
    with pytest.raises(InputError, match="holds no machine code for NVIDIA GPUs"):
        check(90)
