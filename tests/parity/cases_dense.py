"""Cases of Gemma, Cohere, OLMo, SmolLM3, EXAONE, Ministral, Phi and GLM; see
architecture_cases.py."""

from __future__ import annotations

from collections.abc import Mapping

from architecture_cases import Case
from cases_llama import SLIDING, WINDOW

# Four layers show every pattern of windows and rotation; a text of 70 is longer than three windows.
_MIXED = {"num_hidden_layers": 4, "sliding_window": 21}
_KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
_TIED = {"tie_word_embeddings": True}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(9)],
    "long_factor": [2.0 + 0.3 * i for i in range(9)],
}
_SCALED_BY_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 2.0},
}

CASES: Mapping[str, Case] = {
    "gemma": Case("gemma", {**_TIED, "head_dim": 40}),
    "gemma-biases": Case(
        "gemma",
        {
            "head_dim": 20,
            "attention_bias": True,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1.0,  # hidden states are far above the usual one
            "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0},
        },
    ),
    "gemma2": Case(
        "gemma2",
        {
            **_MIXED,
            **_TIED,
            "head_dim": 36,
            "query_pre_attn_scalar": 50,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma2-uncapped": Case(
        "gemma2",
        {
            **_MIXED,
            "head_dim": 24,
            "layer_types": _KINDS,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "rms_norm_eps": 1.0,
        },
    ),
    "gemma2-one-kind": Case(
        "gemma2",
        {
            **_TIED,
            "head_dim": 24,
            "sliding_window": 21,
            "layer_types": ["full_attention", "full_attention"],
            "attn_logit_softcapping": 4.0,
        },
    ),
    "gemma3_text": Case(
        "gemma3_text",
        {
            **_MIXED,
            **_TIED,
            "head_dim": 40,
            "sliding_window_pattern": 2,
            "query_pre_attn_scalar": 30,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3_text-scaled": Case(
        "gemma3_text",
        {
            **_MIXED,
            "head_dim": 20,
            "layer_types": _KINDS,
            "attention_bias": True,
            "rms_norm_eps": 1.0,
            "rope_parameters": _SCALED_BY_KIND,
        },
    ),
    "cohere": Case("cohere", {**_TIED, "logit_scale": 0.3}),
    "cohere-qk-norm": Case(
        "cohere",
        {"use_qk_norm": True, "attention_bias": True, "num_key_value_heads": 1, "head_dim": 20},
    ),
    "cohere2": Case("cohere2", {**_MIXED, **_TIED, "logit_scale": 0.3}),
    "cohere2-biases": Case(
        "cohere2",
        {**_MIXED, "layer_types": _KINDS, "head_dim": 20, "attention_bias": True},
    ),
    "olmo": Case("olmo", {"clip_qkv": 0.7}),
    "olmo-biases": Case("olmo", {**_TIED, "attention_bias": True, "num_key_value_heads": None}),
    "olmo2": Case("olmo2"),
    "olmo2-biases": Case(
        "olmo2",
        {**_TIED, "attention_bias": True, "num_key_value_heads": 1, "rope_parameters": _LLAMA3},
    ),
    "olmo3": Case("olmo3", {**_MIXED, "rope_scaling": _YARN}),
    "olmo3-other-layers": Case("olmo3", {**_MIXED, "layer_types": _KINDS, "attention_bias": True}),
    "smollm3": Case("smollm3", {**_TIED, "num_hidden_layers": 4}),
    "smollm3-window": Case(
        "smollm3",
        {
            **_MIXED,
            "use_sliding_window": True,
            "no_rope_layers": [1, 0, 0, 1],
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 20,
        },
    ),
    "exaone4": Case("exaone4", {**_MIXED, "rope_scaling": _LLAMA3, "head_dim": 20}),
    "exaone4-full": Case(
        "exaone4",
        {**_TIED, "sliding_window": None, "layer_types": ["full_attention", "full_attention"]},
    ),
    "ministral": Case("ministral", {**_MIXED, "layer_types": _KINDS, "head_dim": 40}),
    "ministral-one-kind": Case(
        "ministral", {**_TIED, "head_dim": 24, "sliding_window": 21}, WINDOW, SLIDING
    ),
    "phi": Case("phi", {"partial_rotary_factor": 0.4, "head_dim": 20}),
    "phi-qk-norm": Case("phi", {"qk_layernorm": True, "num_key_value_heads": None}),
    "phi3": Case(
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "rope_scaling": _LONGROPE,
            "original_max_position_embeddings": 64,
        },
    ),
    "phi3-short": Case(
        "phi3",
        {
            **_TIED,
            "partial_rotary_factor": 0.75,
            "rope_scaling": _LONGROPE,
            "original_max_position_embeddings": 192,
        },
    ),
    "phi3-window": Case("phi3", {"sliding_window": 21}, WINDOW, SLIDING),
    "glm": Case("glm", {"head_dim": 40}),
    "glm-whole-heads": Case(
        "glm", {**_TIED, "head_dim": 20, "attention_bias": False, "partial_rotary_factor": 1.0}
    ),
    "glm4": Case("glm4", {"head_dim": 36, "partial_rotary_factor": 0.5}),
}
