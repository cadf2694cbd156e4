"""What Metal allows a kernel, checked without running it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from mlc_compile.errors import InputError
from mlc_compile.runtime.metal_emulator.artefact import KernelSource
from mlc_compile.runtime.metal_emulator.native import type_check
from mlc_compile.runtime.metal_emulator.translate import Kernel, Mode, parse, unit, without_comments


@dataclass(frozen=True)
class Limits:
    """Of the weakest device and the language version that a library is for.

    group_bytes: threadgroup memory. buffers: argument table entries. threads: of a threadgroup.
    constant_bytes: by-value arguments of a launch. language: (major, minor) of MSL.
    simdgroup_matrices: Apple7 (A14, M1) and later.
    Source: Apple's Metal feature set tables, and `setBytes` for by-value arguments.
    """

    group_bytes: int = 32 << 10
    buffers: int = 31
    threads: int = 1024
    constant_bytes: int = 4 << 10
    language: tuple[int, int] = (3, 0)
    simdgroup_matrices: bool = True


@dataclass
class Verdict:
    """One kernel of a report; `problems` is empty when it may run. `axes` are those of a launch's
    threads, whose extents only a launch knows."""

    name: str
    kernel: Kernel | None
    axes: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def check_limits(kernel: Kernel, limits: Limits | None = None) -> list[str]:
    """What in a kernel exceeds the limits, in words."""
    limits = limits or Limits()
    problems = []

    def at_most(value: int, limit: int, what: str) -> None:
        if value > limit:
            problems.append(f"{value} {what}, the limit is {limit}")

    at_most(kernel.group_bytes, limits.group_bytes, "bytes of threadgroup memory")
    at_most(kernel.highest_binding + 1, limits.buffers, "buffers")
    at_most(kernel.constant_bytes, limits.constant_bytes, "bytes of by-value arguments")
    code = without_comments(kernel.source)
    words = set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", code))
    if "double" in words:
        problems.append("double: Metal has no 64-bit floats")
    if limits.language < (3, 1) and any(re.match(r"bfloat[234]?$", w) for w in words):
        problems.append("bfloat: needs MSL 3.1")
    for word in sorted(words & {"INFINITY", "NAN", "HUGE_VALF"}):
        problems.append(f"{word}: fast-math assumes that it does not occur")
    huge = [
        m
        for m in re.findall(r"(?<![\w.])\d[\d.]*[eE]\+?\d+(?=[fF]\b)", code)
        if float(m) > 3.4028236e38
    ]
    problems += [f"{literal}f is infinite, and fast-math assumes no infinities" for literal in huge]
    if "goto" in words:
        problems.append("goto: not in MSL")
    if kernel.matrices and not limits.simdgroup_matrices:
        problems.append("simdgroup matrices: need Apple7 (A14, M1)")
    return problems


def check_kernels(
    sources: Sequence[KernelSource], limits: Limits | None = None, *, types: bool = True
) -> list[Verdict]:
    """Limits and types of every kernel.

    Raises:
        EnvironmentLacksError: types are to be checked and there is no C++ compiler.
    """
    verdicts = []
    for source in sources:
        tags = [t for t in source.tags if t.startswith("threadIdx.")]
        verdict = Verdict(source.name, None, "".join(t[-1] for t in tags))
        verdicts.append(verdict)
        try:
            verdict.kernel = parse(source.source)
        except InputError as error:
            verdict.problems.append(error.message)
            continue
        verdict.problems += check_limits(verdict.kernel, limits)
        handles = source.types.count("handle")
        if handles != len(verdict.kernel.buffers):
            verdict.problems.append(
                f"{len(verdict.kernel.buffers)} buffers in its MSL, {handles} in its launch"
            )
    if types:
        _check_types([v for v in verdicts if v.kernel is not None])
    return verdicts


def _check_types(verdicts: Iterable[Verdict]) -> None:
    """One run of the compiler for all; only when it fails, one for each."""
    checked = [(v, v.kernel) for v in verdicts if v.kernel is not None]
    names = [k.name for _, k in checked]
    whole = [k for _, k in checked]
    if len(set(names)) == len(names) and not type_check(unit(whole, Mode.CHECKED)):
        return
    for verdict, kernel in checked:
        message = type_check(unit([kernel], Mode.CHECKED))
        if message:
            verdict.problems.append(f"does not compile:\n{message}")
