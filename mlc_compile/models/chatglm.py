"""ChatGLM2, ChatGLM3 and GLM-4 in their first form (class ChatGLMModel): the first half of each
head rotates, in neighbouring pairs."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import GroupedQuery, Rotary
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture

CHATGLM = Architecture(
    name="chatglm",
    hf_classes=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    attention=GroupedQuery(qkv_bias="add_qkv_bias"),
    positions=Rotary(interleaved=True),
    schema=ConfigSchema(
        spelling={
            "head_dim": "kv_channels",
            "intermediate_size": "ffn_hidden_size",
            "max_position_embeddings": "seq_length",
            "num_hidden_layers": "num_layers",
            "num_key_value_heads": "multi_query_group_num",
            "rms_norm_eps": "layernorm_epsilon",
            "vocab_size": "padded_vocab_size",
        },
        defaults={"multi_query_attention": False, "partial_rotary_factor": 0.5},
        derived={"rope_theta": lambda keys: 10000.0 * float(keys.get("rope_ratio") or 1)},
        fixed=(
            ("add_bias_linear", (False,)),
            ("apply_residual_connection_post_layernorm", (False,)),
            ("fp32_residual_connection", (False,)),
            ("interleaved_qkv", (False,)),
            ("multi_query_attention", (True,)),
            ("original_rope", (True,)),
            ("post_layer_norm", (True,)),
            ("pre_seq_len", (None,)),
            ("quantization_bit", (0, None)),
            ("rmsnorm", (True,)),
        ),
        ignored=(
            "apply_query_key_layer_scaling",  # divides before a product and multiplies after it
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "classifier_dropout",
            "prefix_projection",
            "rope_ratio",
        ),
        partial_rotary=True,
    ),
    names=(
        replace(
            HF_DECODER,
            embed="transformer.embedding.word_embeddings",
            layer="transformer.encoder.layers.{i}",
            qkv=("self_attention.query_key_value",),
            attention_out="self_attention.dense",
            gate_up=("mlp.dense_h_to_4h",),
            down="mlp.dense_4h_to_h",
            final_norm="transformer.encoder.final_layernorm",
            lm_head="transformer.output_layer",
        ),
    ),
)
