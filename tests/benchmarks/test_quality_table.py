"""benchmarks/quality_table.py: its Q4_0 is the package gguf's, and its page keeps what is around
the tables."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_model import CHECKPOINT

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quality_table
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from mlc_compile.models import load_model
from mlc_compile.runtime.quality_build import parse_entries
from mlc_compile.weights.checkpoint import open_checkpoint


@pytest.mark.parametrize("pure", [True, False])
def test_q4_0_of_a_checkpoint(pure: bool, tmp_path: Path) -> None:
    source = open_checkpoint(CHECKPOINT)
    model = load_model(source.config, where="tiny")
    ggml = quality_table.Ggml(None)
    path, label, nbytes = quality_table.q4_0(source, model, tmp_path, ggml, pure=pure)
    made = open_checkpoint(path)
    assert set(made.tensors) == set(source.tensors)
    q4, q8 = GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0
    # The embedding is the output head too; without Q6_K it takes Q8_0, and the label says so.
    kinds: dict[str, Any] = {"model.embed_tokens.weight": q4 if pure else q8}
    assert label == ("llama.cpp Q4_0 --pure" if pure else "llama.cpp Q4_0, output Q8_0")
    total = 0
    for name in source.tensors:
        weight = np.asarray(source.read(name), np.float32)
        if weight.ndim == 2:
            blocks = quantize(weight, kinds.get(name, q4))
            total += blocks.nbytes
            weight = dequantize(blocks, kinds.get(name, q4))
        else:
            total += weight.nbytes
        np.testing.assert_array_equal(made.read(name), weight, err_msg=name)
    assert nbytes == total


def test_every_scheme_and_every_rule_are_in_the_table() -> None:
    names = quality_table.entries()
    assert len(parse_entries(",".join(names))) == len(names)
    rules = {name.partition("+")[2] for name in names if name.startswith("q4f16_1+")}
    assert {"calibrate", "mse"} <= rules
    assert set(quality_table.SCHEMES) <= set(names)


def test_the_page_keeps_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    text = quality_table.PAGE.read_text("utf-8")
    page.write_text(text, "utf-8")
    monkeypatch.setattr(quality_table, "PAGE", page)
    quality_table.write_page({"a": {"markdown": ["| a |"]}, "b": {"markdown": ["| b |"]}})
    once = page.read_text("utf-8")
    begin = text.index(quality_table.BEGIN)
    assert once[:begin] == text[:begin] and once.endswith(text[text.index(quality_table.END) :])
    assert "| a |\n| b |" in once
    quality_table.write_page({"a": {"markdown": ["| a |"]}, "b": {"markdown": ["| b |"]}})
    assert page.read_text("utf-8") == once


def test_texts_for_calibration_are_not_scored() -> None:
    texts = quality_table.TEXTS
    for kind in ("docs", "prose"):
        held, other = ((texts / f"{kind}_{x}.txt").read_text() for x in ("held_out", "calibration"))
        paragraphs = {p for p in held.split("\n\n") if len(p) > 60}
        assert paragraphs and not paragraphs & set(other.split("\n\n"))
