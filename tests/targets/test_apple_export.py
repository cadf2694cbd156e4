"""Libraries for Apple's platforms, read by lief, linked by LLVM's Mach-O linker, found by name."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path

import lief
import numpy as np
import pytest
from apple_objects import export, lld

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError
from mlc_compile.targets.apple.check import (
    RUNTIME_SYMBOLS,
    check_archive,
    check_objects,
    check_system_library,
)
from mlc_compile.targets.apple.platforms import IPHONE, IPHONE_SIMULATOR, MACOS, PLATFORMS
from mlc_compile.targets.apple.tools import read_tar, write_archive

# Apple's numbers, by lief's names: written down here a second time on purpose.
EXPECTED = {
    "iphone": ("IOS", [16, 0]),
    "iphone-simulator": ("IOS_SIMULATOR", [16, 0]),
    "macabi": ("MAC_CATALYST", [16, 0]),
    "macos": ("MACOS", [13, 0]),
}
UNDEFINED = 0x0E  # N_TYPE; its value is 0 for N_UNDF


def parsed(data: bytes) -> lief.MachO.Binary:
    fat = lief.MachO.parse(list(data))
    assert fat is not None
    return fat.at(0)


def external(binary: lief.MachO.Binary, *, defined: bool) -> set[str]:
    return {
        str(s.name)
        for s in binary.symbols
        if int(s.raw_type) & 1 and bool(int(s.raw_type) & UNDEFINED) == defined
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("apple")


@pytest.mark.parametrize("name", PLATFORMS)
def test_objects_say_their_platform_and_carry_the_prefix(name: str, folder: Path) -> None:
    path = export(PLATFORMS[name], folder / f"{name}.tar")
    members = read_tar(path)
    assert [member for member, _ in members] == ["toy_model_devc.o", "toy_model_lib0.o"]
    defined: set[str] = set()
    for _, data in members:
        binary = parsed(data)
        assert binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
        assert binary.header.file_type == lief.MachO.Header.FILE_TYPE.OBJECT
        platform, minos = EXPECTED[name]
        assert binary.build_version.platform.name == platform
        assert list(binary.build_version.minos)[:2] == minos
        assert any(s.name == "__mod_init_func" and s.size for s in binary.sections)
        assert external(binary, defined=False) <= RUNTIME_SYMBOLS
        defined |= external(binary, defined=True)
    assert {
        "_toy_model___tvm_ffi__library_bin",
        "_toy_model___tvm_ffi__library_ctx",
    } <= defined
    assert any(symbol.startswith("___tvm_ffi_toy_model_") for symbol in defined)
    strays = {s for s in defined if "toy_model_" not in s}
    assert strays <= {"___extendhfsf2", "___truncsfhf2"}  # weak
    with tarfile.open(path) as archive:
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in archive.getmembers()} == {(0, 0, 0, "")}


def test_kernels_are_metal_source(folder: Path) -> None:
    members = dict(read_tar(export(IPHONE, folder / "source.tar")))
    assert b"#include <metal_stdlib>" in members["toy_model_devc.o"]
    assert b"bfloat" not in members["toy_model_devc.o"]


def test_archive_has_members_and_an_index(folder: Path) -> None:
    (folder / "a").mkdir()
    path = export(IPHONE, folder / "a" / "libmodel.a")
    # Read here without our reader: header lines, then BSD long names.
    data = path.read_bytes()
    assert data.startswith(b"!<arch>\n#1/")
    assert data[68:].startswith(b"__.SYMDEF")
    listing = subprocess.run(
        [sys.executable, "-m", "ziglang", "ar", "t", str(path)], capture_output=True, text=True
    )
    assert listing.stdout.split() == ["toy_model_devc.o", "toy_model_lib0.o"]
    (folder / "b").mkdir()
    again = export(IPHONE, folder / "b" / "other_name.a")
    assert again.read_bytes() == data


def test_dylib_for_macos(folder: Path) -> None:
    paths = []
    for name in ("one", "two"):
        (folder / name).mkdir()
        paths.append(export(MACOS, folder / name / "model.dylib"))
    binary = parsed(paths[0].read_bytes())
    assert binary.header.file_type == lief.MachO.Header.FILE_TYPE.DYLIB
    assert binary.build_version.platform.name == "MACOS"
    assert list(binary.build_version.minos)[:2] == [13, 0]
    assert [str(library.name) for library in binary.libraries] == [
        "@rpath/model.dylib",
        "/usr/lib/libSystem.B.dylib",
    ]
    exported = {str(s.name) for s in binary.exported_symbols}
    assert {"___tvm_ffi__library_bin", "___tvm_ffi__library_ctx"} <= exported
    assert binary.has_code_signature  # an unsigned dylib is killed on Apple silicon
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_two_models_link_into_one_image(folder: Path) -> None:
    one = export(IPHONE, folder / "one.a", "first_model_")
    two = export(IPHONE, folder / "two.a", "second_model_")
    both = folder / "both.a"
    members = [*read_tar(export(IPHONE, folder / "one.tar", "first_model_"))]
    members += read_tar(export(IPHONE, folder / "two.tar", "second_model_"))
    write_archive(members, both)
    for number, archives in enumerate(([one, two], [both])):
        image = folder / f"{number}.dylib"
        lld("ios", archives, image)
        binary = parsed(image.read_bytes())
        found = external(binary, defined=True)
        for prefix in ("first_model_", "second_model_"):
            assert f"_{prefix}__tvm_ffi__library_bin" in found
        inits = [s for s in binary.sections if s.name in ("__mod_init_func", "__init_offsets")]
        entries = sum(s.size // (8 if s.name == "__mod_init_func" else 4) for s in inits)
        assert entries == 4, "each of the four objects registers itself"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="loads ELF libraries")
def test_a_runtime_finds_each_model_by_its_prefix(folder: Path) -> None:
    """What an app does, on this machine: two models in one process, looked up by prefix."""
    import ctypes

    import tvm
    import tvm_ffi
    from apple_objects import lowered
    from tvm import relax
    from tvm.runtime.vm import VirtualMachine

    from mlc_compile.targets.apple.export import objects
    from mlc_compile.targets.cpu import linker

    target = tvm.target.Target({"kind": "llvm"})
    for prefix in ("native_one_", "native_two_"):
        mod = lowered(target, lambda m: m, prefix)
        members = objects(
            relax.build(mod, target, relax_pipeline=None, system_lib=True), folder, prefix
        )
        files = [folder / name for name, _ in members]
        for file, (_, data) in zip(files, members, strict=True):
            file.write_bytes(data)
        image = folder / f"{prefix}.so"
        subprocess.run([*linker(), "-shared", "-o", str(image), *map(str, files)], check=True)
        ctypes.CDLL(str(image), ctypes.RTLD_GLOBAL)
    for prefix in ("native_one_", "native_two_"):
        vm = VirtualMachine(tvm_ffi.system_lib(prefix), tvm.cpu())
        x = np.arange(24, dtype="float16").reshape(8, 3)
        np.testing.assert_array_equal(vm["double"](tvm.runtime.tensor(x)).numpy(), 2 * x)


def test_what_would_not_link_is_refused(folder: Path) -> None:
    members = read_tar(export(IPHONE, folder / "good.tar"))
    check_objects(members, IPHONE)
    check_system_library(members, "toy_model_")
    with pytest.raises(CheckFailedError, match=r"says platform 2, .* not iOS simulator"):
        check_objects(members, IPHONE_SIMULATOR)
    with pytest.raises(CheckFailedError, match="does not define _other_model___tvm_ffi"):
        check_system_library(members, "other_model_")
    with pytest.raises(CheckFailedError, match="both define _toy_model_"):
        check_objects([*members, ("copy.o", members[0][1])], IPHONE)
    unknown = [
        (name, data.replace(b"_TVMFFIFunctionCall\0", b"_TVMFFIFunctionCalm\0"))
        for name, data in members
    ]
    with pytest.raises(CheckFailedError, match="needs _TVMFFIFunctionCalm, which nothing in"):
        check_objects(unknown, IPHONE)
    unregistered = [
        (name, data.replace(b"__mod_init_func\0", b"__mod_none_func\0")) for name, data in members
    ]
    with pytest.raises(CheckFailedError, match="does not register itself"):
        check_system_library(unregistered, "toy_model_")


def test_an_archive_without_its_index_or_members_is_refused(folder: Path) -> None:
    members = read_tar(export(IPHONE, folder / "again.tar"))
    path = folder / "complete.a"
    write_archive(members, path)
    check_archive(path.read_bytes(), members, "x.a")
    half = folder / "half.a"
    write_archive(members[:1], half)
    with pytest.raises(CheckFailedError, match="does not hold its members"):
        check_archive(half.read_bytes(), members, "x.a")
    for name, data in members:
        (folder / name).write_bytes(data)
    files = [str(folder / name) for name, _ in members]
    bare = folder / "bare.a"
    command = [sys.executable, "-m", "ziglang", "ar", "--format=darwin", "qcSD", str(bare), *files]
    subprocess.run(command, check=True)
    with pytest.raises(CheckFailedError, match="has no index"):
        check_archive(bare.read_bytes(), members, "x.a")


def test_missing_zig_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlc_compile.targets.apple import tools
    from mlc_compile.targets.profile import get_target

    def missing(name: str) -> str:
        raise tools.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(tools.metadata, "version", missing)
    for name, suffix in (("iphone", ".a"), ("macos", ".dylib")):
        backend = get_target(name)[0].backend()
        with pytest.raises(EnvironmentLacksError, match=r"pip install 'mlc-compile\[metal\]'"):
            backend.check_environment(suffix, "zig")
        backend.check_environment(".tar", "zig")  # needs no tool at all


def test_variants_are_refused() -> None:
    from mlc_compile.errors import InputError
    from mlc_compile.targets.profile import get_target

    with pytest.raises(InputError, match="iphone:14: no such variant"):
        get_target("iphone")[0].backend().tvm_target("14", ".tar")
