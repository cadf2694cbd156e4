"""`quality` through the command line: exit codes and printing with a report made by hand, refusals,
and (slowly) the whole of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_model import CHECKPOINT
from click.testing import Result

from mlc_compile.runtime import quality_command
from mlc_compile.runtime.quality_report import ModelQuality, QualityReport, ReferenceQuality
from mlc_compile.runtime.quality_stats import compare_logits, mean, perplexity, summarize

HELD_OUT = CHECKPOINT / "held_out.txt"
WORDS = ("quality", str(CHECKPOINT), "--reference", str(CHECKPOINT), "--text", str(HELD_OUT))


def made_report(gates: dict[str, float]) -> QualityReport:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((64, 30)).astype(np.float32)
    mine = base + rng.standard_normal((64, 30)).astype(np.float32) / 4
    found = compare_logits(base, mine, np.zeros(64, np.int32))
    return QualityReport(
        text="t.txt",
        text_sha256="0" * 64,
        text_bytes=1,
        text_tokens=128,
        window=128,
        windows=1,
        first_scored=65,
        scored=64,
        prefix=(),
        reference=ReferenceQuality(
            "ref", "q0f32", perplexity(found.base_nll), mean(found.base_nll), 4, 32.0, 1.0
        ),
        models=(ModelQuality("out4", "q4f16_1", summarize(found), 4, 4.5, 1.0, (("x", 0.1),)),),
        machine={},
        versions={},
        gates=gates,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests that the command makes; they are answered with `made_report`."""
    requests: list[Any] = []

    def measure(request: Any, *_: Any) -> tuple[QualityReport, list[str]]:
        requests.append(request)
        return made_report(dict(request.gates)), ["a note"]

    monkeypatch.setattr(quality_command, "measure", measure)
    return requests


def test_a_gate_that_is_missed_exits_1(asked: list[Any], invoke: Callable[..., Result]) -> None:
    kept = invoke(*WORDS, "--gate", "kld=5,top1=0.1")
    assert kept.exit_code == 0, kept.output
    missed = invoke(*WORDS, "--gate", "kld=1e-6,top1=0.1", "--json")
    assert missed.exit_code == 1
    assert "error: quality missed its gates: out4: mean KL divergence" in missed.stderr
    assert "top-1" not in missed.stderr
    # The result is printed all the same, and alone on stdout.
    assert len(json.loads(missed.stdout)["failures"]) == 1
    assert "a note" in missed.stderr
    assert asked[0].gates == {"kld": 5.0, "top1": 0.1}


def test_options_reach_the_library(asked: list[Any], invoke: Callable[..., Result]) -> None:
    words = ("--window", "64", "--max-tokens", "100", "--no-card", "--target", "cpu")
    result = invoke(*WORDS, *words)
    assert result.exit_code == 0, result.output
    assert "out4 (q4f16_1)" in result.stdout
    [request] = asked
    assert (request.window, request.max_tokens, request.card) == (64, 100, False)
    assert request.models == (CHECKPOINT,) and request.reference == CHECKPOINT


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gate", "kl=1"), "there is no 'kl'"),
        (("--schemes", "q4f16_1", "--calibrate", str(HELD_OUT)), "need each other"),
        (("-o", "x"), "-o is for --schemes"),
    ],
)
def test_wrong_usage_exits_2(
    words: tuple[str, ...], message: str, invoke: Callable[..., Result]
) -> None:
    result = invoke(*WORDS, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_one_command_compares_schemes(tmp_path: Path, invoke: Callable[..., Result]) -> None:
    """Every conversion, library and card; each better choice of scales is better in KL."""
    other = tmp_path / "other.txt"
    # The model's own domain, another part than what is scored.
    text = (CHECKPOINT.parents[1] / "benchmarks" / "texts" / "prose_calibration.txt").read_text()
    other.write_text(text[:20000])
    out = tmp_path / "out"
    words = ("quality", str(CHECKPOINT), "--text", str(HELD_OUT), "--window", "128", "-o", str(out))
    refused = invoke(*words, "--schemes", "q4f16_1+calibrate", "--calibrate", str(HELD_OUT))
    assert refused.exit_code == 2 and "is the text that is scored" in refused.stderr
    schemes = "q8f16_1,q4f16_1+absmax,q4f16_1+mse,q4f16_1+calibrate,q4f16_1+layers.0.*=q8f16_1"
    result = invoke(*words, "--schemes", schemes, "--calibrate", str(other), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["calibration"]["text"] == "other.txt"
    kld = {model["name"]: model["kld"]["value"] for model in report["models"]}
    names = schemes.split(",")
    assert list(kld) == names
    assert kld["q4f16_1+mse"] < kld["q4f16_1+absmax"]
    assert kld["q4f16_1+calibrate"] < kld["q4f16_1+absmax"]
    assert kld["q8f16_1"] < kld[names[-1]]
    sizes = {model["name"]: model["parameter_bytes"] for model in report["models"]}
    assert sizes["q4f16_1+mse"] == sizes["q4f16_1+absmax"] < sizes[names[-1]] < sizes["q8f16_1"]
    assert json.loads((out / "quality.json").read_text()) == report
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(folders) == len(names)
    for folder in folders:
        card = json.loads((folder / "quality.json").read_text())
        assert len(card["models"]) == 1 and (folder / "quality.md").is_file()
        # A card does not make the artefact a damaged one.
        assert invoke("inspect", str(folder), "--check").exit_code == 0
