"""Cohere's Command R and Aya: parallel layers under one LayerNorm without bias, rotation of
neighbouring pairs, scaled logits. In Cohere 2 three of four layers have a window, and only those
rotate."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.options import Block, GroupedQuery, HeadNorm, LayerNorm, Rotary
from mlc_compile.models.schema import ConfigSchema, Numbers, every, number, windowed_layers
from mlc_compile.models.spec import Architecture

_NORM = LayerNorm(bias=False)
_ATTENTION = GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias")
_DEFAULTS = {"logit_scale": 0.0625, "tie_word_embeddings": True}

COHERE = Architecture(
    name="cohere",
    hf_classes=("CohereForCausalLM",),
    attention=replace(_ATTENTION, qk_norm=HeadNorm(_NORM, over="each_head", enabled="use_qk_norm")),
    norm=_NORM,
    positions=Rotary(interleaved=True),
    block=Block(parallel=True, shared_norm=True),
    schema=ConfigSchema(
        spelling={"rms_norm_eps": "layer_norm_eps"},
        defaults={**_DEFAULTS, "rope_theta": 5e5},
        ignored=("model_max_length",),
        numbers=Numbers(logits_scale=number("logit_scale")),
    ),
)

COHERE2 = replace(
    COHERE,
    name="cohere2",
    hf_classes=("Cohere2ForCausalLM",),
    attention=_ATTENTION,
    schema=ConfigSchema(
        spelling={"rms_norm_eps": "layer_norm_eps"},
        defaults={**_DEFAULTS, "sliding_window": 4096},
        # Remarks of the original implementation on what this class always does.
        fixed=(
            ("order_of_interleaved_layers", ("local_attn_first",)),
            ("position_embedding_type", ("rope_gptj",)),
            ("rotary_pct", (1.0,)),
            ("use_embedding_sharing", (True,)),
            ("use_gated_activation", (True,)),
            ("use_parallel_block", (True,)),
            ("use_qk_norm", (False,)),
        ),
        ignored=(
            "cache_implementation",
            "layer_switch",
            "model_max_length",
            "use_parallel_embedding",
        ),
        numbers=Numbers(logits_scale=number("logit_scale")),
        kinds=every("sliding_window_pattern", 4),
        rotates=windowed_layers,
    ),
)
