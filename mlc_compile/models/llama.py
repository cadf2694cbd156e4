"""Llama, the reference decoder, and Mistral, which adds a window over every layer."""

from __future__ import annotations

from mlc_compile.models.spec import Architecture, ConfigSchema, GatedMLP, GroupedQuery

LLAMA = Architecture(
    name="llama",
    hf_classes=("LlamaForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias"),
    mlp=GatedMLP(bias="mlp_bias"),
)

MISTRAL = Architecture(
    name="mistral",
    hf_classes=("MistralForCausalLM",),
    schema=ConfigSchema(num_key_value_heads=8, window="always", sliding_window=4096),
)
