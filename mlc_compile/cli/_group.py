"""The lazy command group, and the one place where an error becomes a line and an exit code.

- `-` and `_` are the same in command names; a misspelt name is answered with the closest ones.
- `MlcError` -> `error: …` on stderr and the error's exit code; wrong usage likewise, exit 2.
- Ctrl-C -> 130. A closed pipe ends quietly with 141, as the shell reports SIGPIPE, because
  exit 1 is reserved for "a check failed".
- Any other exception is a bug of ours and keeps its traceback.
- `main()` without arguments has the process for itself: it looks for garbage seldom, not while
  it imports, and not at its end, when Python would search all that is left several times.
"""

from __future__ import annotations

import atexit
import difflib
import gc
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mlc_compile.errors import MlcError

INTERRUPTED = 130
PIPE_CLOSED = 141

# Objects that come before garbage is looked for; the imports of a command make half as many.
_OBJECTS = 100_000


class CommandGroup(click.Group):
    """A click group whose commands live in modules `mlc_compile.cli.<name>`."""

    def __init__(self, *args: Any, command_names: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command_names = tuple(command_names)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.command_names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = cmd_name.replace("-", "_")
        if name not in self.command_names:
            return None
        module = importlib.import_module(f"mlc_compile.cli.{name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None:
            near = difflib.get_close_matches(name.replace("-", "_"), self.command_names, n=3)
            known = near or self.command_names
            raise click.UsageError(
                f"no command '{name}'; {'closest' if near else 'known'}: {', '.join(known)}", ctx
            )
        return super().resolve_command(ctx, [name.replace("-", "_"), *args[1:]])

    def invoke(self, ctx: click.Context) -> Any:
        # Here and not in main(), because click's own main() takes a closed pipe for exit 1.
        try:
            result = super().invoke(ctx)
            # Otherwise a closed pipe would only be noticed, noisily, at interpreter exit.
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)

    def main(  # type: ignore[override]  # always standalone; click's overloads are wider
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run, then exit the process (SystemExit) with the status of the module docstring."""
        extra.pop("standalone_mode", None)
        if args is None:
            gc.set_threshold(_OBJECTS)
            atexit.register(gc.freeze)
        try:
            status = super().main(args, prog_name or "mlc_compile", standalone_mode=False, **extra)
        except MlcError as error:
            _fail(str(error), error.exit_code)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx is not None else "mlc_compile"
            message = error.format_message().rstrip(".")
            _fail(f"{message}; see `{where} --help`", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", INTERRUPTED)
        except OSError as error:
            # The machine's answer to a path the user named: no such file, no permission, disk full.
            if error.filename is None or error.strerror is None:
                raise
            _fail(f"{error.strerror}: {os.fspath(error.filename)!s}", 2)
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> NoReturn:
    """Print `message` as one line on stderr and exit with `status`."""
    click.echo("error: " + " ".join(message.split()), err=True)
    sys.exit(status)


def print_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Callback of `--version`: our version and those of the pinned pair, then exit."""
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    from mlc_compile.compiler.tvm_pair import PINS

    parts = ", ".join(f"{package} {of(package)}" for package in PINS)
    click.echo(f"mlc_compile {of('mlc-compile')} ({parts}, Python {sys.version.split()[0]})")
    ctx.exit()
