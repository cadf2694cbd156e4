"""Every registered architecture: compiled for cpu in float32, against its reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from architecture_cases import SEEDS, TEXT
from every_model import CASES, FAMILIES, FIRST, HUGGING_FACE
from tiny_models import VOCAB, Built, build, convert, save_checkpoint, save_tokenizer
from tvm.target import Target

from mlc_compile.models import ARCHITECTURES, load_model
from mlc_compile.runtime.reference import Attention, NumpyReference, checkpoint_weights
from mlc_compile.runtime.verify import verify
from mlc_compile.targets.cpu import CPUBackend
from mlc_compile.weights.checkpoint import open_checkpoint

DECODE_STEPS = 44  # more than twice the window of the cases that have one
QUICK = ("llama", "qwen3")
# Beside the first case of each architecture: mechanisms that none of those brings into a library.
# The other variants differ in what numpy is compared on as well (runtime/test_reference.py: every
# case that transformers has), not in what is compiled.
VARIANTS = {
    "llama-biases",  # the smallest chunk and batch
    "llama-sinks",
    "gemma2-one-kind",  # soft-caps without windows
    "gemma3_text-scaled",  # a rotary table for each kind of layer, one of them scaled
    "cohere-qk-norm",
    "smollm3-window",  # windows in layers without rotation
    "mpt-clipped",
    "falcon-two-norms",
    "falcon-alibi",
    "mixtral-window",
}
COMPILED = [n for n in CASES if n in {*FIRST.values(), *VARIANTS} or n not in HUGGING_FACE]


def test_every_architecture_has_a_case() -> None:
    assert {case.model_type for case in CASES.values()} == set(ARCHITECTURES)
    assert sum(len(family.CASES) for family in FAMILIES) == len(CASES)
    assert {CASES[name].model_type for name in COMPILED} == set(ARCHITECTURES)
    assert set(COMPILED) > VARIANTS


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COMPILED]
)
def test_library_equals_reference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, chunks, ragged batches and decoding, with the weights of several seeds."""
    case = CASES[name]
    if name not in QUICK:
        # Graphs are what differs between architectures, and LLVM's own work is most of the time.
        optimized = CPUBackend.tvm_target
        monkeypatch.setattr(
            CPUBackend,
            "tvm_target",
            lambda *of: Target({**optimized(*of).export(), "opt-level": 0}),
        )
    built: Built | None = None
    for seed in SEEDS[:1] if name in QUICK else SEEDS:
        source = tmp_path / f"checkpoint{seed}"
        if case.twin is None:
            save_checkpoint(source, case.model_type, seed, config=case.config)
        else:
            source.mkdir()
            twin = case.twin(source, seed)
            save_tokenizer(source)
            _numpy_equals(source, twin, seed)
        if built is None:
            built = build(source, "q0f32", tmp_path / "out", case.sizes)
        else:
            convert(source, "q0f32", tmp_path / "out", case.sizes, overwrite=True)
        report = verify(built.directory, built.library, source, decode_steps=DECODE_STEPS)
        print(report.to_text())
        assert report.failures == []
        assert {s.name for s in report.scenarios if s.skipped} == case.skipped
        numpy = case.twin is not None or "attention_sink_size" in case.sizes
        assert report.reference.startswith("numpy" if numpy else "transformers")
        assert report.parameters is not None
        assert report.parameters.exact == report.parameters.compared
        # Far below the thresholds, which leave room for models of many layers.
        assert max(s.worst("nmse") for s in report.scenarios) < 1e-9


def _numpy_equals(source: Path, twin: object, seed: int) -> None:
    """Our decoder in numpy gives the twin's logits."""
    checkpoint = open_checkpoint(source)
    model = load_model(checkpoint.config, where=str(source))
    attention = Attention(window=model.config.sliding_window, sink=0, context=TEXT)
    own = NumpyReference(model, checkpoint_weights(model, checkpoint), attention)
    text = np.random.default_rng(seed).integers(0, VOCAB - 1, TEXT).tolist()
    expected = twin(text)
    found = own.logits(text, range(TEXT))
    assert np.square(found - expected).mean() / np.square(expected).mean() < 1e-9
