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
        ["--override", "lm_head=q8f16_1"],  # its output layer is the embedding
        ["--override", "layers.4.*=q8f16_1"],
        ["--override", "layers.0.*"],
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


def test_overrides_reach_the_file_and_the_plan(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    given = (
        "--override",
        "embed_tokens=q8f16_1,layers.0.*=q8f16_1",
        "--override",
        "layers.3.*=q0f16",
    )
    assert invoke(*WORDS, str(tmp_path / "out"), *given).exit_code == 0
    config = json.loads((tmp_path / "out" / "mlc-chat-config.json").read_text(encoding="utf-8"))
    pairs = [["embed_tokens", "q8f16_1"], ["layers.0.*", "q8f16_1"], ["layers.3.*", "q0f16"]]
    assert (config["quantization"], config["quantization_overrides"]) == ("q4f16_1", pairs)
    plans = [
        json.loads(invoke("plan", *words, "--json").stdout)["weights"]
        for words in (
            [str(tmp_path / "out")],
            [TINY, "--quantization", "q4f16_1", *given],
            [str(tmp_path / "out"), "--override", "embed_tokens=q4f16_1"],
            [TINY, "--quantization", "q4f16_1"],
        )
    ]
    assert plans[0] == plans[1] > plans[2] == plans[3]
    refused = invoke("plan", TINY, "--fit", "--budget", "4GiB", *given)
    assert refused.exit_code == 2 and "leave --quantization and --override out" in refused.stderr


def test_without_overrides_the_file_has_no_key_of_them(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    assert invoke(*WORDS, str(tmp_path)).exit_code == 0
    text = (tmp_path / "mlc-chat-config.json").read_text(encoding="utf-8")
    assert "override" not in text
