"""`run`: text on stdout, numbers on stderr, one document with --json."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
from built_model import CONTEXT, built_model
from click.testing import CliRunner, Result

from mlc_compile.cli import main

PROMPT = "It was a dark night, and the ship"


@pytest.fixture
def words() -> list[str]:
    model = built_model()
    return ["run", str(model.directory), "--lib", str(model.library), "--max-tokens", "8"]


def test_text_on_stdout_and_speed_on_stderr(
    words: list[str], invoke: Callable[..., Result]
) -> None:
    result = invoke(*words, "-p", PROMPT, "--raw")
    assert result.exit_code == 0, result.output
    assert len(result.stdout.strip()) > 8
    assert "generated: 8 tokens" in result.stderr and "tok/s" in result.stderr
    quiet = invoke(*words, "-p", PROMPT, "--raw", "-q")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_json_is_one_document_with_the_same_text(
    words: list[str], invoke: Callable[..., Result]
) -> None:
    text = invoke(*words, "-p", PROMPT, "--raw").stdout
    document = json.loads(invoke(*words, "-p", PROMPT, "--raw", "--json").stdout)
    assert document["text"] + "\n" == text
    assert document["generated_tokens"] == 8
    assert document["finish"] == "length"
    assert document["decode_tokens_per_second"] > 0


def test_prompt_from_stdin_in_a_process_of_its_own(
    words: list[str], invoke: Callable[..., Result]
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlc_compile.cli", *words, "-p", "-", "--raw"],
        input=PROMPT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == invoke(*words, "-p", PROMPT, "--raw").stdout


def test_a_seed_fixes_what_is_sampled(words: list[str]) -> None:
    def text(seed: int) -> str:
        options = ["--temperature", "1.5", "--top-p", "0.95", "--seed", str(seed)]
        return CliRunner().invoke(main, [*words, "-p", PROMPT, "--raw", *options]).stdout

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_penalties_reach_the_sampler(words: list[str], invoke: Callable[..., Result]) -> None:
    longer = [*words, "--max-tokens", "40", "-p", PROMPT, "--raw", "--json"]
    plain = json.loads(invoke(*longer).stdout)["text"]
    for option, value in (
        ("--repetition-penalty", "1.5"),
        ("--presence-penalty", "2"),
        ("--frequency-penalty", "2"),
    ):
        assert json.loads(invoke(*longer, option, value).stdout)["text"] != plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "x", "--raw", "--system", "y"], "--system and --raw exclude each other"),
        (["-p", "and " * 400, "--raw"], f"context window holds {CONTEXT}"),
        (["-p", "x", "--top-p", "0"], "--top-p"),
        (["-p", "x", "--repetition-penalty", "0"], "--repetition-penalty"),
        ([], "--prompt"),
    ],
)
def test_wrong_usage_is_one_line(
    options: list[str], message: str, words: list[str], invoke: Callable[..., Result]
) -> None:
    result = invoke(*words, *options)
    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and message in line
