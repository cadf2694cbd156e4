"""The reader of fat binaries on good, damaged and hostile bytes; names of architectures."""

from __future__ import annotations

import random
import struct

import pytest
from nvidia_library import cubin, fatbin

from mlc_compile.errors import CheckFailedError, InputError
from mlc_compile.targets.nvidia.archs import closest, code_runs_on, cuda_dtypes, parse_archs
from mlc_compile.targets.nvidia.compile import check_fatbin, generate
from mlc_compile.targets.nvidia.fatbin import Code, FatbinError, find_fatbins, read_fatbin

GOOD = fatbin((2, 75, cubin()), (2, 90, cubin()), (1, 90, b"//PTX"))
CODES = [Code("elf", 75, 24), Code("elf", 90, 24), Code("ptx", 90, 8)]


def test_entries_are_read_in_order_and_found_among_other_bytes() -> None:
    assert read_fatbin(GOOD) == (CODES, len(GOOD))
    other = fatbin((2, 80, cubin()), (1, 80, b"//PTX"))
    library = b"\x7fELF" + GOOD + b"text \x50\xed\x55\xba " + other + b"\0"
    assert find_fatbins(library) == [CODES, [Code("elf", 80, 24), Code("ptx", 80, 8)]]


def test_every_cut_is_noticed() -> None:
    for length in range(len(GOOD)):
        with pytest.raises(FatbinError):
            read_fatbin(GOOD[:length])
        assert find_fatbins(GOOD[:length]) == []


@pytest.mark.parametrize(
    ("at", "form", "value", "says"),
    [
        (0, "<I", 1, "magic"),
        (4, "<H", 2, "version 2"),
        (6, "<H", 4, "header of 4"),
        (8, "<Q", 1 << 63, "cut off"),
        (16, "<H", 9, "unknown kind 9"),
        (20, "<I", 8, "contradicts"),
        (20, "<I", 1 << 31, "contradicts"),
        (24, "<Q", 0, "contradicts"),
        (24, "<Q", (1 << 64) - 1, "contradicts"),
        (80 + 18, "<H", 62, "another processor"),
    ],
)
def test_contradictions_are_named(at: int, form: str, value: int, says: str) -> None:
    data = bytearray(GOOD)
    struct.pack_into(form, data, at, value)
    with pytest.raises(FatbinError, match=says):
        read_fatbin(bytes(data))


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_ends_in_an_answer_or_its_own_error(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(200):
        data = bytearray(GOOD * 2)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        for codes in find_fatbins(bytes(data)):
            assert sum(code.size for code in codes) <= len(data)


def test_what_nvcc_wrote_is_compared_with_what_was_asked_for() -> None:
    check_fatbin(GOOD, (75, 90))
    for data, archs in (
        (GOOD, (75, 80, 90)),
        (GOOD, (90,)),
        (fatbin((2, 75, cubin()), (2, 90, cubin())), (75, 90)),
        (fatbin((2, 75, cubin()), (2, 90, cubin()), (1, 75, b"//PTX")), (75, 90)),
        (GOOD + b"tail", (75, 90)),
        (GOOD[:-1], (75, 90)),
        (b"", (75,)),
    ):
        with pytest.raises(CheckFailedError):
            check_fatbin(data, archs)


def test_hopper_is_compiled_with_its_own_instructions_and_portable_ptx() -> None:
    assert generate((75, 90)) == [
        *("-gencode", "arch=compute_75,code=sm_75"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("sm_90", (90,)),
        ("sm_90,sm_75", (75, 90)),
        ("90a", (90,)),
        ("sm_80, sm_120", (80, 120)),
        ("sm61", (61,)),
    ],
)
def test_architectures_are_sorted(text: str, archs: tuple[int, ...]) -> None:
    assert parse_archs(text) == archs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sm_91", "sm_91 is no architecture"),
        ("sm_80a", "sm_80a is no architecture"),
        ("sm_75,", "an empty name"),
        ("hopper", "hopper is no architecture"),
        ("sm_80,80", "sm_80 is named twice"),
        ("sm_90,sm_90a", "sm_90 is named twice"),
        ("sm_٩٠", "is no architecture"),
    ],
)
def test_wrong_architectures_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        parse_archs(text)


@pytest.mark.parametrize(
    ("arch", "device", "machine", "ptx"),
    [
        (80, 80, True, True),
        (80, 89, True, True),
        (86, 80, False, False),
        (80, 90, False, True),
        (90, 80, False, False),
        (75, 120, False, True),
        (100, 103, True, True),
    ],
)
def test_which_code_runs_where(arch: int, device: int, machine: bool, ptx: bool) -> None:
    assert code_runs_on(arch, device) is machine
    assert code_runs_on(arch, device, ptx=True) is ptx


def test_auto_takes_what_the_device_runs() -> None:
    assert [closest(device) for device in (75, 89, 101, 999)] == [75, 89, 100, 121]
    with pytest.raises(InputError, match="sm_52 is older"):
        closest(52)


def test_bfloat16_is_for_ampere_and_later() -> None:
    assert "bfloat16" in cuda_dtypes("sm_80,sm_90") and "bfloat16" in cuda_dtypes("auto")
    assert "bfloat16" not in cuda_dtypes("sm_75,sm_90")
