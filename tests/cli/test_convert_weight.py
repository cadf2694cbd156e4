"""`convert_weight` and `inspect --check` as a user runs them, on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from click.testing import Result

TINY = str(Path(__file__).resolve().parents[2] / "examples" / "tiny_model")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_converts_checks_and_notices_damage(
    tmp_path: Path, shell: Callable[..., CompletedProcess[str]]
) -> None:
    out = tmp_path / "out"
    done = shell("convert_weight", TINY, "--quantization", "q4f16_1", "-o", str(out), "--json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), dict)
    # Not a terminal: progress is lines on stderr, which end with the last byte.
    assert "MB/s" in done.stderr.splitlines()[-1]

    checked = shell("inspect", str(out), "--check", "--json", "-q")
    assert (checked.returncode, checked.stderr) == (0, "")
    assert json.loads(checked.stdout)["integrity"]["ok"] is True

    shard = out / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    damaged = shell("inspect", str(out), "--check")
    assert damaged.returncode == 1
    assert "params_shard_0.bin" in damaged.stdout
    assert damaged.stderr.splitlines()[-1].startswith(f"error: {out} ")


def test_same_bytes_with_either_spelling_and_any_jobs(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    for name, jobs in (("convert_weight", "1"), ("convert-weight", "3")):
        words = (TINY, "--quantization", "q4f16_1", "-o", str(tmp_path / name), "--jobs", jobs)
        assert invoke(name, *words).exit_code == 0
    assert contents(tmp_path / "convert_weight") == contents(tmp_path / "convert-weight")


def test_dry_run_writes_nothing(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    out = tmp_path / "out"
    result = invoke("convert_weight", TINY, "--quantization", "q0f32", "-o", str(out), "--dry-run")
    assert result.exit_code == 0
    assert "q0f32" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--quantization", "q4f17_1"], "q4f16_1"),
        (["--quantization", "q4f16_1", "--model-type", "lama"], "llama"),
        (["--quantization", "q4f16_1", "--source-format", "gguf"], "gguf"),
    ],
    ids=["scheme", "model type", "source format"],
)
def test_bad_choices_name_a_better_one_and_leave_nothing(
    options: list[str], said: str, tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    result = invoke("convert_weight", TINY, "-o", str(tmp_path / "out"), *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_finished_conversion_is_replaced_only_when_asked(
    tmp_path: Path, invoke: Callable[..., Result]
) -> None:
    words = ("convert_weight", TINY, "-o", str(tmp_path), "--quantization")
    assert invoke(*words, "q4f16_1").exit_code == 0
    before = contents(tmp_path)
    refused = invoke(*words, "q0f16")
    assert refused.exit_code == 2
    assert "--overwrite" in refused.stderr
    assert contents(tmp_path) == before
    assert invoke(*words, "q0f16", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert contents(tmp_path) != before
