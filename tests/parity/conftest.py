"""Checkpoints and libraries that are made once for each session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SIZES, Built, build, save_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny checkpoint by model type and config.json changes; each is made once."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", **changes: Any) -> Path:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
        key = json.dumps([model_type, changes], sort_keys=True)
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(model_type), model_type, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_llama(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A q0f32 library of the plain tiny llama."""
    return build(checkpoint(), "q0f32", tmp_path_factory.mktemp("q0f32"), SIZES)
