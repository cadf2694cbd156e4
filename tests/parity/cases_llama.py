"""Cases of the Llama family; see architecture_cases.py."""

from __future__ import annotations

from collections.abc import Mapping

from architecture_cases import Case
from tiny_models import SIZES

# Smaller than every longer prompt, no multiple of a page, and not of the chunk.
WINDOW = {"sliding_window_size": 21, "prefill_chunk_size": 16, "max_batch_size": 3}
SMALL = {"context_window_size": 40, "prefill_chunk_size": 7, "max_batch_size": 1}
FULL = frozenset({"window_wrap"})
SLIDING = frozenset({"full_context", "fork"})

CASES: Mapping[str, Case] = {
    "llama": Case("llama"),
    "mistral": Case("mistral", {"sliding_window": 21}, WINDOW, SLIDING),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {"head_dim": 40}),
    "llama-biases": Case(
        "llama",
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        SMALL,
        FULL | {"ragged_batch", "fork"},
    ),
    "llama-scaled": Case(
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
    ),
    "llama-sinks": Case(
        "llama", {}, {**WINDOW, "attention_sink_size": 3}, frozenset({"full_context"})
    ),
    "mistral-within-its-window": Case("mistral", {"sliding_window": 192}, SIZES),
    "qwen2-window": Case(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 0},
        WINDOW,
        SLIDING,
    ),
    "qwen2-upper-window": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1}
    ),
    "qwen3-biases": Case("qwen3", {"attention_bias": True, "head_dim": 16}),
}
