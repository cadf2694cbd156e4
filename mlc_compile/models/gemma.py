"""Gemma 1 to 3: norms whose stored weight lacks 1, embeddings times sqrt(hidden_size).

Gemma 2 norms what attention and MLP give as well, caps scores and logits and gives every other
layer a window. Gemma 3 norms q and k instead of capping, and its windowed layers have a RoPE base
of their own. All three say "gelu" and mean the tanh approximation.
"""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.names import SANDWICH_DECODER
from mlc_compile.models.options import Block, GatedMLP, GroupedQuery, HeadNorm, RMSNorm
from mlc_compile.models.schema import ConfigSchema, Numbers, every, key, number
from mlc_compile.models.spec import Architecture

_NORM = RMSNorm(add=1.0)
_ATTENTION = GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias")
_SCALE = number("hidden_size", 0.5)
_BOTH_WAYS = ("use_bidirectional_attention", (False, None))
_DEFAULTS = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

GEMMA = Architecture(
    name="gemma",
    hf_classes=("GemmaForCausalLM",),
    attention=_ATTENTION,
    mlp=GatedMLP("gelu_pytorch_tanh"),
    norm=_NORM,
    schema=ConfigSchema(
        defaults={
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 16,
            "tie_word_embeddings": True,
        },
        fixed=(
            ("hidden_act", ("gelu", "gelu_pytorch_tanh")),
            ("hidden_activation", ("gelu_pytorch_tanh", None)),
            _BOTH_WAYS,
        ),
        numbers=Numbers(embedding_scale=_SCALE),
    ),
)

GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    hf_classes=("Gemma2ForCausalLM",),
    block=Block(output_norms=True),
    schema=ConfigSchema(
        spelling={"hidden_act": "hidden_activation", "sliding_window": "sliding_window_size"},
        defaults={**_DEFAULTS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        fixed=(_BOTH_WAYS,),
        ignored=("cache_implementation",),
        numbers=Numbers(
            embedding_scale=_SCALE,
            attention_scale=number("query_pre_attn_scalar", -0.5),
            attention_softcap=key("attn_logit_softcapping"),
            logits_softcap=key("final_logit_softcapping"),
        ),
        kinds=every(None, 2),
    ),
    names=(SANDWICH_DECODER, SANDWICH_DECODER.without("model.")),
)

GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    hf_classes=("Gemma3ForCausalLM",),
    attention=replace(_ATTENTION, qk_norm=HeadNorm(_NORM)),
    schema=ConfigSchema(
        spelling={"hidden_act": "hidden_activation"},
        defaults={**_DEFAULTS, "rope_theta": 1e6, "rope_local_base_freq": 1e4},
        # The class reads this cap and applies it nowhere.
        fixed=(_BOTH_WAYS, ("attn_logit_softcapping", (None,))),
        ignored=("cache_implementation", "_sliding_window_pattern"),
        numbers=Numbers(
            embedding_scale=_SCALE,
            attention_scale=number("query_pre_attn_scalar", -0.5),
            logits_softcap=key("final_logit_softcapping"),
        ),
        kinds=every("sliding_window_pattern", 6),
        local_theta="rope_local_base_freq",
    ),
)
