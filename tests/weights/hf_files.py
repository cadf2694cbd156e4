"""Tiny checkpoints and raw safetensors bytes for the reader tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def header_bytes(header: Any) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def st_bytes(arrays: dict[str, tuple[str, np.ndarray]]) -> bytes:
    """A valid file; arrays by name with the format's own dtype names."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, array) in arrays.items():
        raw = array.tobytes()
        header[name] = entry(dtype, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    return header_bytes(header) + data


def f32(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def make_dir(path: Path, files: dict[str, bytes], config: Any = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path
