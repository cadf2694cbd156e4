"""Our Mach-O and archive readers: as lief reads, and refusing what is damaged."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import lief
import pytest
from apple_objects import export

from mlc_compile.errors import InputError
from mlc_compile.targets.apple import macho
from mlc_compile.targets.apple.platforms import IPHONE, MACOS
from mlc_compile.targets.apple.tools import read_tar


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Objects, a dylib and an archive by name."""
    folder = tmp_path_factory.mktemp("macho")
    found = dict(read_tar(export(IPHONE, folder / "x.tar")))
    found["x.dylib"] = export(MACOS, folder / "x.dylib").read_bytes()
    found["x.a"] = export(IPHONE, folder / "x.a").read_bytes()
    return found


@pytest.mark.parametrize("name", ["toy_model_lib0.o", "toy_model_devc.o", "x.dylib"])
def test_reads_what_lief_reads(files: dict[str, bytes], name: str) -> None:
    found = macho.parse(files[name], name)
    fat = lief.MachO.parse(list(files[name]))
    assert fat is not None
    other = fat.at(0)
    assert found.platform == int(other.build_version.platform)
    assert found.minimum == tuple(list(other.build_version.minos)[:2])
    external = [s for s in other.symbols if int(s.raw_type) & 1]
    assert {s.name for s in found.symbols} == {str(s.name) for s in external}
    assert found.undefined == {str(s.name) for s in external if not int(s.raw_type) & 0x0E}
    assert {s.name for s in found.symbols if s.weak} == {
        str(s.name) for s in external if int(s.description) & 0x80 and int(s.raw_type) & 0x0E
    }
    assert found.sections == {(str(s.segment_name), str(s.name)): s.size for s in other.sections}
    libraries = [str(library.name) for library in other.libraries]
    assert [*filter(None, [found.install_name]), *found.libraries] == libraries


def test_the_index_leads_to_definitions(files: dict[str, bytes]) -> None:
    archive = macho.parse_archive(files["x.a"], "x.a")
    assert archive.index
    by_offset = {offset: macho.parse(data, name) for offset, name, data in archive.members}
    for symbol, offset in archive.index.items():
        assert symbol in by_offset[offset].defined
    wanted = {name for file in by_offset.values() for name in file.defined}
    assert set(archive.index) == wanted


@pytest.mark.parametrize("name", ["toy_model_lib0.o", "x.dylib", "x.a"])
def test_damage_is_an_input_error_or_nothing(files: dict[str, bytes], name: str) -> None:
    """Cut anywhere, or with random bytes in its headers: refused or read, never a crash."""
    read = macho.parse_archive if name.endswith(".a") else macho.parse
    data = files[name]
    rng = random.Random(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(data[: rng.randrange(len(data))] if rng.random() < 0.5 else data)
        for _ in range(rng.randrange(4)):
            if broken:
                broken[rng.randrange(min(len(broken), 2000))] = rng.randrange(256)
        try:
            read(bytes(broken), name)
        except InputError as error:
            refused += 1
            assert name in str(error)
    assert refused > 100


def test_other_formats_are_named(files: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a 64-bit Mach-O"):
        macho.parse(b"\x7fELF" + bytes(100), "x.o")
    with pytest.raises(InputError, match="not a static archive"):
        macho.parse_archive(b"\x7fELF", "x.a")
    (tmp_path / "toy_model_lib0.o").write_bytes(files["toy_model_lib0.o"])
    command = [sys.executable, "-m", "ziglang", "ar", "--format=gnu", "rcs", "gnu.a"]
    subprocess.run([*command, "toy_model_lib0.o"], cwd=tmp_path, check=True)
    with pytest.raises(InputError, match="GNU's format, which Apple's linker refuses"):
        macho.parse_archive((tmp_path / "gnu.a").read_bytes(), "gnu.a")
