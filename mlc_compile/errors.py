"""Every user-facing error. Each carries what is wrong, where, and what to do, in one line.

The command line turns an `MlcError` into that one line on stderr and the class's exit code;
anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations


class MlcError(Exception):
    """Base of all errors a user can meet. `exit_code` is the process's exit status."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.message = message
        self.hint = hint


class InputError(MlcError):
    """Wrong usage or bad input (exit 2): a config key, a tensor, a file, an option."""


class EnvironmentLacksError(MlcError):
    """The machine lacks something (exit 3): a package, a compiler, a matching version."""

    exit_code = 3


class CheckFailedError(MlcError):
    """A check ran and its verdict is no (exit 1): parity, integrity, a quality gate."""

    exit_code = 1
