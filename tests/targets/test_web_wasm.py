"""The wasm reader: hand-made modules, and bytes that are none."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from web_module import module, section, string, u32

from mlc_compile.errors import InputError
from mlc_compile.targets.web import wasm


def test_a_module_with_everything_in_it() -> None:
    content = module(
        section(0, string("name") + b"anything"),
        section(1, u32(1) + b"\x60\x00\x00"),
        section(
            2,
            u32(4)
            + string("env") + string("f") + b"\x00" + u32(0)
            + string("env") + string("t") + b"\x01\x70\x01" + u32(1) + u32(300)
            + string("env") + string("m") + b"\x02\x00" + u32(17)
            + string("env") + string("g") + b"\x03\x7f\x00",
        ),
        section(5, u32(1) + b"\x01" + u32(2) + u32(65536)),
        section(7, u32(2) + string("memory") + b"\x02" + u32(1) + string("é") + b"\x00" + u32(0)),
        section(
            11,
            u32(3)
            + b"\x00\x41\x80\x08\x0b" + string("active")
            + b"\x01" + string("passive")
            + b"\x02" + u32(1) + b"\x41\x7f\x0b" + string("second"),
        ),
    )  # fmt: skip
    read = wasm.parse(content)
    assert read.imports == (
        wasm.Import("env", "f", "function"),
        wasm.Import("env", "t", "table"),
        wasm.Import("env", "m", "memory"),
        wasm.Import("env", "g", "global"),
    )
    assert read.memories == (wasm.Memory(17, None, True), wasm.Memory(2, 65536, False))
    assert read.exports == (wasm.Export("memory", "memory", 1), wasm.Export("é", "function", 0))
    assert read.data == (b"active", b"passive", b"second")
    assert [s.name for s in read.sections] == [
        *("custom", "type", "import", "memory", "export", "data"),
    ]
    custom = read.sections[0]
    assert custom.title == "name"
    assert content[custom.start : custom.start + custom.size] == b"anything"


def test_an_empty_module_is_well_formed() -> None:
    assert wasm.parse(module()) == wasm.Module()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "ends in the magic number"),
        (b"\x7fELF\x02\x01\x01\x00", "not a WebAssembly module"),
        (b"\0asm\x02\0\0\0", "version 2"),
        (module(b"\x63\x00"), "unknown section 99"),
        (module(section(1, b"")[:1]), "ends in a section's size"),
        (module(b"\x01" + u32(5) + b"\x00"), "ends in section 1"),
        (module(b"\x01\xff\xff\xff\xff\xff\x00"), "longer than 32 bits"),
        (module(b"\x01\xff\xff\xff\xff\x7f"), "does not fit in 32 bits"),
        (module(section(7, u32(0)), section(2, u32(0))), "import section out of order"),
        (module(section(2, u32(0)), section(2, u32(0))), "import section out of order"),
        (module(section(2, u32(0) + b"x")), "1 bytes too many in the import section"),
        (module(section(2, u32(0xFFFFFFFF))), "4294967295 imports in 0 bytes"),
        (module(section(2, u32(1) + string("m") + u32(100) + b"f")), "ends in an import's name"),
        (module(section(2, u32(1) + u32(1) + b"\xff\x00\x00\x00")), "is not UTF-8"),
        (module(section(2, u32(1) + string("m") + string("f") + b"\x09")), "unknown kind 9"),
        (module(section(5, u32(1) + b"\x01" + u32(9) + u32(8))), "maximum of 8 below"),
        (module(section(5, u32(1) + b"\x08")), "unknown limits 8"),
        (
            module(section(7, u32(2) + (string("a") + b"\x00" + u32(0)) * 2)),
            "two exports of one name",
        ),
        (module(section(11, u32(1) + b"\x03")), "unknown data segment 3"),
        (module(section(11, u32(1) + b"\x00\x6a\x0b\x00")), "instruction 0x6a"),
        (module(section(11, u32(1) + b"\x00\x41\x00\x41\x0b\x00")), "more than one instruction"),
        (module(section(11, u32(1) + b"\x01" + u32(1 << 31))), "ends in a data segment"),
    ],
)  # fmt: skip
def test_malformed_modules_are_refused(content: bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        wasm.parse(content, "model.wasm")


def test_cut_and_flipped_bytes_never_escape_as_other_errors() -> None:
    good = module(
        section(2, u32(1) + string("env") + string("f") + b"\x00" + u32(0)),
        section(5, u32(1) + b"\x00" + u32(2)),
        section(7, u32(1) + string("memory") + b"\x02" + u32(0)),
        section(11, u32(1) + b"\x00\x41\x80\x08\x0b" + string("some data")),
    )
    wasm.parse(good)
    boundaries = 0
    for end in range(len(good)):
        try:
            wasm.parse(good[:end])
            boundaries += 1
        except InputError:
            pass
    assert boundaries == 4  # the header alone, and behind each section but the last
    noise = random.Random(7)
    for _ in range(3000):
        damaged = bytearray(good)
        for _ in range(noise.randint(1, 4)):
            damaged[noise.randrange(8, len(good))] = noise.randrange(256)
        with contextlib.suppress(InputError):
            wasm.parse(bytes(damaged))


def test_a_missing_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.wasm"):
        wasm.read(tmp_path / "none.wasm")
