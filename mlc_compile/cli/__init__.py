"""The command line, console script `mlc_compile`: parsing and printing, nothing else.

Each command is a module of this package named like the command. A module is imported when its
command runs (or when `--help` lists it) and imports only click at its top, so that help costs
a fraction of a second; the libraries are imported inside the command bodies.
"""

from __future__ import annotations

import click

from mlc_compile.cli._group import CommandGroup, print_version

# In the order of a user's work; `--help` keeps it.
COMMANDS = (
    "demo",
    "detect",
    "convert_weight",
    "gen_config",
    "compile",
    "package",
    "plan",
    "run",
    "verify",
    "quality",
    "inspect",
    "bench",
    "list",
)


@click.group(
    "mlc_compile",
    cls=CommandGroup,
    command_names=COMMANDS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 a check failed, 2 wrong usage or input, "
    "3 the environment lacks something, 130 interrupted.",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=print_version,
    help="Show the versions of mlc_compile and of its compiler packages, and exit.",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """Compile a language model ahead of time: quantise, configure, compile, verify, run.

    \b
    The usual order, for a Hugging Face directory or a GGUF file MODEL:
      mlc_compile convert_weight MODEL --quantization q4f16_1 -o out
      mlc_compile gen_config MODEL --quantization q4f16_1 -o out
      mlc_compile compile out --target cpu -o out/model.so
      mlc_compile verify out --lib out/model.so --reference MODEL
      mlc_compile run out --lib out/model.so -p "Once upon a time"

    Command names may be written with '-' or '_'. `mlc_compile COMMAND --help` has examples.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
