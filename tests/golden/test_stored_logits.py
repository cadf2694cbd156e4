"""Stored logits of two tiny models: parity without torch, and a fixed point for what we compute.

The checkpoints come from numpy seeds, the logits from transformers (see make_golden.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from make_golden import HERE, MODELS, write_checkpoint
from tiny_models import Built, build, convert

from mlc_compile.errors import InputError
from mlc_compile.models import load_model
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.runtime import reference as reference_module
from mlc_compile.runtime.compare import THRESHOLDS, compare
from mlc_compile.runtime.golden import Golden, parameters_digest
from mlc_compile.runtime.reference import NumpyReference, stored_weights
from mlc_compile.runtime.verify import reference_rows, verify
from mlc_compile.weights.checkpoint import open_checkpoint

models = pytest.mark.parametrize("name", MODELS)


def test_every_file_has_its_model_and_is_small() -> None:
    files = sorted(HERE.glob("*.npz"))
    assert [file.stem for file in files] == sorted(MODELS)
    assert all(file.stat().st_size < 100_000 for file in files)


@models
def test_checkpoint_and_conversion_give_the_same_bytes_everywhere(
    name: str, tmp_path: Path
) -> None:
    golden = Golden.read(HERE / f"{name}.npz")
    convert(write_checkpoint(name, tmp_path / "source"), "q0f32", tmp_path / "out", MODELS[name][1])
    assert parameters_digest(tmp_path / "out") == (golden.schema_id, golden.parameters)


@models
def test_numpy_reference_gives_the_stored_logits(name: str, tmp_path: Path) -> None:
    golden = Golden.read(HERE / f"{name}.npz")
    assert "transformers" in golden.reference and len(golden.rows) > 150
    source = open_checkpoint(write_checkpoint(name, tmp_path / "source"))
    model = load_model(source.config, where=name)
    convert(source.path, "q0f32", tmp_path / "out", MODELS[name][1])
    weights = stored_weights(model, get_scheme("q0f32"), tmp_path / "out")
    reference = NumpyReference(model, weights, golden.attention)
    found = reference_rows(reference, list(golden.rows))
    for context, row in golden.rows.items():
        assert compare(row, found[context].values, THRESHOLDS["float32"]).nmse < 1e-10
    prompt, continuation = golden.greedy.prompt, golden.greedy.continuation
    assert reference.greedy(prompt, len(continuation)) == list(continuation)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    name: str = request.param
    source = write_checkpoint(name, tmp_path_factory.mktemp("source"))
    return build(source, "q0f32", tmp_path_factory.mktemp(name), MODELS[name][1])


@pytest.mark.parametrize(
    ("built", "skipped"),
    [
        ("llama", {"window_wrap"}),
        pytest.param("mistral_window", {"full_context", "fork"}, marks=pytest.mark.slow),
    ],
    indirect=["built"],
)
def test_library_gives_the_stored_logits(
    built: Built, skipped: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither torch nor transformers nor the checkpoint is needed."""
    monkeypatch.setattr(reference_module, "transformers_missing", lambda: ["torch", "transformers"])
    name = next(n for n in MODELS if built.directory.name.startswith(n))
    file = HERE / f"{name}.npz"
    report = verify(built.directory, built.library, file)
    print(report.to_text())
    assert report.failures == []
    assert {s.name for s in report.scenarios if s.skipped} == skipped
    assert report.reference.startswith(f"{name}.npz, by transformers")

    # Fewer steps are asked for, or stored, than the other has.
    few = verify(built.directory, built.library, file, decode_steps=9)
    assert few.failures == []
    assert next(len(s.deviations) for s in few.scenarios if s.name == "decode") == 10
    more = verify(built.directory, built.library, file, decode_steps=99)
    assert "64 decode steps, as many as are stored" in more.notes and more.failures == []

    # One stored logit changed by one in a thousand.
    golden = Golden.read(file)
    context = max(golden.rows, key=len)
    row = golden.rows[context]
    values = row.values.copy()
    values[np.argmax(values)] *= np.float32(1.001)
    rows = {**golden.rows, context: dataclasses.replace(row, values=values)}
    dataclasses.replace(golden, rows=rows).write(tmp_path / "changed.npz")
    changed = verify(built.directory, built.library, tmp_path / "changed.npz")
    assert changed.failures and changed.scenarios[0].failures(THRESHOLDS["float32"]) == []

    # Another model's logits.
    other = next(n for n in MODELS if n != name)
    with pytest.raises(InputError, match="made from other parameters"):
        verify(built.directory, built.library, HERE / f"{other}.npz")
