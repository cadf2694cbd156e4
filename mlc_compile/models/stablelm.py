"""StableLM: Llama with LayerNorm, whose heads rotate in part. Nemotron: likewise, with norms stored
less one and an MLP without gate."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import MLP, Block, GroupedQuery, HeadNorm, LayerNorm
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture

_STABLELM_NAMES = replace(
    HF_DECODER,
    q_norm="self_attn.q_layernorm.norms.{h}",
    k_norm="self_attn.k_layernorm.norms.{h}",
)

STABLELM = Architecture(
    name="stablelm",
    hf_classes=("StableLmForCausalLM",),
    attention=GroupedQuery(
        qkv_bias="use_qkv_bias",
        qk_norm=HeadNorm(
            norm=LayerNorm(bias=False), over="each_head", enabled="qk_layernorm", apart=True
        ),
    ),
    norm=LayerNorm(),
    block=Block(parallel="use_parallel_residual", shared_norm=True),
    schema=ConfigSchema(
        spelling={"rms_norm_eps": "layer_norm_eps"},
        defaults={
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 32,
            "partial_rotary_factor": 0.25,
        },
        partial_rotary=True,
    ),
    names=(_STABLELM_NAMES, _STABLELM_NAMES.without("model.")),
)

NEMOTRON = Architecture(
    name="nemotron",
    hf_classes=("NemotronForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias"),
    mlp=MLP(bias="mlp_bias"),
    norm=LayerNorm(add=1.0),
    schema=ConfigSchema(
        spelling={"rms_norm_eps": "norm_eps"},
        defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5},
        partial_rotary=True,
    ),
)
