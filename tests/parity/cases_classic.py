"""Cases of GPT-2's kin, of ALiBi, and of Llama's close kin; see architecture_cases.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from architecture_cases import Case

# What TINY calls otherwise. transformers saves keys that a class has no use for, too.
_GPT: Mapping[str, Any] = {
    "hidden_size": ...,
    "intermediate_size": ...,
    "num_attention_heads": ...,
    "num_key_value_heads": ...,
    "num_hidden_layers": ...,
    "max_position_embeddings": ...,
    "n_embd": 96,
    "n_head": 4,
    "n_inner": 160,
    "n_layer": 2,
    "n_positions": 512,
}
_NEO: Mapping[str, Any] = {
    "num_attention_heads": ...,
    "num_key_value_heads": ...,
    "num_hidden_layers": ...,
    "num_heads": 4,
    "num_layers": 3,
    "attention_types": [[["global", "local", "local"], 1]],
    "window_size": 21,
}
# Each query head has its own k and v.
_MANY: Mapping[str, Any] = {"num_key_value_heads": ...}
# An intermediate size of four times the hidden one cannot be changed.
_FOURFOLD: Mapping[str, Any] = {**_MANY, "intermediate_size": ..., "hidden_size": 72}
_FALCON: Mapping[str, Any] = {**_MANY, "intermediate_size": ...}
_MPT: Mapping[str, Any] = {
    **_FOURFOLD,
    "hidden_size": ...,
    "num_attention_heads": ...,
    "num_hidden_layers": ...,
    "max_position_embeddings": ...,
    "d_model": 72,
    "n_heads": 6,
    "n_layers": 2,
    "max_seq_len": 512,
    "tie_word_embeddings": True,
}

CASES: Mapping[str, Case] = {
    "gpt2": Case("gpt2", {**_GPT, "tie_word_embeddings": True}),
    "gpt2-unscaled": Case(
        "gpt2", {**_GPT, "n_inner": None, "scale_attn_weights": False, "n_embd": 80}
    ),
    "gpt_bigcode": Case("gpt_bigcode", {**_GPT, "tie_word_embeddings": True}),
    "gpt_bigcode-many-kv-heads": Case(
        "gpt_bigcode", {**_GPT, "multi_query": False, "activation_function": "gelu"}
    ),
    "gpt_neo": Case("gpt_neo", _NEO),
    "gptj": Case("gptj", {**_GPT, "rotary_dim": 12}),
    "codegen": Case("codegen", {**_GPT, "n_head": 8, "rotary_dim": 6}),
    "gpt_neox": Case("gpt_neox", {**_MANY, "rotary_pct": 0.25}),
    "gpt_neox-sequential": Case(
        "gpt_neox",
        {
            **_MANY,
            "use_parallel_residual": False,
            "attention_bias": False,
            "rotary_pct": 0.5,
            "hidden_act": "gelu_fast",
        },
    ),
    "persimmon": Case("persimmon", {**_MANY, "rope_theta": 25000.0}),
    "persimmon-without-qk-norm": Case("persimmon", {**_MANY, "qk_layernorm": False}),
    "stablelm": Case("stablelm", {"use_qkv_bias": True, "num_attention_heads": 6}),
    "stablelm-parallel": Case(
        "stablelm",
        {"use_parallel_residual": True, "qk_layernorm": True, "partial_rotary_factor": 0.5},
    ),
    "nemotron": Case("nemotron", {"head_dim": 40}),
    "nemotron-biases": Case(
        "nemotron",
        {"attention_bias": True, "mlp_bias": True, "partial_rotary_factor": 1.0},
    ),
    "opt": Case("opt", {**_MANY, "intermediate_size": ..., "ffn_dim": 160}),
    "opt-without-biases": Case(
        "opt", {**_MANY, "intermediate_size": ..., "ffn_dim": 160, "enable_bias": False}
    ),
    "bloom": Case("bloom", {**_FOURFOLD, "num_attention_heads": 6, "tie_word_embeddings": True}),
    "bloom-2-heads": Case("bloom", {**_FOURFOLD, "num_attention_heads": 2}),
    "mpt": Case("mpt", _MPT),
    "mpt-clipped": Case(
        "mpt",
        {
            **_MPT,
            "n_heads": 4,
            "attn_config": {"clip_qkv": 1.0, "softmax_scale": 0.3},
        },
    ),
    "falcon": Case("falcon", {**_FALCON, "tie_word_embeddings": True}),
    "falcon-two-norms": Case(
        "falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    "falcon-one-norm": Case(
        "falcon",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "ffn_hidden_size": 160,
        },
    ),
    "falcon-alibi": Case(
        "falcon",
        {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
        # Past 256, bfloat16 has no room for every position.
        {"context_window_size": 320, "prefill_chunk_size": 100, "max_batch_size": 2},
    ),
    "helium": Case("helium", {"head_dim": 24, "num_attention_heads": 4}),
    "helium-biases": Case("helium", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    "granite": Case(
        "granite",
        {
            "attention_multiplier": 0.1,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
    "granite-biases": Case("granite", {"attention_bias": True, "mlp_bias": True}),
    "ernie4_5": Case("ernie4_5", {"head_dim": 20, "tie_word_embeddings": True}),
    "ernie4_5-biases": Case("ernie4_5", {"head_dim": 36, "use_bias": True}),
    "seed_oss": Case("seed_oss", {"head_dim": 40}),
    "seed_oss-biases": Case(
        "seed_oss",
        {
            "head_dim": 20,
            "attention_bias": False,
            "attention_out_bias": True,
            "mlp_bias": True,
        },
    ),
    "arcee": Case("arcee", {"attention_bias": True, "mlp_bias": True}),
    "starcoder2": Case("starcoder2", {"tie_word_embeddings": True}),
    "starcoder2-window": Case(
        "starcoder2",
        {"sliding_window": 21, "use_bias": False, "num_key_value_heads": 4},
        {"sliding_window_size": 21, "prefill_chunk_size": 16, "max_batch_size": 3},
        frozenset({"full_context", "fork"}),
    ),
}
