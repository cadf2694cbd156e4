"""Whole models for NVIDIA GPUs: what the files hold, and that old cards have every instruction."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "compiler"))
from compiler_configs import write_config

from mlc_compile.compiler.build import compile_library
from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.targets.nvidia import toolchain
from mlc_compile.targets.nvidia.archs import parse_archs
from mlc_compile.targets.nvidia.export import dependent_kernels
from mlc_compile.targets.nvidia.fatbin import find_fatbins
from mlc_compile.targets.nvidia.packing import DEPENDENT_LAUNCH
from mlc_compile.targets.nvidia.scan import check_instructions
from mlc_compile.targets.nvidia.toolchain import find_nvcc


def build(folder: Path, target: str, scheme: str) -> tuple[Path, list[str]]:
    """A library, and the sources of its kernels. Its head size is one that tensor cores take."""
    sizes = {"head_dim": 64, "hidden_size": 128, "num_hidden_layers": 1}
    config = write_config(folder, quantization=scheme, **sizes)
    dump = folder / "dump"
    compile_library(config, target, folder / "model.so", debug_dump=dump)
    return folder / "model.so", [path.read_text() for path in sorted(dump.glob("*.cu"))]


def cases() -> list[object]:
    old = [("cuda:sm_75", "q4f16_1")]
    # Kernels of one kind of code differ in numbers only, and each takes nvcc half a minute.
    some = ("q0f16", "q8f32_1", "q4f16_awq", "e4m3f16_1")
    able = [*old, *(("cuda", name) for name in some), ("cuda:sm_80", "q4bf16_1")]
    return [pytest.param(*case, marks=pytest.mark.slow) for case in able]


@pytest.mark.parametrize(("target", "scheme"), cases())
def test_machine_code_for_each_and_no_instruction_it_lacks(
    target: str, scheme: str, tmp_path: Path
) -> None:
    library, sources = build(tmp_path, target, scheme)
    _, _, variant = target.partition(":")
    archs = parse_archs(variant) if variant else (75, 80, 90)
    data = library.read_bytes()
    assert b"__global__" not in data
    found = find_fatbins(data)
    assert len(found) == len(sources) > 0
    for codes in found:
        assert sorted(c.arch for c in codes if c.kind == "elf") == list(archs)
        assert [c.arch for c in codes if c.kind == "ptx"] == [archs[-1]]
    nvcc = find_nvcc()
    for source in sources:
        check_instructions(source, archs[0], nvcc)
    dependent = sum(len(dependent_kernels(source)) for source in sources)
    assert data.count(DEPENDENT_LAUNCH.encode()) == dependent
    if archs[0] < 90:
        assert dependent == 0, "these devices have no dependent launches"


def test_nothing_is_begun_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(toolchain, "_candidates", lambda: [])
    with pytest.raises(EnvironmentLacksError, match=r"no CUDA compiler.*mlc-compile\[cuda\]"):
        compile_library(write_config(tmp_path), "cuda", tmp_path / "model.so")
    assert [path.name for path in tmp_path.iterdir()] == ["mlc-chat-config.json"]


@pytest.mark.parametrize(
    ("target", "scheme", "says"),
    [
        ("cuda:sm_99", "q4f16_1", "sm_99 is no architecture"),
        ("cuda:sm_90,sm_90", "q4f16_1", "sm_90 is named twice"),
        ("cuda", "q0bf16", r"bfloat16, which cuda cannot.*--target cuda:sm_80,sm_90"),
        ("cuda:sm_75,sm_80", "q4bf16_1", "bfloat16, which cuda cannot"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    target: str, scheme: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=says):
        compile_library(write_config(tmp_path, quantization=scheme), target, tmp_path / "model.so")


def test_errors_of_nvcc_reach_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlc_compile.targets.nvidia import export

    monkeypatch.setenv("MLC_COMPILE_CACHE", str(tmp_path / "cache"))
    real = export.compile_cuda

    def broken(source: str, *arguments: object, **more: object) -> object:
        return real(source + "#error something is wrong here\n", *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "compile_cuda", broken)
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(EnvironmentLacksError, match="something is wrong here") as raised:
        compile_library(write_config(folder), "cuda:sm_90", folder / "model.so")
    kept = list((tmp_path / "cache" / "cuda-kernels").glob("failed-*.cu"))
    assert kept and any(str(path) in str(raised.value) for path in kept)
    assert [path.name for path in folder.iterdir()] == ["mlc-chat-config.json"]
