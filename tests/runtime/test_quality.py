"""The evaluator: which positions it scores, groups, refusals, and numbers against the numpy decoder
on the same weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_model import CHECKPOINT, built_model

from mlc_compile.errors import InputError
from mlc_compile.models import load_model
from mlc_compile.runtime import quality as module
from mlc_compile.runtime.quality import common_windows, quality, score
from mlc_compile.runtime.quality_build import (
    Builder,
    Entry,
    Subject,
    parse_entries,
    tensor_errors,
)
from mlc_compile.runtime.quality_command import Request, measure
from mlc_compile.runtime.quality_report import NO_PLOT, QualityReport, write_card
from mlc_compile.runtime.quality_stats import compare_logits, perplexity, summarize
from mlc_compile.runtime.reference import (
    Attention,
    NumpyReference,
    checkpoint_weights,
    stored_weights,
)
from mlc_compile.runtime.text_windows import Windows, cut, encode, read_text
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint

HELD_OUT = CHECKPOINT / "held_out.txt"
WINDOW = 128


def load(checkpoint: Checkpoint) -> Any:
    return load_model(checkpoint.config, where=str(checkpoint.path))


class Table:
    """A scorer whose logits after a token are a row of a table, and which keeps what it was fed."""

    def __init__(self, vocab: int, seed: int, block: int = 64) -> None:
        self.vocab, self.block = vocab, block
        rows = np.random.default_rng(seed).standard_normal((vocab, vocab))
        self.rows = rows.astype(np.float32)
        self.fed: list[list[int]] = []
        self.blocks: list[int] = []

    def begin(self, tokens: Sequence[int]) -> None:
        self.fed.append(list(tokens))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        self.fed[-1] += tokens
        self.blocks.append(len(tokens))
        return self.rows[list(tokens)]

    def end(self) -> None:
        self.fed[-1].append(-1)


def some_windows(count: int, size: int) -> Windows:
    tokens = np.random.default_rng(9).integers(0, 50, (count, size)).astype(np.int32)
    return Windows(tokens, (), count * size)


@pytest.mark.parametrize("size", [16, 17])
def test_scores_the_second_half_of_each_window(size: int) -> None:
    """llama.cpp: of n tokens, those at n // 2 + 1 to n - 1, each from what stands before it."""
    windows, base, mine = some_windows(3, size), Table(50, 0), Table(50, 1)
    [found], seconds = score(base, [mine], windows)
    before = windows.tokens[:, size // 2 : -1].reshape(-1)
    targets = windows.tokens[:, size // 2 + 1 :].reshape(-1)
    wanted = compare_logits(base.rows[before], mine.rows[before], targets)
    for f in dataclasses.fields(found):
        np.testing.assert_array_equal(getattr(found, f.name), getattr(wanted, f.name))
    # Every window is a text of its own; the last token is predicted and never read.
    assert mine.fed == base.fed == [[*row[:-1], -1] for row in windows.tokens.tolist()]
    assert len(seconds) == 2


def test_blocks_keep_to_the_smallest_chunk_and_change_nothing() -> None:
    windows = some_windows(2, 32)
    small, large = Table(50, 1, block=3), Table(50, 1)
    [one], _ = score(Table(50, 0), [large], windows)
    both, _ = score(Table(50, 0), [large, small], windows)
    assert max(small.blocks) == 3
    for found in both:
        np.testing.assert_array_equal(found.kld, one.kld)


# ------------------------------------------------------------------------------------- for real


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Subject]:
    """The bundled checkpoint as a reference, and q4f16_1 with the library that was built for it."""
    folder = tmp_path_factory.mktemp("quality")
    builder = Builder(folder, "cpu", WINDOW, load)
    built = built_model()
    return builder.given(CHECKPOINT, None), builder.given(built.directory, built.library)


@pytest.fixture(scope="module")
def report(subjects: tuple[Subject, Subject]) -> QualityReport:
    reference, mine = subjects
    return quality(reference, [mine], read_text(HELD_OUT), window=WINDOW)


def test_equals_the_numpy_decoder(subjects: tuple[Subject, Subject], report: QualityReport) -> None:
    """The same figures from float32 logits of our numpy decoder, whole windows at once. What
    float16 activations add to 4-bit weights is far below the figures' own errors."""
    reference, mine = subjects
    text = read_text(HELD_OUT)
    prefix, tokens = encode(reference.tokenizer, text, "here")
    windows = cut(prefix, tokens, WINDOW, where="here").tokens
    checkpoint = open_checkpoint(CHECKPOINT)
    weights = (
        checkpoint_weights(reference.model, checkpoint),
        stored_weights(mine.model, mine.scheme, mine.directory),
    )
    attention = Attention(None, 0, WINDOW)
    at = list(range(WINDOW // 2, WINDOW - 1))
    parts = []
    for window in windows:
        base, ours = (
            NumpyReference(reference.model, w, attention).logits(window.tolist(), at)
            for w in weights
        )
        parts.append((base, ours, window[WINDOW // 2 + 1 :]))
    base, ours, targets = (np.concatenate(x) for x in zip(*parts, strict=True))
    wanted = summarize(compare_logits(base, ours, targets))
    found = report.models[0].figures
    assert report.scored == len(targets) == len(windows) * 63
    expected = perplexity(compare_logits(base, base, targets).nll)
    assert report.reference.perplexity.value == pytest.approx(expected.value, rel=1e-5)
    assert found.perplexity.value == pytest.approx(wanted.perplexity.value, rel=2e-3)
    assert found.ln_ratio.value == pytest.approx(wanted.ln_ratio.value, abs=2e-3)
    assert found.kld.value == pytest.approx(wanted.kld.value, rel=0.02)
    assert found.kld_max == pytest.approx(wanted.kld_max, rel=0.1)
    assert found.top1.value == pytest.approx(wanted.top1.value, abs=0.02)
    assert found.rms_delta.value == pytest.approx(wanted.rms_delta.value, rel=0.02)
    assert 0.005 < found.kld.value < 0.2 and 0.7 < found.top1.value < 1


def test_sizes_are_those_of_the_manifest(report: QualityReport) -> None:
    manifest = json.loads((built_model().directory / "manifest.json").read_text())
    model = report.models[0]
    assert model.nbytes == manifest["parameter_bytes"]
    assert model.bits_per_weight == pytest.approx(manifest["effective_bits_per_weight"])
    # Of a checkpoint, its own tensors and not the float32 copy that runs.
    assert report.reference.bits_per_weight == pytest.approx(16, abs=0.01)


def test_ranking_of_tensors(subjects: tuple[Subject, Subject], report: QualityReport) -> None:
    reference, mine = subjects
    ranked = report.models[0].tensors
    assert [error for _, error in ranked] == sorted((e for _, e in ranked), reverse=True)
    checkpoint = open_checkpoint(CHECKPOINT)
    own = checkpoint_weights(reference.model, checkpoint)
    stored = stored_weights(mine.model, mine.scheme, mine.directory)
    assert len(ranked) == 17
    for name, error in ranked:
        a, b = stored[name].astype(np.float64), own[name].astype(np.float64)
        wanted = math.sqrt(((a - b) ** 2).sum() / (b**2).sum())
        assert error == pytest.approx(wanted, rel=1e-4), name
    layers = report.models[0].layers()
    assert {name for name, _ in layers} == {"embed_tokens", *(f"layers.{i}" for i in range(4))}


def test_recorded_errors_count_and_need_no_weights(subjects: tuple[Subject, Subject]) -> None:
    reference, mine = subjects
    tensors = [
        {**tensor, "relative_error": 0.25} if tensor["name"].endswith(".q_weight") else tensor
        for tensor in mine.manifest["tensors"]
    ]
    recorded = dataclasses.replace(mine, manifest={**mine.manifest, "tensors": tensors})
    unreadable = dataclasses.replace(reference, directory=Path("none"), checkpoint=None)
    assert {e.relative_error for e in tensor_errors(recorded, unreadable)} == {0.25}


def test_groups_give_the_same_figures(
    subjects: tuple[Subject, Subject], report: QualityReport
) -> None:
    reference, mine = subjects
    text = read_text(HELD_OUT)
    twice = quality(reference, [mine, mine], text, window=WINDOW, memory=1)
    for model in twice.models:
        assert model.figures == report.models[0].figures
    assert [len(g) for g in module._groups([mine] * 3, memory=2 * mine.nbytes)] == [2, 1]


def test_json_and_card(report: QualityReport, tmp_path: Path) -> None:
    gated = dataclasses.replace(report, gates={"kld": 1e-4, "top1": 0.5})
    assert len(gated.failures) == 1 and "mean KL divergence" in gated.failures[0]
    write_card(gated, tmp_path / "new")
    data = json.loads((tmp_path / "new" / "quality.json").read_text())
    assert data["schema"] == "mlc-compile.quality"
    assert data["failures"] == gated.failures
    assert data["text"]["name"] == "held_out.txt" and data["windows"]["prefix"] == [0]
    [model] = data["models"]
    assert model["kld"]["value"] == report.models[0].figures.kld.value
    assert set(model["curve"]) >= {"50", "99.9", "100"}
    text = (tmp_path / "new" / "quality.md").read_text()
    for name, _ in report.models[0].tensors[:10]:
        assert f"| {name} |" in text
    assert str(tmp_path) not in text and str(built_model().directory) not in text
    # The terminal's table has the same cells.
    for cell in report.models[0].cells():
        assert cell in gated.to_text() and cell in text


def test_plot(report: QualityReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    two = dataclasses.replace(report, models=report.models * 2)
    for name, what in (("one", report), ("two", two)):
        assert write_card(what, tmp_path / name) == ""
        first = (tmp_path / name / "quality.png").read_bytes()
        assert first.startswith(b"\x89PNG") and len(first) > 5000
        write_card(what, tmp_path / name)
        assert (tmp_path / name / "quality.png").read_bytes() == first


def test_without_matplotlib_one_line_says_so(
    report: QualityReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    (tmp_path / "quality.png").write_bytes(b"of an earlier run")
    assert write_card(report, tmp_path) == NO_PLOT
    assert "mlc-compile[plot]" in NO_PLOT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["quality.json", "quality.md"]


def test_a_card_that_cannot_be_written_is_an_error(report: QualityReport, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written: .*--no-card"):
        write_card(report, tmp_path / "file")


# ---------------------------------------------------------------------------------- wrong inputs


def test_mismatching_vocabularies_and_tokenizers(
    subjects: tuple[Subject, Subject], tmp_path: Path
) -> None:
    reference, mine = subjects
    text = read_text(HELD_OUT)
    config = dataclasses.replace(mine.model.config, vocab_size=4096)
    wide = dataclasses.replace(mine, model=dataclasses.replace(mine.model, config=config))
    with pytest.raises(InputError, match="has a vocabulary of 4096 tokens and the reference"):
        common_windows(reference, [wide], text, WINDOW, None)
    tokenizer = json.loads(mine.tokenizer)
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:100]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = dataclasses.replace(mine, directory=tmp_path)
    with pytest.raises(InputError, match=r"read held_out.txt differently \(\d+ and \d+ tokens"):
        common_windows(reference, [other], text, WINDOW, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps(json.loads(mine.tokenizer), indent=1))
    common_windows(reference, [other], text, WINDOW, None)  # the same in other bytes
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"there is no .*tokenizer.json; make it with"):
        common_windows(reference, [other], text, WINDOW, None)


def test_a_window_larger_than_the_library(subjects: tuple[Subject, Subject]) -> None:
    _, mine = subjects  # compiled for 256
    with pytest.raises(InputError, match="has room for 256 tokens, less than one window of 400"):
        module.EngineScorer(mine, 400)


def test_missing_parameters_and_a_quantised_reference(tmp_path: Path) -> None:
    built = built_model()
    for name in ("mlc-chat-config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((built.directory / name).read_bytes())
    request = Request(models=(tmp_path,), text=HELD_OUT, reference=built.directory)
    request = dataclasses.replace(request, reference_library=built.library, window=WINDOW)
    with pytest.raises(InputError, match=r"the reference .* is quantised \(q4f16_1\)"):
        measure(request, tmp_path, load)
    with pytest.raises(InputError, match=r"manifest\.json: is missing"):
        Builder(tmp_path, "cpu", WINDOW, load).given(tmp_path, built.library)


MODEL = (CHECKPOINT,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "there is no --reference"),
        ({"reference": CHECKPOINT, "output": Path("x")}, "-o is for --schemes"),
        ({"reference": CHECKPOINT, "calibrate": HELD_OUT}, "--calibrate is for --schemes"),
        ({"reference": CHECKPOINT, "libraries": (HELD_OUT,) * 2}, "2 libraries for 1 directories"),
        ({"schemes": "q4f16_1", "models": MODEL * 2}, "--schemes converts one MODEL, and 2"),
        ({"schemes": "q4f16_1", "libraries": MODEL}, "--schemes compiles its own libraries"),
        ({"schemes": "q4f16_1+calibrate"}, "need each other"),
        ({"schemes": "q4f16_1", "calibrate": HELD_OUT}, "need each other"),
        ({"schemes": "q4f16_1+calibrate", "calibrate": HELD_OUT}, "is the text that is scored"),
        ({"schemes": "q9"}, "unknown quantisation scheme 'q9'"),
        ({"schemes": "q4f16_1+best"}, "unknown option 'best'; options: absmax, signed, mse, "),
        ({"schemes": "q4f16_1, q4f16_1"}, "q4f16_1 is given twice"),
        ({"schemes": " , "}, "--schemes names no scheme"),
    ],
)
def test_options_that_do_not_go_together(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    request = dataclasses.replace(Request(models=MODEL, text=HELD_OUT), **changes)
    with pytest.raises(InputError) as caught:
        measure(request, tmp_path, load)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []  # before any work


def test_entries() -> None:
    [a, b] = parse_entries("q4f16_1+mse+calibrate, q4f16_1+lm_head=q8f16_1+layers.0-1.*=q8f16_1")
    assert a == Entry("q4f16_1+mse+calibrate", "q4f16_1", "mse", True, "")
    assert b.overrides == "lm_head=q8f16_1,layers.0-1.*=q8f16_1"
    assert "/" not in b.folder and "*" not in b.folder and a.folder == a.text
