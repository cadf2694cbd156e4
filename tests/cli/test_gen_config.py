"""`gen_config` as a user runs it, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

TINY = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_model")
WORDS = ("gen_config", TINY, "--quantization", "q4f16_1", "-o")


def test_numbers_reach_the_file_and_defaults_are_said(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    result = invoke(*WORDS, str(tmp_path), "--prefill-chunk-size", "64", "--json")
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "mlc-chat-config.json").read_text(encoding="utf-8"))
    assert config["prefill_chunk_size"] == 64
    assert config["quantization"] == "q4f16_1"
    report = json.loads(result.stdout)
    assert {Path(file).name for file in report["files"]} == {p.name for p in tmp_path.iterdir()}
    assert report["notes"] == result.stderr.splitlines()
    # What was asked for needs no explanation; what was chosen does.
    assert not any(note.startswith("prefill_chunk_size") for note in report["notes"])
    assert any(note.startswith("max_batch_size") for note in report["notes"])


def test_a_configuration_is_replaced_only_when_asked(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    assert invoke(*WORDS, str(tmp_path)).exit_code == 0
    refused = invoke(*WORDS, str(tmp_path), "--max-batch-size", "1")
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr.splitlines()[-1]
    assert invoke(*WORDS, str(tmp_path), "--max-batch-size", "1", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--max-batch-size", "0"],
        ["--context-window-size", "1000000000"],
        ["--conv-template", "no-such-template"],
    ],
    ids=" ".join,
)
def test_impossible_choices_leave_nothing(
    options: list[str], tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    result = invoke(*WORDS, str(tmp_path / "out"), *options)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []
