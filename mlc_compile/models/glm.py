"""GLM-4 in transformers' own form: half of each head rotates, in neighbouring pairs. Of the models
of 2025 (glm4), attention and MLP also norm what they give. chatglm.py has the first form."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import Block, GroupedQuery, Rotary
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture

_NAMES = replace(HF_DECODER, gate_up=("mlp.gate_up_proj",))
_NORMED_NAMES = replace(
    _NAMES,
    attention_output_norm="post_self_attn_layernorm",
    mlp_output_norm="post_mlp_layernorm",
)

GLM = Architecture(
    name="glm",
    hf_classes=("GlmForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias"),
    positions=Rotary(interleaved=True),
    schema=ConfigSchema(
        defaults={
            "attention_bias": True,
            "head_dim": 128,
            "num_key_value_heads": 2,
            "partial_rotary_factor": 0.5,
        },
        partial_rotary=True,
    ),
    names=(_NAMES, _NAMES.without("model.")),
)

GLM4 = replace(
    GLM,
    name="glm4",
    hf_classes=("Glm4ForCausalLM",),
    block=Block(output_norms=True),
    names=(_NORMED_NAMES, _NORMED_NAMES.without("model.")),
)
