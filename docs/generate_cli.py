"""Print the reference of the command line (docs/cli.md) from the commands' own help.

`make docs` writes it; a test says when the file is out of date.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlc_compile.cli import COMMANDS, main

WIDTH = 96


def reference() -> str:
    """The whole of docs/cli.md."""
    return "\n".join(_sections())


def _sections() -> Iterator[str]:
    yield "# Command line"
    yield "\nWritten by `make docs` from `mlc_compile --help`; do not edit.\n"
    parent = main.make_context("mlc_compile", [], terminal_width=WIDTH)
    yield f"```text\n{main.get_help(parent)}\n```\n"
    for name in COMMANDS:
        command = main.get_command(parent, name)
        assert command is not None
        context = command.make_context(name, [], parent=parent, resilient_parsing=True)
        yield f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")
