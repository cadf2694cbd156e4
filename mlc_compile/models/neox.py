"""GPT-NeoX (Pythia, the first StableLM): rotary positions in part of a head, attention and MLP side
by side with a norm each. Persimmon: the same parts one after the other, and norms of q and k.
"""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.names import HF_DECODER, NameTable
from mlc_compile.models.options import MLP, Block, GroupedQuery, HeadNorm, LayerNorm
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture

MEGATRON_LAYER = replace(
    HF_DECODER,
    qkv=("self_attention.query_key_value",),
    qkv_layout="grouped",
    attention_out="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)
"""How Megatron calls the parts of a layer; Bloom and Falcon do too."""

_NEOX_NAMES: NameTable = replace(
    MEGATRON_LAYER,
    embed="gpt_neox.embed_in",
    layer="gpt_neox.layers.{i}",
    qkv=("attention.query_key_value",),
    attention_out="attention.dense",
    final_norm="gpt_neox.final_layer_norm",
    lm_head="embed_out",
)
_PERSIMMON_NAMES = replace(
    MEGATRON_LAYER,
    qkv=("self_attn.query_key_value",),
    attention_out="self_attn.dense",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    final_norm="model.final_layernorm",
)

GPT_NEOX = Architecture(
    name="gpt_neox",
    hf_classes=("GPTNeoXForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias"),
    mlp=MLP(),
    norm=LayerNorm(),
    block=Block(parallel="use_parallel_residual"),
    schema=ConfigSchema(
        spelling={
            "rms_norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "partial_rotary_factor": "rotary_pct",
        },
        defaults={
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "attention_bias": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.25,
        },
        ignored=("attention_probs_dropout_prob", "hidden_dropout_prob"),
        partial_rotary=True,
    ),
    names=(_NEOX_NAMES,),
)

PERSIMMON = Architecture(
    name="persimmon",
    hf_classes=("PersimmonForCausalLM",),
    attention=GroupedQuery(
        qkv_bias=True,
        out_bias=True,
        qk_norm=HeadNorm(norm=LayerNorm(), enabled="qk_layernorm"),
    ),
    mlp=MLP(),
    norm=LayerNorm(),
    schema=ConfigSchema(
        spelling={"rms_norm_eps": "layer_norm_eps"},
        defaults={
            "hidden_act": "relu2",
            "rms_norm_eps": 1e-5,
            "qk_layernorm": True,
            "partial_rotary_factor": 0.5,
        },
        # no norm goes by that epsilon, which the published file has beside the other
        ignored=("rms_norm_eps",),
        partial_rotary=True,
    ),
    names=(_PERSIMMON_NAMES,),
)
