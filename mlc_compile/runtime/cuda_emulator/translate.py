"""The CUDA C++ of a module cut into units of one kernel each, for the host's compiler."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mlc_compile.errors import InputError

_HEAD = 'extern "C" __global__ '
_NAME = re.compile(r"(?:__\w+__\s*\([^()]*\)\s*)*(\w+)\s*\(")
# TVM's declaration of dynamic shared memory, which the emulator has at an address of its own.
_DYNAMIC = re.compile(
    r"extern\s+__shared__\s+(?:__align__\(\d+\)\s+|alignas\(\d+\)\s+)?(\w+)\s+(\w+)\s*\[\s*\]\s*;"
)


@dataclass(frozen=True)
class Unit:
    """One kernel with what stands before all of them; `parameters` are C types in order."""

    name: str
    prelude: str
    body: str
    parameters: tuple[str, ...]

    def cpp(self) -> str:
        """C++ that exports `emu_entry`, which runs one thread on words of arguments."""
        body = _DYNAMIC.sub(r"\1* \2 = (\1*)emu_dynamic_shared();", self.body)
        arguments = ", ".join(
            f"emu::argument<{t}>(emu_words[{i}])" for i, t in enumerate(self.parameters)
        )
        return f"""#include "cuda_emulator.h"
#line 1 "kernels.cu"
{self.prelude}
#line 1 "{self.name}"
{body}
#line 1 "launch"
extern "C" __attribute__((visibility("default"))) EMU_RAW void emu_entry(void* emu_p) {{
  auto* emu_words = (const uint64_t*)emu_p;
  {self.name}({arguments});
}}
"""


def split(source: str) -> dict[str, Unit]:
    """The kernels of a module by their names.

    Raises:
        InputError: a kernel's head is not in the form that TVM's code generation writes.
    """
    pieces = re.split(rf"(?m)^(?={re.escape(_HEAD)})", source)
    prelude, units = pieces[0], {}
    for piece in pieces[1:]:
        match = re.match(r"void\s+", piece[len(_HEAD) :])
        start = len(_HEAD) + (match.end() if match else 0)
        name = _NAME.match(piece, start)
        end = piece.find(")", name.end()) if name else -1
        if match is None or name is None or end < 0:
            raise InputError(f"a CUDA kernel whose head is not understood: {piece[:200]!r}")
        if piece[end + 1 :].lstrip().startswith(";"):
            continue  # a declaration
        types = tuple(_type(p) for p in piece[name.end() : end].split(",") if p.strip())
        units[name[1]] = Unit(name[1], prelude, piece, types)
    return units


def _type(parameter: str) -> str:
    """ "const half* __restrict__ x" -> "const half*"."""
    words = re.sub(r"__restrict__|__grid_constant__", " ", parameter)
    match = re.match(r"\s*(.*?[\s*])\w+\s*$", words, flags=re.DOTALL)
    if match is None:
        raise InputError(f"a parameter of a CUDA kernel that is not understood: {parameter!r}")
    return " ".join(match[1].split())
