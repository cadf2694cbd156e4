"""Every user-facing error. Each carries what is wrong, where, and what to do, in one line.

The command line turns an `MlcError` into that one line on stderr and the class's exit code;
anything else is a bug of ours and keeps its traceback.

Messages quote files, which may be hostile: what is too long is cut, and what a terminal would obey
or an encoding refuse (control characters, lone surrogates) is shown as an escape.
"""

from __future__ import annotations

import re

_LONGEST = 6000
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029]")


def _shown(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 1000]} ... {text[-1000:]}"
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class MlcError(Exception):
    """Base of all errors a user can meet. `exit_code` is the process's exit status."""

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = _shown(message)
        self.hint = None if hint is None else _shown(hint)
        super().__init__(self.message if hint is None else f"{self.message}; {self.hint}")


class InputError(MlcError):
    """Wrong usage or bad input (exit 2): a config key, a tensor, a file, an option."""


class EnvironmentLacksError(MlcError):
    """The machine lacks something (exit 3): a package, a compiler, a matching version."""

    exit_code = 3


class CheckFailedError(MlcError):
    """A check ran and its verdict is no (exit 1): parity, integrity, a quality gate."""

    exit_code = 1
