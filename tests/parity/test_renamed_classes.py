"""Every class of transformers under another name: found by structure, and proved."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_classes import rename
from test_architectures import CASES
from tiny_models import save_checkpoint

from mlc_compile.models.structure import identify
from mlc_compile.runtime.prove import prove
from mlc_compile.weights.checkpoint import open_checkpoint

NAMES = [
    name
    for name, case in CASES.items()
    # transformers writes GPT-NeoX's head under its published name for that model type alone.
    if case.twin is None and case.model_type != "gpt_neox"
]


@pytest.mark.parametrize("name", NAMES)
def test_renamed_class_is_found_and_proved(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    save_checkpoint(tmp_path, rename(case.model_type), config=case.config)
    checkpoint = open_checkpoint(tmp_path)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    found = prove(identify(checkpoint.config, shapes, where="model"), checkpoint.config)
    assert found.basis == "structure"
    model = found.chosen()
    assert model.label == "experimental"
    (candidate,) = (c for c in found.candidates if c.name == model.arch.name)
    assert case.model_type in (candidate.name, *candidate.equal)
