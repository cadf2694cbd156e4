"""The emulated device knows every instruction that the headers of the cuda target use."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlc_compile.errors import InputError
from mlc_compile.runtime.cuda_emulator.__main__ import main
from mlc_compile.runtime.cuda_emulator.native import INCLUDE, build_program
from mlc_compile.targets.cuda_kernels._launch import HEADERS

FUNCTION = re.compile(r"(?:__forceinline__|inline)\s+[\w ]+?\*?\s(\w+)\(")
INSTRUCTIONS = sorted(path.name for path in HEADERS.glob("ptx*.cuh"))


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_has_a_stand_in(name: str) -> None:
    real, ours = ((folder / name).read_text() for folder in (HEADERS, INCLUDE))
    wanted = set(FUNCTION.findall(real))
    assert wanted and wanted <= set(FUNCTION.findall(ours))


def test_inline_assembly_stands_where_the_emulator_does_not_see_it() -> None:
    for path in HEADERS.glob("*.cuh"):
        text = path.read_text()
        assert path.name in INSTRUCTIONS or "asm" not in text or "MLC_CUDA_EMULATOR" in text, path


@pytest.mark.parametrize("arch", [75, 80, 90])
def test_headers_compile_together(arch: int, tmp_path: Path) -> None:
    source = tmp_path / "all.cu"
    names = sorted(path.name for path in HEADERS.glob("*.cuh"))
    source.write_text("".join(f'#include "{n}"\n' for n in names) + "int main() {}\n")
    build_program(source, tmp_path / "all", folders=[HEADERS], arch=arch)
    subprocess.run([tmp_path / "all"], check=True)


PROGRAM = """#include "ptx.cuh"
__global__ void twice(const float* x, float* y, float* shared) {
  shared[threadIdx.x] = 2 * x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared[31 - threadIdx.x];
}
int main() {
  float *x, *y;
  cudaMalloc(&x, 128);
  cudaMalloc(&y, BYTES);
  for (int i = 0; i < 32; i++) x[i] = i;
  emulate(1, 32, 128, [&] { twice(x, y, (float*)emu_dynamic_shared()); }, "twice");
  printf("%g %g\\n", y[0], y[31]);
}
"""


def test_a_program(tmp_path: Path) -> None:
    source = tmp_path / "twice.cu"
    source.write_text(PROGRAM)
    words = [str(source), "-o", str(tmp_path / "twice"), "-I", str(HEADERS), "-D"]
    assert main([*words, "BYTES=128"]) == 0
    run = subprocess.run([tmp_path / "twice"], capture_output=True, text=True, check=True)
    assert run.stdout == "62 0\n"
    assert main([*words, "BYTES=120"]) == 0
    run = subprocess.run([tmp_path / "twice"], capture_output=True, text=True, check=False)
    assert run.returncode and re.search(
        r"twice, block \(0, 0, 0\), thread 3[01] writes 4 bytes at twice.cu:5.*"
        r"[04] bytes after the end of cudaMalloc of 120 bytes",
        run.stderr,
    )


def test_what_the_compiler_says_is_shown(tmp_path: Path) -> None:
    source = tmp_path / "bad.cu"
    source.write_text("int main() { return nothing; }\n")
    with pytest.raises(InputError, match=r"bad\.cu(.|\n)*'nothing' was not declared"):
        build_program(source, tmp_path / "bad", folders=[], arch=80)
    command = [sys.executable, "-m", "mlc_compile.runtime.cuda_emulator", str(source)]
    run = subprocess.run([*command, "-o", str(tmp_path / "bad")], capture_output=True, text=True,
                         check=False)  # fmt: skip
    assert run.returncode == 2 and "was not declared" in run.stderr
