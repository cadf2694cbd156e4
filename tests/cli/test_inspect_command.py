"""`inspect` through the command line: what it prints and how it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from built_model import built_model
from click.testing import Result


def test_library_as_text_and_json(invoke: Callable[..., Result]) -> None:
    library = built_model().library
    result = invoke("inspect", str(library))
    assert result.exit_code == 0, result.output
    assert "decode_tokens" in result.stdout
    document = json.loads(invoke("inspect", str(library), "--json").stdout)
    assert document["metadata"]["quantization"] == "q4f16_1"


def test_check_ends_with_1_and_says_what_differs(
    invoke: Callable[..., Result], tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(built_model().directory, copy)
    result = invoke("inspect", str(copy), "--check")
    assert result.exit_code == 0, result.output
    assert "as manifest.json says" in result.stdout
    (copy / "params_shard_0.bin").write_bytes(b"short")
    result = invoke("inspect", str(copy), "--check", "--json")
    assert result.exit_code == 1
    assert not json.loads(result.stdout)["integrity"]["ok"]
    assert "error: " in result.stderr and "manifest.json" in result.stderr


def test_wrong_usage(invoke: Callable[..., Result], tmp_path: Path) -> None:
    for words, message in (
        ([str(built_model().library), "--check"], "--check needs a directory"),
        ([str(tmp_path)], "manifest.json: is missing"),
        ([str(tmp_path / "nothing")], "does not exist"),
    ):
        result = invoke("inspect", *words)
        assert result.exit_code == 2
        assert message in result.stderr
