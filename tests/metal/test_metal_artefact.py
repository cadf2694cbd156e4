"""Kernels out of a library's bytes, what of them is refused without running, and the report."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tvm
from metal_kernels import METAL, TARGET, embedded, msl, payload, text

from mlc_compile.errors import InputError
from mlc_compile.runtime.metal_emulator import (
    KernelSource,
    Limits,
    artefact,
    check_kernels,
    check_limits,
    parse,
    read_kernels,
)
from mlc_compile.runtime.metal_emulator.__main__ import main
from mlc_compile.runtime.metal_emulator.artefact import find_modules, parse_module
from mlc_compile.targets.gpu_kernels import elementwise

TAGS = ["blockIdx.x", "threadIdx.x"]
GOOD = msl("  x[i] = 1.0f;")
SAMPLE = payload({"k": (GOOD, ["handle"], TAGS), "l": (GOOD, ["handle", "int32"], TAGS)})


@cache
def executable() -> Any:
    kernels = {
        "norm": elementwise.rms_norm(64, "float16", 1e-5, None, device=METAL),
        "gate": elementwise.gated_activation("silu", 64, "float32", None, device=METAL),
    }
    named = {name: kernel.with_attr("global_symbol", name) for name, kernel in kernels.items()}
    return tvm.tirx.build(tvm.IRModule(named), target=TARGET)


def write(folder: Path, name: str, source: str) -> Path:
    path = folder / name
    path.write_bytes(b"\x7fELF of a kind " + embedded(payload({"k": (source, ["handle"], TAGS)})))
    return path


# --- reading


@pytest.mark.parametrize("suffix", ["so", "tar", "o"])
def test_what_tvm_exports(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"lib.{suffix}"
    if suffix == "o":
        executable().export_library(str(tmp_path / "lib.tar"))
        subprocess.run(["tar", "xf", str(tmp_path / "lib.tar"), "-C", str(tmp_path)], check=True)
        path = tmp_path / "devc.o"
    else:
        executable().export_library(str(path))
    (kernels,) = read_kernels(path)
    assert sorted(k.name for k in kernels) == ["gate_kernel", "norm_kernel"]
    whole = executable().imports[0].inspect_source()
    for kernel in kernels:
        assert kernel.source.strip() in whole
        assert kernel.tags[-1] == "threadIdx.x" and set(kernel.types) <= {"handle", "int32"}
    assert all(v.ok for v in check_kernels(kernels))


def test_own_bytes_are_read_back() -> None:
    kernels = parse_module(SAMPLE, "here")
    tags = tuple(TAGS)
    assert kernels == [
        KernelSource("k", GOOD, ("handle",), tags),
        KernelSource("l", GOOD, ("handle", "int32"), tags),
    ]
    two = b"metal" + embedded(SAMPLE) + bytes(7) + embedded(payload({"m": (GOOD, [], TAGS)}))
    assert [[k.name for k in m] for m in find_modules(two, "here")] == [["k", "l"], ["m"]]


def test_every_cut_is_noticed() -> None:
    for end in range(len(SAMPLE)):
        with pytest.raises(InputError, match=r"here: .*(cut off|broken|form)"):
            parse_module(SAMPLE[:end], "here")
    whole = embedded(SAMPLE)
    with pytest.raises(InputError, match="cut off"):
        find_modules(whole[:-1], "here")


def test_absurd_lengths_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    count = artefact._Reader.count

    def spy(reader: Any, smallest: int) -> int:
        places.append(reader.at)
        return count(reader, smallest)

    with monkeypatch.context() as patch:
        patch.setattr(artefact._Reader, "count", spy)
        parse_module(SAMPLE, "here")
    assert len(places) == 1 + 1 + 2 * (1 + 1 + 1 + 1 + 2 + 1) + 1 + 2 * 2
    for at in places:
        for absurd in (1 << 62, len(SAMPLE) - at):
            broken = SAMPLE[:at] + struct.pack("<Q", absurd) + SAMPLE[at + 8 :]
            with pytest.raises(InputError, match="cut off or broken"):
                parse_module(broken, "here")


def test_other_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.so"
    empty.write_bytes(b"metal, but none" + text("metal"))
    with pytest.raises(InputError, match="holds no Metal kernels"):
        read_kernels(empty)
    with pytest.raises(InputError, match="cannot be read"):
        read_kernels(tmp_path / "missing.so")
    compiled = SAMPLE.replace(text("metal"), text("metallib"), 1)
    with pytest.raises(InputError, match="'metallib', not as MSL text"):
        find_modules(embedded(compiled), "here")
    archive = tmp_path / "cut.tar"
    archive.write_bytes(gzip.compress(embedded(SAMPLE))[:-12])
    with pytest.raises(InputError, match="cannot be read"):
        read_kernels(archive)


# --- limits


def problems(source: str, **limits: Any) -> list[str]:
    return check_limits(parse(source), Limits(**limits))


def test_threadgroup_memory() -> None:
    body = "  threadgroup float4 s[{}];\n  threadgroup half t[8];\n  x[i] = 1.0f;"
    assert not problems(msl(body.format(2047)))
    assert problems(msl(body.format(2048))) == [
        "32784 bytes of threadgroup memory, the limit is 32768"
    ]
    assert not problems(msl(body.format(2048)), group_bytes=65536)


def test_buffers() -> None:
    def bound(n: int) -> str:
        return ",\n".join(f"  device float* x{j} [[ buffer({j}) ]]" for j in range(n))

    assert not problems(msl("  x0[i] = 1.0f;", bound(31)))
    assert problems(msl("  x0[i] = 1.0f;", bound(32))) == ["32 buffers, the limit is 31"]


def test_values() -> None:
    arguments = "device float* x [[ buffer(0) ]],\n  constant a_t& a [[ buffer(1) ]]"
    head = "struct a_t {\n  float f[2];\n  int n[N];\n};"
    body = "  x[i] = a.f[0];"
    assert not problems(msl(body, arguments, head.replace("N", "1022")))
    found = problems(msl(body, arguments, head.replace("N", "1023")))
    assert found == ["4100 bytes of by-value arguments, the limit is 4096"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("  double d = 1.0;", "double"),
        ("  bfloat b = (bfloat)1.0f;", "bfloat"),
        ("  x[i] = INFINITY;", "INFINITY"),
        ("  x[i] = -NAN;", "NAN"),
        ("  x[i] = 1.0e+39f;", "1.0e+39f is infinite"),
        ("  goto end;", "goto"),
    ],
)
def test_words(body: str, word: str) -> None:
    (found,) = problems(msl(body))
    assert found.startswith(word)
    assert not problems(msl("  // " + body.strip() + "\n  x[i] = 3.402823e+38f;"))


def test_bfloat_and_matrices_by_device() -> None:
    assert not problems(msl("  bfloat b = (bfloat)1.0f;"), language=(3, 1))
    source = msl("  simdgroup_half8x8 m[1];\n  x[i] = 1.0f;")
    assert not problems(source)
    assert problems(source, simdgroup_matrices=False)


def test_forms_that_are_not_understood() -> None:
    for source, words in [
        ("", "0 kernels"),
        (GOOD + GOOD, "2 kernels"),
        (msl("", "texture2d<float> t [[ texture(0) ]]"), "is not understood"),
        (msl("", "constant a_t& a [[ buffer(0) ]]"), "struct a_t is not defined"),
        (msl("  threadgroup mystery s[3];"), "unknown MSL type 'mystery'"),
    ]:
        with pytest.raises(InputError, match=words):
            kernel = parse(source)
            check_limits(kernel)


# --- types


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("  x[i] = y;", "'y' was not declared"),
        ("  x[i] = erf(x[i]);", "'erf' was not declared"),
        ("  x[i] = max(x[i], 1);", "no matching function for call to 'max("),
        ("  x[i] = max(x[i], 1.0h);", "no matching function for call to 'max("),
        ("  threadgroup float s[32];\n  device float* p = s;", "conversion from"),
        ("  threadgroup float s[32];\n  x[i] = *(device float*)(s + i);", "no matching function"),
        ("  float4 v = float4(1.0f, 2.0f);", "no matching function"),
        ("  float4 v = half4((half)1.0f);", "conversion from"),
        ('  printf("x");', "'printf' was not declared"),
    ],
)
def test_types(body: str, words: str) -> None:
    (verdict,) = check_kernels([KernelSource("k", msl(body), ("handle",), tuple(TAGS))])
    (problem,) = verdict.problems
    assert words in problem
    line = msl(body).splitlines().index(body.splitlines()[-1]) + 1
    assert f"k:{line}:" in problem  # the compiler names the line of the MSL text


def test_one_bad_kernel_does_not_hide_the_others() -> None:
    bad = msl("  x[i] = nothing;").replace("void k(", "void bad(")
    sources = [
        KernelSource("k", GOOD, ("handle",), tuple(TAGS)),
        KernelSource("bad", bad, ("handle",), tuple(TAGS)),
        KernelSource("l", GOOD.replace("void k(", "void l("), ("handle", "handle"), tuple(TAGS)),
    ]
    verdicts = check_kernels(sources)
    assert [v.ok for v in verdicts] == [True, False, False]
    assert "1 buffers in its MSL, 2 in its launch" in verdicts[2].problems
    assert all(v.ok for v in check_kernels(sources[:2], types=False))


# --- the command


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path, "good.so", GOOD)
    assert main([str(good)]) == 0
    out = capsys.readouterr().out
    assert "1 Metal kernels, 0 with problems" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("k ")] == ["ok"]
    large = write(tmp_path, "large.a", msl("  threadgroup float s[8193];\n  x[i] = 1.0f;"))
    assert main([str(good), str(large)]) == 1
    assert "k: 32784 bytes of threadgroup memory, the limit is 32768" in capsys.readouterr().out
    assert main(["--no-types", "--threadgroup-bytes", "65536", str(large)]) == 0
    wide = write(tmp_path, "wide.o", msl("  bfloat b = (bfloat)1.0f;\n  x[i] = (float)b;"))
    assert main([str(wide)]) == 1
    assert main(["--language", "3.1", str(wide)]) == 0
    wrong = write(tmp_path, "wrong.o", msl("  x[i] = y;"))
    assert main([str(wrong)]) == 1
    out = capsys.readouterr().out
    assert "k: does not compile" in out and "k:8:" in out
    other = tmp_path / "other.so"
    other.write_bytes(b"\x7fELF")
    assert main([str(other)]) == 2
    assert "error: " in capsys.readouterr().err


def test_report_as_a_module(tmp_path: Path) -> None:
    path = write(tmp_path, "lib.so", GOOD)
    command = [sys.executable, "-m", "mlc_compile.runtime.metal_emulator", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "1 Metal kernels, 0 with problems" in run.stdout
