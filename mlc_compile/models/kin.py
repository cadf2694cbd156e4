"""Close kin of Llama: Granite (scaled in four places), Helium and ERNIE 4.5 (neighbours rotate
together), Seed-OSS (biases on q, k and v), Arcee (an MLP without gate), StarCoder2 (LayerNorm and
biases beside that)."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.llama import LLAMA
from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import MLP, GatedMLP, GroupedQuery, LayerNorm, Rotary
from mlc_compile.models.schema import ConfigSchema, Numbers, inverse, key, windowed
from mlc_compile.models.spec import Architecture

GRANITE = replace(
    LLAMA,
    name="granite",
    hf_classes=("GraniteForCausalLM",),
    schema=ConfigSchema(
        defaults={"rms_norm_eps": 1e-6},
        numbers=Numbers(
            embedding_scale=key("embedding_multiplier"),
            residual_scale=key("residual_multiplier"),
            logits_scale=inverse("logits_scaling"),
            attention_scale=key("attention_multiplier", 1.0),
        ),
    ),
)

HELIUM = replace(
    LLAMA,
    name="helium",
    hf_classes=("HeliumForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias"),
    positions=Rotary(interleaved=True),
    schema=ConfigSchema(
        defaults={
            "rms_norm_eps": 1e-8,
            "rope_theta": 1e5,
            "num_key_value_heads": 20,
            "head_dim": 128,
        }
    ),
)

ERNIE4_5 = Architecture(
    name="ernie4_5",
    hf_classes=("Ernie4_5ForCausalLM",),
    attention=GroupedQuery(qkv_bias="use_bias", out_bias="use_bias"),
    mlp=GatedMLP(bias="use_bias"),
    positions=Rotary(interleaved=True),
    schema=ConfigSchema(
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "tie_word_embeddings": True,
        }
    ),
)

SEED_OSS = Architecture(
    name="seed_oss",
    hf_classes=("SeedOssForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_out_bias"),
    mlp=GatedMLP(bias="mlp_bias"),
    schema=ConfigSchema(
        defaults={"attention_bias": True, "num_key_value_heads": 8, "head_dim": 128},
    ),
)

ARCEE = replace(
    LLAMA,
    name="arcee",
    hf_classes=("ArceeForCausalLM",),
    mlp=MLP(bias="mlp_bias"),
    schema=ConfigSchema(defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5}),
)

_STARCODER_NAMES = replace(HF_DECODER, up="mlp.c_fc", down="mlp.c_proj")

STARCODER2 = Architecture(
    name="starcoder2",
    hf_classes=("Starcoder2ForCausalLM",),
    attention=GroupedQuery(qkv_bias="use_bias", out_bias="use_bias"),
    mlp=MLP(bias="use_bias"),
    norm=LayerNorm(),
    schema=ConfigSchema(
        spelling={"rms_norm_eps": "norm_epsilon"},
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        fixed=(("norm_type", ("layer_norm",)), ("mlp_type", ("default",))),
        kinds=windowed,
    ),
    names=(_STARCODER_NAMES, _STARCODER_NAMES.without("model.")),
)
