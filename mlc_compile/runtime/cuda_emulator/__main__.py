"""Compile a test program of CUDA kernels for the emulated device.

    python -m mlc_compile.runtime.cuda_emulator test.cu -o test [-I FOLDER]… [--arch 80]

The program launches with `emulate(grid, block, shared_bytes, [&] { kernel(…); })` where
MLC_CUDA_EMULATOR is defined. Environment of the program: MLC_EMU_RACES=1 searches for races,
MLC_EMU_SEED=N runs threads in another order.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlc_compile.errors import MlcError
from mlc_compile.runtime.cuda_emulator.native import build_program


def main(words: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m mlc_compile.runtime.cuda_emulator",
        description="Compile a test program of CUDA kernels for the emulated device.",
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("-o", dest="output", type=Path, required=True)
    parser.add_argument("-I", dest="folders", type=Path, action="append", default=[])
    parser.add_argument("-D", dest="defines", action="append", default=[])
    parser.add_argument("--arch", type=int, default=80, help="75, 80 or 90 (default: 80)")
    options = parser.parse_args(words)
    try:
        build_program(
            options.source,
            options.output,
            folders=options.folders,
            arch=options.arch,
            options=[f"-D{d}" for d in options.defines],
        )
    except MlcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
