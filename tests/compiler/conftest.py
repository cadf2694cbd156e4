"""Fixtures of the compiler's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from compiler_configs import write_config


@pytest.fixture
def config_dir(tmp_path: Path) -> Callable[..., Path]:
    """Makes a directory with a mlc-chat-config.json; see compiler_configs.write_config."""

    def make(model_type: str = "llama", quantization: str = "q4f16_1", **config: Any) -> Path:
        folder = tmp_path / f"{model_type}-{quantization}"
        folder.mkdir()
        return write_config(folder, model_type, quantization, **config)

    return make
