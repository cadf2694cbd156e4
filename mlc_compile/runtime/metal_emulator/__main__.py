"""Report on the Metal kernels of a compiled library: limits and types of each.

    python -m mlc_compile.runtime.metal_emulator ARTEFACT…

ARTEFACT is a .so, .dylib, .a, .o or .tar that holds MSL text. Exit status: 0 when every kernel
passes, 1 when one does not, 2 for a file without Metal kernels, 3 without a C++ compiler.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlc_compile.errors import MlcError
from mlc_compile.runtime.metal_emulator.artefact import read_kernels
from mlc_compile.runtime.metal_emulator.limits import Limits, Verdict, check_kernels


def main(words: Sequence[str] | None = None) -> int:
    """The exit status; prints the report."""
    default = Limits()
    parser = argparse.ArgumentParser(
        prog="python -m mlc_compile.runtime.metal_emulator",
        description="Check limits and types of the Metal kernels in compiled libraries.",
        epilog="Extents of threads are arguments of a launch; they are checked when a kernel runs.",
    )
    parser.add_argument("artefact", type=Path, nargs="+", help=".so, .dylib, .a, .o or .tar")
    parser.add_argument(
        "--language",
        type=_version,
        default=default.language,
        metavar="X.Y",
        help="MSL version that the library is for (default: 3.0)",
    )
    parser.add_argument("--threadgroup-bytes", type=int, default=default.group_bytes, metavar="N")
    parser.add_argument("--no-types", action="store_true", help="check limits only: no compiler")
    options = parser.parse_args(words)
    limits = Limits(group_bytes=options.threadgroup_bytes, language=options.language)
    bad = False
    try:
        for path in options.artefact:
            for kernels in read_kernels(path):
                verdicts = check_kernels(kernels, limits, types=not options.no_types)
                print(table(str(path), verdicts))
                bad |= any(not v.ok for v in verdicts)
    except MlcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return int(bad)


def table(title: str, verdicts: Sequence[Verdict]) -> str:
    """One line for each kernel, then what is wrong with any, whole."""
    width = max([len(v.name) for v in verdicts] + [6])
    failed = [v for v in verdicts if not v.ok]
    lines = [
        f"{title}: {len(verdicts)} Metal kernels, {len(failed)} with problems",
        f"{'kernel':{width}}  threadgroup  buffers  by value  threads  verdict",
    ]
    for v in verdicts:
        k = v.kernel
        numbers = (k.group_bytes, k.highest_binding + 1, k.constant_bytes) if k else ("?",) * 3
        lines.append(
            f"{v.name:{width}}  {numbers[0]:>9} B  {numbers[1]:>7}  {numbers[2]:>6} B  "
            f"{v.axes or '-':>7}  {'ok' if v.ok else 'FAILS'}"
        )
    for v in failed:
        lines += ["", *(f"{v.name}: {problem}" for problem in v.problems)]
    return "\n".join(lines)


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


if __name__ == "__main__":
    sys.exit(main())
