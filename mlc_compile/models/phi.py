"""Phi 1 and 2: parallel layers under one LayerNorm, biases everywhere, heads that rotate in part.
Phi 3 and 4: Llama with fused projections, in part with a window, longrope and partial rotation."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import MLP, Block, GroupedQuery, HeadNorm, LayerNorm
from mlc_compile.models.schema import ConfigSchema, windowed
from mlc_compile.models.spec import Architecture

_PHI_NAMES = replace(
    HF_DECODER,
    attention_out="self_attn.dense",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    up="mlp.fc1",
    down="mlp.fc2",
    final_norm="model.final_layernorm",
)
_PHI3_NAMES = replace(HF_DECODER, qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))

PHI = Architecture(
    name="phi",
    hf_classes=("PhiForCausalLM",),
    attention=GroupedQuery(
        qkv_bias=True, out_bias=True, qk_norm=HeadNorm(LayerNorm(), enabled="qk_layernorm")
    ),
    mlp=MLP(),
    norm=LayerNorm(),
    block=Block(parallel=True, shared_norm=True),
    head_bias=True,
    schema=ConfigSchema(
        spelling={"rms_norm_eps": "layer_norm_eps"},
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
        fixed=(("tie_word_embeddings", (False,)),),
        partial_rotary=True,
    ),
    names=(_PHI_NAMES, _PHI_NAMES.without("model.")),
)

PHI3 = Architecture(
    name="phi3",
    hf_classes=("Phi3ForCausalLM",),
    schema=ConfigSchema(
        defaults={"original_max_position_embeddings": 4096},
        fixed=(
            ("attention_bias", (False,)),
            ("full_attn_mod", (1,)),
            ("interpolate_factor", (1,)),
            ("lm_head_bias", (False,)),
            ("mlp_bias", (False,)),
        ),
        kinds=windowed,
        partial_rotary=True,
        rope_kinds=("default", "longrope"),
    ),
    names=(_PHI3_NAMES, _PHI3_NAMES.without("model.")),
)
