"""OPT: learned positions whose table begins with two unused rows, ReLU."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.config import ConfigReader
from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import MLP, GroupedQuery, LayerNorm, Learned
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture

_NAMES = replace(
    HF_DECODER,
    embed="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    layer="model.decoder.layers.{i}",
    attention_norm="self_attn_layer_norm",
    attention_out="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    up="fc1",
    down="fc2",
    final_norm="model.decoder.final_layer_norm",
)


def _variant(reader: ConfigReader, arch: Architecture) -> Architecture:
    """Embeddings narrower than the hidden state (350M) are not built."""
    reader.only("word_embed_proj_dim", (None, reader.integer("hidden_size")))
    return arch


OPT = Architecture(
    name="opt",
    hf_classes=("OPTForCausalLM",),
    attention=GroupedQuery(qkv_bias="enable_bias", out_bias="enable_bias"),
    mlp=MLP(bias="enable_bias"),
    norm=LayerNorm(),
    positions=Learned(offset=2),
    schema=ConfigSchema(
        spelling={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={
            "hidden_act": "relu",
            "rms_norm_eps": 1e-5,
            "enable_bias": True,
            "tie_word_embeddings": True,
        },
        fixed=(
            ("do_layer_norm_before", (True,)),
            ("layer_norm_elementwise_affine", (True,)),
            ("_remove_final_layer_norm", (False,)),
        ),
        ignored=("activation_dropout", "dropout", "init_std", "layerdrop"),
    ),
    names=(_NAMES, _NAMES.without("model.")),
    variant=_variant,
)
