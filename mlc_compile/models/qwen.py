"""Qwen2 (and 2.5): biases on q, k and v. Qwen3: none, but norms on each head's q and k."""

from __future__ import annotations

from mlc_compile.models.spec import Architecture, ConfigSchema, GroupedQuery

_SCHEMA = ConfigSchema(num_key_value_heads=32, window="gated", sliding_window=4096)

QWEN2 = Architecture(
    name="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    attention=GroupedQuery(qkv_bias=True),
    schema=_SCHEMA,
)

QWEN3 = Architecture(
    name="qwen3",
    hf_classes=("Qwen3ForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=True),
    schema=ConfigSchema(num_key_value_heads=32, head_dim=128, window="gated", sliding_window=4096),
)
