"""nvcc's part: fat binaries, the cache, errors, and the instructions that old cards lack."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError
from mlc_compile.targets.nvidia.compile import compile_cuda
from mlc_compile.targets.nvidia.fatbin import read_fatbin
from mlc_compile.targets.nvidia.scan import check_instructions, lacking
from mlc_compile.targets.nvidia.toolchain import Nvcc, find_nvcc

KERNEL = 'extern "C" __global__ void k(float* x) { x[threadIdx.x] *= %s; }\n'


@pytest.fixture(scope="module")
def nvcc() -> Nvcc:
    return find_nvcc()


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A temporary folder of the test's own: what is left in it would be seen."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "cuda-kernels").iterdir())


def test_each_architecture_and_the_newest_ptx(nvcc: Nvcc, tmp_path: Path, scratch: Path) -> None:
    archs = (75, 80, 90)
    first = compile_cuda(KERNEL % 2, archs, nvcc, cache=tmp_path / "a")
    codes = [(code.kind, code.arch) for code in read_fatbin(first.fatbin)[0]]
    assert codes == [("elf", 75), ("elf", 80), ("elf", 90), ("ptx", 90)]
    again = compile_cuda(KERNEL % 2, archs, nvcc, cache=tmp_path / "b")
    assert again == first, "the same source gives the same bytes"
    assert list(scratch.iterdir()) == []


def test_a_second_time_nothing_is_compiled(nvcc: Nvcc, tmp_path: Path) -> None:
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "a.cuh").write_text("#define FACTOR 2\n")

    def run(compiler: Nvcc, source: str = '#include "a.cuh"\n' + KERNEL % "FACTOR") -> bytes:
        return compile_cuda(source, (90,), compiler, headers=headers, cache=tmp_path).fatbin

    made = run(nvcc)
    broken = replace(nvcc, path=tmp_path / "no-nvcc")
    assert run(broken) == made
    # Whatever the code follows from is part of the key.
    for change in (
        lambda: run(replace(broken, full="13.0.89")),
        lambda: run(broken, KERNEL % 3),
        lambda: compile_cuda(KERNEL % 2, (80,), broken, headers=headers, cache=tmp_path),
    ):
        with pytest.raises(EnvironmentLacksError, match=r"cannot run .*no-nvcc"):
            change()
    (headers / "a.cuh").write_text("#define FACTOR 3\n")
    assert run(nvcc) != made
    assert len(entries(tmp_path)) == 2


def test_a_damaged_entry_is_compiled_again(nvcc: Nvcc, tmp_path: Path) -> None:
    made = compile_cuda(KERNEL % 2, (90,), nvcc, cache=tmp_path)
    (entry,) = entries(tmp_path)
    for data in (b"", entry.read_bytes()[:-1], b"\0" + entry.read_bytes()[1:]):
        entry.write_bytes(data)
        assert compile_cuda(KERNEL % 2, (90,), nvcc, cache=tmp_path) == made
    assert entries(tmp_path) == [entry]


def test_a_cache_that_cannot_be_written_is_done_without(nvcc: Nvcc, tmp_path: Path) -> None:
    (tmp_path / "cuda-kernels").write_text("a file in its place")
    assert compile_cuda(KERNEL % 2, (90,), nvcc, cache=tmp_path).fatbin


def test_the_oldest_entries_go_first(
    nvcc: Nvcc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    from mlc_compile.targets.nvidia import compile as module

    compile_cuda(KERNEL % 2, (90,), nvcc, cache=tmp_path)
    (first,) = entries(tmp_path)
    os.utime(first, (1, 1))
    monkeypatch.setattr(module, "CACHE_BYTES", int(1.5 * first.stat().st_size))
    compile_cuda(KERNEL % 3, (90,), nvcc, cache=tmp_path)
    (left,) = entries(tmp_path)
    assert left != first


def test_two_processes_make_one_entry(nvcc: Nvcc, tmp_path: Path) -> None:
    code = (
        "import sys, hashlib; from pathlib import Path\n"
        "from mlc_compile.targets.nvidia.compile import compile_cuda\n"
        "from mlc_compile.targets.nvidia.toolchain import find_nvcc\n"
        "source, cache = sys.argv[1:]\n"
        "made = compile_cuda(source, (80, 90), find_nvcc(), cache=Path(cache))\n"
        "print(hashlib.sha256(made.fatbin).hexdigest())\n"
    )
    command = [sys.executable, "-c", code, KERNEL % 5, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(said) == 1
    assert len(entries(tmp_path)) == 1


def test_errors_of_nvcc_come_whole_and_the_source_stays(
    nvcc: Nvcc, tmp_path: Path, scratch: Path
) -> None:
    source = KERNEL % 2 + "".join(f"int wrong{i} = missing{i};\n" for i in range(40))
    with pytest.raises(EnvironmentLacksError) as raised:
        compile_cuda(source, (75, 90), nvcc, cache=tmp_path)
    text = str(raised.value)
    for i in range(40):
        assert f'identifier "missing{i}" is undefined' in text
    (kept,) = entries(tmp_path)
    assert str(kept) in text and kept.read_text() == source
    assert list(scratch.iterdir()) == []


def test_the_assembler_refuses_what_an_architecture_lacks(nvcc: Nvcc, tmp_path: Path) -> None:
    source = 'extern "C" __global__ void k() { asm volatile("griddepcontrol.wait;"); }\n'
    assert compile_cuda(source, (90,), nvcc, cache=tmp_path).fatbin
    with pytest.raises(EnvironmentLacksError, match=r"griddepcontrol.*sm_90"):
        compile_cuda(source, (80, 90), nvcc, cache=tmp_path)


def test_a_report_of_registers_on_request(nvcc: Nvcc, tmp_path: Path) -> None:
    assert compile_cuda(KERNEL % 2, (90,), nvcc, cache=tmp_path).report == ""
    report = compile_cuda(KERNEL % 2, (90,), nvcc, cache=tmp_path, report=True).report
    assert "registers" in report and "spill" in report


@pytest.mark.parametrize(
    ("line", "arch", "since"),
    [
        ("cp.async.cg.shared.global [%r1], [%rd1], 16;", 75, "sm_80"),
        ("@%p1 cp.async.commit_group;", 75, "sm_80"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f1}, {%r1};", 75, "sm_80"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%f1}, {%r1};", 75, "sm_80"),
        ("fma.rn.bf16x2 %r1, %r2, %r3, %r4;", 75, "sm_80"),
        ("cvt.rn.bf16.f32 %rs1, %f1;", 75, "sm_80"),
        ("redux.sync.add.s32 %r1, %r2, %r3;", 75, "sm_80"),
        ("max.f16x2 %r1, %r2, %r3;", 75, "sm_80"),
        ("griddepcontrol.wait;", 80, "sm_90"),
        ("{ griddepcontrol.launch_dependents; }", 80, "sm_90"),
        ("cp.async.bulk.shared::cluster.global [%r1], [%rd1], %r2, [%r3];", 80, "sm_90"),
        ("wgmma.fence.sync.aligned;", 80, "sm_90"),
        ("@!%p2 stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r1], {%r2};", 80, "sm_90"),
        ("ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8 {%r1}, [%r2];", 90, "sm_100"),
    ],
)
def test_instructions_of_later_architectures_are_found(line: str, arch: int, since: str) -> None:
    (found,) = lacking(f"$L__BB0:\n\tld.param.u64 %rd1, [k_param_0];\n\t{line}\n\tret;\n", arch)
    assert found.endswith(f"({since})")
    assert lacking(line, int(since[3:])) == []


def test_what_an_old_card_has_is_passed() -> None:
    lines = (
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r5];",
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%f1}, {%r1};",
        "fma.rn.f16x2 %r1, %r2, %r3, %r4;",
        "ex2.approx.ftz.f32 %f1, %f2;",
        "cvt.rn.f16.f32 %rs1, %f1;",
        "ld.global.nc.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];",
        ".reg .b32 %r<9>;",
        "// cp.async is not used",
    )
    assert lacking("\n".join(lines), 75) == []
    assert lacking("wgmma.fence.sync.aligned;", 90) == []
    assert lacking("wgmma.fence.sync.aligned;", 90, plain=True) == [
        "wgmma.fence.sync.aligned (sm_90a)"
    ]


def test_source_is_scanned_through_its_ptx(nvcc: Nvcc) -> None:
    assert ".target sm_75" in check_instructions(KERNEL % 2, 75, nvcc)
    source = 'extern "C" __global__ void k() { asm volatile("cp.async.commit_group;"); }\n'
    with pytest.raises(CheckFailedError, match=r"sm_75 has cp\.async\.commit_group \(sm_80\)"):
        check_instructions(source, 75, nvcc)
