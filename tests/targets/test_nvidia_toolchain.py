"""Finding nvcc: order, versions, and what is said when something is missing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.targets.nvidia import toolchain
from mlc_compile.targets.nvidia.toolchain import PACKAGES, find_nvcc

MakeNvcc = Callable[..., Path]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a CUDA compiler; its PATH has a C++ compiler alone."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "g++").write_text("#!/bin/sh\n")
    (folder / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    monkeypatch.setattr(toolchain, "SYSTEM", tmp_path / "usr-local-cuda")
    monkeypatch.setattr(toolchain, "package_folder", lambda: None)
    monkeypatch.setattr(toolchain, "missing_packages", lambda: list(PACKAGES))
    return folder


@pytest.fixture
def make_nvcc(tmp_path: Path) -> MakeNvcc:
    def make(where: str, version: str = "13.0", archs: str = "75 80 90", status: int = 0) -> Path:
        path = tmp_path / where / "bin" / "nvcc"
        path.parent.mkdir(parents=True)
        listed = "".join(f"echo compute_{arch}\n" for arch in archs.split())
        path.write_text(
            f'#!/bin/sh\nif [ "$1" = --list-gpu-arch ]; then\n{listed}exit; fi\n'
            f"echo Cuda compilation tools, release {version}, V{version}.88\nexit {status}\n"
        )
        path.chmod(0o755)
        return tmp_path / where

    return make


def test_the_order_of_places(
    make_nvcc: MakeNvcc, bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packages = make_nvcc("cu13")
    monkeypatch.setattr(toolchain, "package_folder", lambda: packages)
    monkeypatch.setattr(toolchain, "missing_packages", lambda: [])
    assert find_nvcc().path == packages / "bin" / "nvcc"
    system = make_nvcc("usr-local-cuda")
    assert find_nvcc().path == system / "bin" / "nvcc"
    monkeypatch.setenv("PATH", f"{make_nvcc('onpath') / 'bin'}:{os.environ['PATH']}")
    assert find_nvcc().origin == "PATH"
    monkeypatch.setenv("CUDA_PATH", str(make_nvcc("b")))
    assert find_nvcc().origin == "$CUDA_PATH"
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("a", "12.9")))
    found = find_nvcc()
    assert (found.origin, found.version, found.full) == ("$CUDA_HOME", (12, 9), "12.9.88")


def test_nothing_found_names_the_extra() -> None:
    with pytest.raises(EnvironmentLacksError, match=r"no CUDA compiler.*mlc-compile\[cuda\]") as e:
        find_nvcc()
    assert e.value.exit_code == 3 and "missing" not in e.value.message


def test_half_installed_packages_are_named(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = make_nvcc("cu13")
    monkeypatch.setattr(toolchain, "package_folder", lambda: packages)
    monkeypatch.setattr(toolchain, "missing_packages", lambda: ["nvidia-nvvm"])
    with pytest.raises(EnvironmentLacksError, match=r"packages nvidia-nvvm is missing"):
        find_nvcc()


@pytest.mark.parametrize(
    ("version", "status", "says"),
    [("11.8", 0, r"a/bin/nvcc is of CUDA 11\.8"), ("13.0", 1, r"a/bin/nvcc does not run")],
)
def test_what_was_passed_over_is_said(
    version: str,
    status: int,
    says: str,
    make_nvcc: MakeNvcc,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("a", version, status=status)))
    with pytest.raises(EnvironmentLacksError, match=says):
        find_nvcc()


def test_an_empty_cuda_home_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    with pytest.raises(EnvironmentLacksError, match=r"\$CUDA_HOME has no .*none/bin/nvcc"):
        find_nvcc()


def test_a_host_compiler_is_needed(
    make_nvcc: MakeNvcc, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("a")))
    monkeypatch.setenv("PATH", str(bare))
    (bare / "sh").symlink_to("/bin/sh")
    assert find_nvcc().command[1:] == ["-ccbin", str(bare / "g++")], "gcc is not there"
    (bare / "g++").rename(bare / "gcc")
    monkeypatch.setenv("NVCC_CCBIN", "/opt/g++")
    assert len(find_nvcc().command) == 1, "the user chose one"
    monkeypatch.delenv("NVCC_CCBIN")
    with pytest.raises(EnvironmentLacksError, match=r"neither g\+\+.*apt-get install g\+\+"):
        find_nvcc()


def test_old_architectures_need_cuda_12(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("new")))
    with pytest.raises(EnvironmentLacksError, match=r"not for sm_61, sm_70.*CUDA 12 toolkit"):
        find_nvcc().require((61, 70, 75))
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("old", "12.9", archs="61 70 75 90 120")))
    find_nvcc().require((61, 70, 75))


def test_new_architectures_need_a_new_compiler(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("a", "12.4")))
    with pytest.raises(EnvironmentLacksError, match=r"12\.4\.88 .* does not compile for sm_120"):
        find_nvcc().require((90, 120))


def test_a_compiler_newer_than_the_runtime_is_noted(
    make_nvcc: MakeNvcc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("a")))
    assert find_nvcc().notes == []
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc("b", "13.2")))
    assert "refuses its PTX" in find_nvcc().notes[0]
