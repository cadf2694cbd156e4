"""InternLM: Llama with biases in attention, and a key of its own for scaled RoPE. InternLM2: q, k
and v in one tensor, grouped by KV head. InternLM3: Llama in another spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import GatedMLP, GroupedQuery
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture


def _scaling(keys: Mapping[str, Any]) -> object:
    """`rotary` in the spelling of `rope_scaling`."""
    rotary = keys.get("rotary") or {"type": "origin"}
    if rotary["type"] == "origin":
        return None
    return {"type": rotary["type"], "factor": rotary.get("scaling_factor", 1.0)}


def _theta(keys: Mapping[str, Any]) -> object:
    return (keys.get("rotary") or {}).get("base", 10000)


INTERNLM = Architecture(
    name="internlm",
    hf_classes=("InternLMForCausalLM",),
    attention=GroupedQuery(qkv_bias="bias", out_bias="bias"),
    schema=ConfigSchema(
        defaults={"bias": True},
        derived={"rope_scaling": _scaling, "rope_theta": _theta},
        ignored=("rotary",),
    ),
)

_INTERNLM2_NAMES = replace(
    HF_DECODER,
    embed="model.tok_embeddings",
    attention_norm="attention_norm",
    qkv=("attention.wqkv",),
    qkv_layout="grouped",
    attention_out="attention.wo",
    mlp_norm="ffn_norm",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
    lm_head="output",
)

INTERNLM2 = Architecture(
    name="internlm2",
    hf_classes=("InternLM2ForCausalLM",),
    attention=GroupedQuery(qkv_bias="bias", out_bias="bias"),
    schema=ConfigSchema(defaults={"bias": True}),
    names=(_INTERNLM2_NAMES, _INTERNLM2_NAMES.without("model.")),
)

INTERNLM3 = Architecture(
    name="internlm3",
    hf_classes=("InternLM3ForCausalLM", "LlamaForCausalLM"),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="mlp_bias"),
    mlp=GatedMLP(bias="mlp_bias"),
    schema=ConfigSchema(
        spelling={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
        defaults={"num_key_value_heads": 2, "head_dim": 128},
    ),
)
