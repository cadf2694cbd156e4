"""A tiny configuration on disk, for tests of the compiler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlc_compile.chat_config import COMPILE_KEYS
from mlc_compile.compiler.inputs import CompileInputs, load_inputs
from mlc_compile.targets.profile import get_target

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SIZES = {
    "context_window_size": 128,
    "sliding_window_size": -1,
    "attention_sink_size": -1,
    "prefill_chunk_size": 32,
    "max_batch_size": 2,
    "tensor_parallel_shards": 1,
}
assert set(SIZES) == set(COMPILE_KEYS)
RAW_TEMPLATE: dict[str, Any] = {
    "name": "raw",
    "system_template": "",
    "system_message": "",
    "roles": {"user": "", "assistant": ""},
    "role_templates": {"user": "{user_message}", "assistant": "{assistant_message}"},
    "messages": [],
    "seps": [""],
    "role_content_sep": "",
    "role_empty_sep": "",
    "stop_str": [],
    "stop_token_ids": [],
}


def write_config(
    folder: Path,
    model_type: str = "llama",
    quantization: str = "q4f16_1",
    sizes: dict[str, int] | None = None,
    **config: Any,
) -> Path:
    """Write a mlc-chat-config.json into `folder`; keywords go over the defaults."""
    model_config = {**BASE, "model_type": model_type, **config}
    document = {
        "version": "0.1.0",
        "model_type": model_type,
        "quantization": quantization,
        "model_config": model_config,
        "vocab_size": model_config["vocab_size"],
        "active_vocab_size": model_config["vocab_size"],
        **SIZES,
        **(sizes or {}),
        "conv_template": RAW_TEMPLATE,
    }
    (folder / "mlc-chat-config.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def read_inputs(folder: Path, target: str = "cpu", **overrides: int) -> CompileInputs:
    """What compiling `folder` for a target starts from."""
    return load_inputs(folder, get_target(target)[0], overrides)
