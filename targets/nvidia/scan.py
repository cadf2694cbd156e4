"""Instructions that an architecture lacks, looked for in its PTX.

nvcc's assembler refuses most of them already; this also names those that a later driver would, and
makes the promise about old cards a test. From the section "Target ISA Notes" of each instruction
in NVIDIA's PTX ISA 9.0.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from mlc_compile.errors import CheckFailedError, EnvironmentLacksError
from mlc_compile.targets.nvidia.compile import FLAGS, HEADERS
from mlc_compile.targets.nvidia.toolchain import Nvcc

SINCE: Mapping[str, int] = MappingProxyType(
    {
        r"ldmatrix\.": 75,
        r"(?:movmatrix)\.": 75,
        r"mma\.sync\S*\.m8n8k16\.": 75,
        r"mma\.sync\S*\.m16n8k8\.": 75,
        r"tanh\.approx\.f16": 75,
        r"ex2\.approx(?:\.ftz)?\.f16": 75,
        r"cp\.async\.(?:ca|cg|commit_group|wait_group|wait_all|mbarrier)": 80,
        r"mma\.sync\S*\.m16n8k(?:4|16|32|64|128|256)\.": 80,
        r"mma\.sync\S*\.bf16": 80,
        r"wmma\.\S*\.(?:bf16|tf32)": 80,
        r"redux\.sync\.": 80,
        r"mbarrier\.": 80,
        r"(?:min|max)(?:\.\w+)*\.f16": 80,
        r"(?:add|sub|mul|fma|neg|abs|min|max|cvt|set|setp)\S*\.bf16": 80,
        r"(?:ld|st|cp)\.\S*\.L2::cache_hint": 80,
        r"createpolicy\.": 80,
        r"(?:applypriority|discard)\.": 80,
        r"prefetch\.\S*\.L2::evict": 80,
        r"ld\.\S*\.L2::256B": 80,
        r"cvt\.\S*\.e[45]m[32]x2": 89,
        r"mma\.sync\S*\.e[45]m[32]": 89,
        r"(?:ex2|tanh)\.approx(?:\.ftz)?\.bf16": 90,
        r"(?:add|sub|mul)(?:\.\w+)*\.bf16": 90,
        r"(?:atom|red)\.\S*\.bf16": 90,
        r"(?:atom|red)\.\S*\.v[248]\.": 90,
        r"stmatrix\.": 90,
        r"cp\.async\.bulk": 90,
        r"(?:cp\.)?reduce\.async": 90,
        r"griddepcontrol\.": 90,
        r"barrier\.cluster": 90,
        r"mapa\.": 90,
        r"elect\.sync": 90,
        r"fence\.proxy\.": 90,
        r"multimem\.": 90,
        r"wgmma\.": 90,
        r"setmaxnreg\.": 90,
        r"ldmatrix\.\S*\.(?:b8|m16n16|m8n16)": 100,
        r"tcgen05\.": 100,
        r"clusterlaunchcontrol\.": 100,
        r"(?:ld|st)\.\S*\.v8\.": 100,
    }
)
"""Pattern -> the first architecture that has the instruction; tried at the start of each."""

FEATURES_OF_90A = (r"wgmma\.", r"setmaxnreg\.")
"""What plain PTX of compute_90 must not have: it would run on no other architecture."""

_COMPILED = {pattern: re.compile(pattern) for pattern in (*SINCE, *FEATURES_OF_90A)}
_INSTRUCTION = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)")


def lacking(ptx: str, arch: int, *, plain: bool = False) -> list[str]:
    """The instructions in `ptx` that `arch` lacks, each once, with the first one that has it.

    plain: also those of sm_90a alone.
    """
    found: dict[str, str] = {}
    for line in re.split(r"[;\n{}]", ptx):
        match = _INSTRUCTION.match(line.strip())
        if match is None or match[1] in found:
            continue
        name = match[1]
        for pattern, since in SINCE.items():
            if since > arch and _COMPILED[pattern].match(name):
                found[name] = f"{name} (sm_{since})"
        if plain and any(_COMPILED[pattern].match(name) for pattern in FEATURES_OF_90A):
            found[name] = f"{name} (sm_90a)"
    return sorted(found.values())


def check_instructions(source: str, arch: int, nvcc: Nvcc, *, headers: Path = HEADERS) -> str:
    """The PTX that nvcc makes of `source` for `arch`.

    Raises:
        CheckFailedError: it has an instruction that `arch` lacks, or nvcc failed.
    """
    with tempfile.TemporaryDirectory(prefix="mlc-cuda-") as work:
        (Path(work) / "kernels.cu").write_text(source, encoding="utf-8")
        command = [*nvcc.command, "--ptx", *FLAGS, f"-arch=compute_{arch}", "-I", str(headers)]
        try:
            done = subprocess.run(
                [*command, "-o", "kernels.ptx", "kernels.cu"],
                cwd=work,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise EnvironmentLacksError(f"cannot run {nvcc.path}: {error.strerror}") from error
        if done.returncode:
            raise CheckFailedError(f"nvcc failed for sm_{arch}:\n{done.stderr.strip()}")
        ptx = (Path(work) / "kernels.ptx").read_text(encoding="utf-8")
    if found := lacking(ptx, arch, plain=True):
        raise CheckFailedError(f"code for sm_{arch} has {', '.join(found)}")
    return ptx
