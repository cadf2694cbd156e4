"""Qwen and Qwen2 (and 2.5): biases on q, k and v. Qwen3: none, but norms on each head's q and k."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.names import GPT2_DECODER
from mlc_compile.models.options import GroupedQuery, HeadNorm
from mlc_compile.models.schema import ConfigSchema, gated_window
from mlc_compile.models.spec import Architecture

_DEFAULTS = {"num_key_value_heads": 32, "sliding_window": 4096}

QWEN2 = Architecture(
    name="qwen2",
    hf_classes=("Qwen2ForCausalLM",),
    attention=GroupedQuery(qkv_bias=True),
    schema=ConfigSchema(defaults=_DEFAULTS, kinds=gated_window),
)

QWEN3 = Architecture(
    name="qwen3",
    hf_classes=("Qwen3ForCausalLM",),
    attention=GroupedQuery(
        qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=HeadNorm()
    ),
    schema=ConfigSchema(defaults={**_DEFAULTS, "head_dim": 128}, kinds=gated_window),
)

QWEN = Architecture(
    name="qwen",
    hf_classes=("QWenLMHeadModel",),
    attention=GroupedQuery(qkv_bias=True),
    schema=ConfigSchema(
        spelling={
            "head_dim": "kv_channels",
            "partial_rotary_factor": "rotary_pct",
            "rms_norm_eps": "layer_norm_epsilon",
            "rope_theta": "rotary_emb_base",
            # The first is that of gate and up together. Beyond seq_length attention depends on the
            # length of the text, which is not built.
            "both_intermediate_sizes": "intermediate_size",
            "extrapolated_positions": "max_position_embeddings",
        },
        derived={
            "intermediate_size": lambda keys: keys["both_intermediate_sizes"] // 2,
            "max_position_embeddings": lambda keys: keys["seq_length"],
        },
        fixed=(("no_bias", (True,)), ("scale_attn_weights", (True,))),
        ignored=(
            *("attn_dropout_prob", "bf16", "both_intermediate_sizes", "emb_dropout_prob"),
            *("extrapolated_positions", "fp16", "fp32", "onnx_safe", "seq_length"),
            *("softmax_in_fp32", "use_cache_kernel", "use_cache_quantization"),
            *("use_dynamic_ntk", "use_flash_attn", "use_logn_attn"),
        ),
        partial_rotary=True,
    ),
    names=(replace(GPT2_DECODER, gate_up=("mlp.w2", "mlp.w1")),),
)
