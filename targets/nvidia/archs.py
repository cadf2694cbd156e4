"""The architectures a library is compiled for: `--target cuda:sm_80,sm_90`, parsed and ordered.

An architecture is a compute capability times ten: 75 is sm_75. Which cards have which: NVIDIA's
table "CUDA GPU Compute Capability".
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mlc_compile.errors import InputError

DEFAULT = (75, 80, 90)
"""Turing, Ampere, Hopper; sm_86 and sm_89 run sm_80's code, newer cards compile sm_90's PTX."""

BFLOAT16 = 80
"""The first with bfloat16 arithmetic."""

AUTO = "auto"
"""The variant that asks for this machine's GPU."""

CUDA12_ONLY = (60, 61, 62, 70, 72)
"""What the release notes of CUDA 13.0 dropped from nvcc."""
CUDA13 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)
"""`nvcc --list-gpu-arch` of 13.0, above sm_72."""
KNOWN = CUDA12_ONLY + CUDA13

_SPELLING = re.compile(r"(?:sm_?)?([0-9]{2,3})(a?)")


def sm(arch: int) -> str:
    """Its name in targets and messages: sm_90."""
    return f"sm_{arch}"


def names(archs: Sequence[int]) -> str:
    return ", ".join(map(sm, archs))


def machine_code(arch: int) -> str:
    """What nvcc is told to generate machine code for.

    sm_90a has instructions (wgmma, setmaxnreg) that sm_90 lacks; all cards of compute capability
    9.0 have them.
    """
    return "90a" if arch == 90 else str(arch)


def parse_archs(text: str) -> tuple[int, ...]:
    """The architectures of a comma-separated list, ascending.

    Raises:
        InputError: one is unknown, or named twice.
    """
    found: list[int] = []
    for word in text.split(","):
        match = _SPELLING.fullmatch(word.strip())
        arch = int(match[1]) if match else 0
        if arch not in KNOWN or (match and match[2] and arch != 90):
            raise InputError(
                f"--target cuda:{text}: {word.strip() or 'an empty name'!s} is no architecture "
                "known here",
                hint=f"known: {names(KNOWN)}; or auto, for this machine's GPU",
            )
        if arch in found:
            raise InputError(
                f"--target cuda:{text}: {sm(arch)} is named twice", hint="name each once"
            )
        found.append(arch)
    return tuple(sorted(found))


def closest(device: int) -> int:
    """The newest architecture known here whose code a device runs: its own, or PTX for it.

    Raises:
        InputError: the device is older than all of them.
    """
    older = [arch for arch in KNOWN if arch <= device]
    if not older:
        raise InputError(
            f"--target cuda:auto: {sm(device)} is older than what can be compiled for",
            hint=f"the oldest are {names(KNOWN[:3])}",
        )
    return older[-1]


def cuda_dtypes(variant: str) -> tuple[str, ...]:
    """What the architectures of `--target cuda:VARIANT` all compute in; of auto, any may.

    Raises:
        InputError: an architecture is unknown, or named twice.
    """
    every = ("float32", "float16", "bfloat16")
    return every if variant == AUTO or parse_archs(variant)[0] >= BFLOAT16 else every[:2]


def code_runs_on(arch: int, device: int, *, ptx: bool = False) -> bool:
    """Whether a device runs what was compiled for `arch`.

    Machine code runs on the same major version from its minor version on (sm_90 is compiled as
    sm_90a, for which there is one minor version); PTX is compiled by the driver for any newer
    device. CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility".
    """
    if ptx:
        return device >= arch
    return device // 10 == arch // 10 and device >= arch
