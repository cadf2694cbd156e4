"""Every registered architecture: compiled for cpu in float32, against transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_models import SIZES, build

from mlc_compile.models import ARCHITECTURES
from mlc_compile.runtime.verify import verify

# Smaller than every longer prompt, no multiple of a page, and not of the chunk.
WINDOW = {"sliding_window_size": 21, "prefill_chunk_size": 16, "max_batch_size": 3}
SMALL = {"context_window_size": 40, "prefill_chunk_size": 7, "max_batch_size": 1}

# name -> (model type, changes of config.json, sizes of the library, scenarios that are skipped)
FULL = frozenset({"window_wrap"})
SLIDING = frozenset({"full_context", "fork"})
CASES: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, int], frozenset[str]]] = {
    "llama": ("llama", {}, SIZES, FULL),
    "mistral": ("mistral", {"sliding_window": 21}, WINDOW, SLIDING),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, SIZES, FULL),
    "qwen3": ("qwen3", {"head_dim": 40}, SIZES, FULL),
}
MORE: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, int], frozenset[str]]] = {
    "llama-biases": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        SMALL,
        FULL | {"ragged_batch", "fork"},
    ),
    "llama-scaled": (
        "llama",
        {
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        SIZES,
        FULL,
    ),
    "llama-sinks": ("llama", {}, {**WINDOW, "attention_sink_size": 3}, frozenset({"full_context"})),
    "mistral-within-its-window": ("mistral", {"sliding_window": 192}, SIZES, FULL),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 0},
        WINDOW,
        SLIDING,
    ),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "head_dim": 16}, SIZES, FULL),
}


def test_every_architecture_has_a_case() -> None:
    assert {case[0] for case in CASES.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_library_equals_transformers(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model_type, changes, sizes, skipped = {**CASES, **MORE}[name]
    source = checkpoint(model_type, **changes)
    built = build(source, "q0f32", tmp_path / "out", sizes)
    report = verify(built.directory, built.library, source)
    print(report.to_text())
    assert report.failures == []
    assert {s.name for s in report.scenarios if s.skipped} == skipped
    expected = "numpy" if "attention_sink_size" in sizes else "transformers"
    assert report.reference.startswith(expected)
    assert report.parameters is not None
    assert report.parameters.exact == report.parameters.compared
    # Far below the thresholds, which leave room for models of many layers.
    assert max(s.worst("nmse") for s in report.scenarios) < 1e-9
    shutil.rmtree(tmp_path / "out")
