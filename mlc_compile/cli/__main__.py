"""`python -m mlc_compile.cli`: the console script without its installed wrapper."""

from __future__ import annotations

from mlc_compile.cli import main

main(prog_name="mlc_compile")
