"""Llama, the reference decoder, Mistral, which adds a window over every layer, and Ministral, which
has one in some of them."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.options import GatedMLP, GroupedQuery
from mlc_compile.models.schema import ConfigSchema, listed, windowed
from mlc_compile.models.spec import Architecture

LLAMA = Architecture(
    name="llama",
    hf_classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias"),
    mlp=GatedMLP(bias="mlp_bias"),
)

MISTRAL = Architecture(
    name="mistral",
    hf_classes=("MistralForCausalLM",),
    schema=ConfigSchema(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096}, kinds=windowed
    ),
)

MINISTRAL = replace(
    MISTRAL,
    name="ministral",
    hf_classes=("MinistralForCausalLM",),
    schema=replace(MISTRAL.schema, kinds=listed),
)
