"""The command group: names, help, suggestions, errors as one line with the right exit code."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import click
import pytest
from click.testing import CliRunner, Result

from mlc_compile.cli import COMMANDS, main
from mlc_compile.errors import CheckFailedError, EnvironmentLacksError, InputError


def replace_command(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Make the command `name` raise `error`."""

    @click.command(name)
    def failing() -> None:
        raise error

    module = importlib.import_module(f"mlc_compile.cli.{name}")
    monkeypatch.setattr(module, "command", failing)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_that_parse(name: str, invoke: Callable[..., Result]) -> None:
    result = invoke(name, "--help")
    assert result.exit_code == 0
    assert "Examples:" in result.output
    command = main.get_command(click.Context(main), name)
    assert command is not None and command.epilog is not None
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    shown = [word for word in command.epilog.split() if word.startswith("-") and word != "-"]
    assert set(shown) <= flags
    assert f"mlc_compile {name}" in command.epilog


def test_group_help_lists_every_command_uncut(invoke: Callable[..., Result]) -> None:
    output = invoke("--help").output
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert f"  {name} " in output
    assert "..." not in output.partition("Commands:")[2]


def test_modules_are_the_commands() -> None:
    folder = Path(importlib.import_module("mlc_compile.cli").__file__ or "").parent
    public = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert public == set(COMMANDS)


def test_without_words_shows_help(invoke: Callable[..., Result]) -> None:
    assert invoke().output == invoke("--help").output


@pytest.mark.parametrize("name", ["convert_weight", "convert-weight", "gen-config"])
def test_names_take_dash_and_underscore(name: str, invoke: Callable[..., Result]) -> None:
    first = invoke(name, "--help").output.splitlines()[0]
    assert first.startswith(f"Usage: mlc_compile {name.replace('-', '_')} ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("complie", "compile"), ("convert-weights", "convert_weight"), ("verfy", "verify")],
)
def test_unknown_command_names_the_closest(
    typed: str, meant: str, shell: Callable[..., CompletedProcess[str]]
) -> None:
    result = shell(typed)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: no command '{typed}'; closest: {meant}; see `mlc_compile --help`\n"
    )


def test_unknown_command_without_a_neighbour_lists_all(invoke: Callable[..., Result]) -> None:
    result = invoke("xyzzy")
    assert result.exit_code == 2
    assert all(name in result.stderr for name in COMMANDS)


@pytest.mark.parametrize(
    "words",
    [
        ["--nonsense"],
        ["compile", "--nonsense"],
        ["compile"],
        ["run", ".", "--lib", "no/such/file", "-p", "x"],
        ["list", "weights"],
        ["list", "models", "-v", "-q"],
        ["inspect", __file__, "--check"],
        ["plan", ".", "--fit"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exit_2(
    words: list[str], invoke: Callable[..., Result]
) -> None:
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "--help`" in result.stderr


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            InputError("config.json: odd key", hint="remove it"),
            2,
            "config.json: odd key; remove it",
        ),
        (EnvironmentLacksError("no compiler\n  found"), 3, "no compiler found"),
        (CheckFailedError("NMSE 1e-3"), 1, "NMSE 1e-3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "out/x.bin"), 2, "Permission denied: out/x.bin"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_become_a_line_and_a_status(
    error: BaseException,
    status: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    invoke: Callable[..., Result],
) -> None:
    replace_command(monkeypatch, "list", error)
    result = invoke("list")
    assert result.exit_code == status
    assert result.stdout == ""
    assert result.stderr.strip() == f"error: {line}"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_command(monkeypatch, "list", KeyError("layer"))
    with pytest.raises(KeyError):
        CliRunner().invoke(main, ["list"], catch_exceptions=False)


def test_version_names_the_pair(shell: Callable[..., CompletedProcess[str]]) -> None:
    result = shell("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("mlc_compile 0.")
    assert "apache-tvm 0." in result.stdout and "apache-tvm-ffi 0." in result.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and pipes")
def test_interrupt_and_closed_pipe_of_a_real_process() -> None:
    # A command that waits stands in for a long one.
    code = (
        "import signal, time\n"
        # A run in the background (nohup) ignores Ctrl-C, and so would its children.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import mlc_compile.cli.list as module, click\n"
        "from mlc_compile.cli import main\n"
        "@click.command()\n"
        "def slow():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(30)\n"
        "module.command = slow\n"
        "main(['list'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors.strip() == "error: interrupted"

    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "mlc_compile.cli", "list", "targets", "--json"]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=20)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_reference_in_docs_has_every_command_and_option() -> None:
    # Not word for word: click's wording and wrapping change with its versions.
    docs = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
    sections = docs.read_text(encoding="utf-8").split("\n## ")[1:]
    assert [section.split()[0] for section in sections] == list(COMMANDS), "run `make docs`"
    for name, section in zip(COMMANDS, sections, strict=True):
        command = main.get_command(click.Context(main), name)
        assert command is not None
        options = [o for o in command.params if isinstance(o, click.Option)]
        assert all(flag in section for o in options for flag in o.opts), "run `make docs`"
        text = " ".join(section.split())
        assert all(" ".join((o.help or "").split()) in text for o in options), "run `make docs`"


def test_only_a_process_of_its_own_leaves_garbage_alone() -> None:
    code = (
        "import atexit, gc\n"
        "usual = gc.get_threshold()\n"
        "from mlc_compile.cli import main\n"
        "atexit.register(lambda: print('frozen', gc.get_freeze_count() > 0))\n"
        "for words in (['list', '--help'], None):\n"
        "    try: main(words)\n"
        "    except SystemExit: print('usual', gc.get_threshold() == usual)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    found = [line for line in output.splitlines() if line.startswith(("frozen", "usual"))]
    assert found == ["usual True", "usual False", "frozen True"]
