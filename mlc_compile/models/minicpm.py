"""MiniCPM: Llama with factors on embeddings, residuals and logits, and perhaps Mixtral's experts.
Orion: Llama with layer norms."""

from __future__ import annotations

import math
from dataclasses import replace

from mlc_compile.config import ConfigReader
from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import GroupedQuery, LayerNorm, SparseMLP
from mlc_compile.models.schema import ConfigSchema, Numbers, key
from mlc_compile.models.spec import Architecture

_EXPERT_NAMES = replace(
    HF_DECODER,
    experts_gate_up=("mlp.experts.{e}.w1", "mlp.experts.{e}.w3"),
    experts_down="mlp.experts.{e}.w2",
)


def _residual_scale(reader: ConfigReader) -> float:
    depth = reader.number("scale_depth", default=1.0)
    return depth / math.sqrt(reader.integer("num_hidden_layers"))


def _logits_scale(reader: ConfigReader) -> float:
    return reader.number("dim_model_base", default=1.0) / reader.integer("hidden_size")


def _variant(reader: ConfigReader, arch: Architecture) -> Architecture:
    """MiniCPM-MoE has the same class and model type."""
    if not reader.optional_integer("num_experts", low=0):
        return arch
    return replace(arch, mlp=SparseMLP(), names=(_EXPERT_NAMES, _EXPERT_NAMES.without("model.")))


MINICPM = Architecture(
    name="minicpm",
    hf_classes=("MiniCPMForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias"),
    schema=ConfigSchema(
        defaults={"tie_word_embeddings": True},
        fixed=(("sparse_config", (None,)),),
        ignored=("mup_denominator",),  # of the draft model beside it
        numbers=Numbers(
            embedding_scale=key("scale_emb"),
            residual_scale=_residual_scale,
            logits_scale=_logits_scale,
        ),
        experts={
            "count": "num_experts",
            "per_token": "num_experts_per_tok",
            "intermediate_size": "intermediate_size",
        },
    ),
    variant=_variant,
)

ORION = Architecture(
    name="orion",
    hf_classes=("OrionForCausalLM",),
    norm=LayerNorm(),
)
