"""`bench` through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from built_model import built_model
from click.testing import Result


def test_json_and_progress(invoke: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlc_compile.runtime.bench.BANDWIDTH_BYTES", 32 << 20)
    model = built_model()
    words = ["bench", str(model.directory), "--lib", str(model.library), "--repeats", "1"]
    small = ["--prompt-tokens", "16", "--decode-tokens", "4", "--threads", "1"]
    result = invoke(*words, *small, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["threads"], report["prompt_tokens"], report["decode_tokens"]) == (1, 16, 4)
    assert report["decode_rate"] > 0 and report["bandwidth"] > 1e8
    assert "measure 1 of 1" in result.stderr
    # The folder stays out of what is written down and passed on.
    assert str(model.directory) not in result.stdout
