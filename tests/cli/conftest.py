"""How CLI tests run a command: in this process, or as a user's shell does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from mlc_compile.cli import main


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Run `mlc_compile WORDS…` in this process."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, list(words))

    return run


@pytest.fixture
def shell() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `mlc_compile WORDS…` in a process of its own."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlc_compile.cli", *words],
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run
