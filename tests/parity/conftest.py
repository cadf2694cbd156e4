"""Checkpoints and libraries that are made once for each session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from architecture_cases import Case
from tiny_models import SIZES, Built, build, save_checkpoint

LLAMA = Case("llama")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The tiny checkpoint of a case; each is made once."""
    made: dict[str, Path] = {}

    def make(case: Case = LLAMA, seed: int = 0) -> Path:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        key = json.dumps([case.model_type, case.config, seed], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(case.model_type)
            made[key] = save_checkpoint(folder, case.model_type, seed, config=case.config)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A q0f32 library of the plain tiny llama."""
    return build(checkpoint(), "q0f32", tmp_path_factory.mktemp("q0f32"), SIZES)
