"""What this machine's NVIDIA driver says of its first GPU, through the driver's own library."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from mlc_compile.errors import EnvironmentLacksError

# cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class GPU:
    """arch: compute capability times ten. driver: the CUDA version that the driver knows."""

    name: str
    arch: int
    driver: tuple[int, int]


def load_driver() -> ctypes.CDLL:
    """The driver's library, its symbols visible to what is loaded later.

    Raises:
        EnvironmentLacksError: there is none.
    """
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise EnvironmentLacksError(
            f"no NVIDIA driver on this machine: {name} cannot be loaded ({error})",
            hint="install the driver of an NVIDIA GPU, in a container start it with GPUs "
            "(docker run --gpus all), or compile for --target cpu",
        ) from error


def this_gpu() -> GPU:
    """The GPU that CUDA calls device 0 (CUDA_VISIBLE_DEVICES chooses it).

    Raises:
        EnvironmentLacksError: no driver, or no GPU that it sees.
    """
    driver = load_driver()

    def call(name: str, *arguments: object) -> None:
        status = getattr(driver, name)(*arguments)
        if status != 0:
            text = ctypes.c_char_p()
            driver.cuGetErrorName(status, ctypes.byref(text))
            what = text.value.decode() if text.value else f"error {status}"
            raise EnvironmentLacksError(
                f"no usable NVIDIA GPU: {name} says {what}",
                hint="look at `nvidia-smi` and CUDA_VISIBLE_DEVICES",
            )

    def number(name: str, *arguments: object) -> int:
        value = ctypes.c_int()
        call(name, ctypes.byref(value), *arguments)
        return value.value

    call("cuInit", 0)
    if number("cuDeviceGetCount") == 0:
        raise EnvironmentLacksError(
            "the NVIDIA driver sees no GPU", hint="look at `nvidia-smi` and CUDA_VISIBLE_DEVICES"
        )
    device = ctypes.c_int(number("cuDeviceGet", 0))
    text = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", text, 256, device)
    major = number("cuDeviceGetAttribute", _MAJOR, device)
    minor = number("cuDeviceGetAttribute", _MINOR, device)
    version = number("cuDriverGetVersion")
    return GPU(text.value.decode(), 10 * major + minor, (version // 1000, version % 1000 // 10))
