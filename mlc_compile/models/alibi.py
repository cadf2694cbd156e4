"""Bloom and MPT, whose only positions are ALiBi's, and Falcon, which has that or rotary ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from mlc_compile.config import ConfigReader
from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.neox import MEGATRON_LAYER
from mlc_compile.models.options import MLP, Alibi, Block, GroupedQuery, LayerNorm
from mlc_compile.models.schema import ConfigSchema, Number, Numbers, key, times
from mlc_compile.models.spec import Architecture

_NAMES = replace(
    MEGATRON_LAYER,
    embed="transformer.word_embeddings",
    embed_norm="transformer.word_embeddings_layernorm",
    layer="transformer.h.{i}",
    final_norm="transformer.ln_f",
)

BLOOM = Architecture(
    name="bloom",
    hf_classes=("BloomForCausalLM",),
    attention=GroupedQuery(qkv_bias=True, out_bias=True),
    mlp=MLP(),
    norm=LayerNorm(),
    positions=Alibi(),
    embed_norm=True,
    schema=ConfigSchema(
        spelling={
            "hidden_size": "n_embed",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "seq_length",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        # the activation has no key; its tanh form is built in
        defaults={
            "hidden_act": "gelu_new",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
        derived={"intermediate_size": times("hidden_size", 4)},
        fixed=(("apply_residual_connection_post_layernorm", (False,)), ("n_inner", (None,))),
        # precision, and the order of sums
        ignored=(
            "attention_softmax_in_fp32",
            "bias_dropout_fusion",
            "masked_softmax_fusion",
            "offset_alibi",
            "pretraining_tp",
            "skip_bias_add",
            "skip_bias_add_qkv",
            "slow_but_exact",
        ),
    ),
    names=(_NAMES, _NAMES.without("transformer.")),
)

_MPT_NAMES = replace(
    HF_DECODER,
    embed="transformer.wte",
    layer="transformer.blocks.{i}",
    attention_norm="norm_1",
    qkv=("attn.Wqkv",),
    attention_out="attn.out_proj",
    mlp_norm="norm_2",
    up="ffn.up_proj",
    down="ffn.down_proj",
    final_norm="transformer.norm_f",
)

_ATTN_FIXED: Final[tuple[tuple[str, tuple[object, ...]], ...]] = (
    ("alibi", (True,)),
    # transformers' class, which we are proved by, does not read another
    ("alibi_bias_max", (8,)),
    ("attn_type", ("multihead_attention",)),
    ("prefix_lm", (False,)),
    ("qk_ln", (False,)),
)
_ATTN_NUMBERS: Final = ("clip_qkv", "softmax_scale")
# Of a dictionary that transformers 5 saves as if it were a model of its own.
_ATTN_IGNORED: Final = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attn_impl",
        "attn_pdrop",
        "attn_uses_sequence_id",
        "chunk_size_feed_forward",
        "dtype",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
        "transformers_version",
    }
)


def _attn(number: Number) -> Number:
    """A number of attn_config, whose other keys are checked."""

    def read(reader: ConfigReader) -> float | None:
        found = reader.optional_object("attn_config") or {}
        inner = ConfigReader(found, where=reader.where, prefix="attn_config.")
        for name, values in _ATTN_FIXED:
            inner.only(name, values)
        value = number(inner)
        inner.finish(ignorable=_ATTN_IGNORED | set(_ATTN_NUMBERS))
        return value

    return read


MPT = Architecture(
    name="mpt",
    hf_classes=("MptForCausalLM", "MPTForCausalLM"),
    mlp=MLP(bias=False),
    norm=LayerNorm(bias=False),
    positions=Alibi(),
    schema=ConfigSchema(
        spelling={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "max_position_embeddings": "max_seq_len",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={"hidden_act": "gelu", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        derived={"intermediate_size": times("hidden_size", 4)},
        fixed=(
            ("expansion_ratio", (4,)),
            ("logit_scale", (None,)),
            ("no_bias", (True,)),
            ("norm_type", ("low_precision_layernorm", "layernorm")),
        ),
        # learned positions give way to ALiBi
        ignored=(
            "emb_pdrop",
            "embedding_fraction",
            "init_config",
            "init_device",
            "learned_pos_emb",
            "tokenizer_name",
            "verbose",
        ),
        numbers=Numbers(
            attention_scale=_attn(key("softmax_scale")),
            clip_qkv=_attn(key("clip_qkv")),
        ),
    ),
    names=(_MPT_NAMES,),
)

_FALCON_NAMES = replace(_NAMES, embed_norm="")
_TWO_NORMS = replace(_FALCON_NAMES, attention_norm="ln_attn", mlp_norm="ln_mlp")


def _falcon_kv_heads(keys: Mapping[str, Any]) -> object:
    """Only the new decoder goes by `num_kv_heads`."""
    if keys["new_decoder_architecture"] is True:
        return keys.get("num_kv_heads")
    return 1 if keys["multi_query"] is True else None


def _falcon_variant(reader: ConfigReader, arch: Architecture) -> Architecture:
    """7B: one norm for attention and MLP; 40B: a norm for each; 11B: one again; RW: in sequence."""
    new, parallel = reader.flag("new_decoder_architecture"), reader.flag("parallel_attn")
    queries, alibi = reader.flag("multi_query"), reader.flag("alibi")
    if new and not parallel:
        raise reader.fail("parallel_attn", "is false; the new decoder architecture is parallel")
    if alibi and (new or queries):
        raise reader.fail(
            "alibi", "is true; it is built for heads with keys of their own only (multi_query)"
        )
    if alibi:  # saved all the same
        reader.take("rope_parameters"), reader.take("rope_scaling"), reader.take("rope_theta")
    reader.only("num_ln_in_parallel_attn", (None, 1, 2) if new else (None, 1))
    shared = not new or reader.take("num_ln_in_parallel_attn") == 1
    return replace(
        arch,
        positions=Alibi(rounded=True) if alibi else arch.positions,
        block=Block(parallel=parallel, shared_norm=parallel and shared),
    )


FALCON = Architecture(
    name="falcon",
    hf_classes=("FalconForCausalLM",),
    attention=GroupedQuery(qkv_bias="bias", out_bias="bias"),
    mlp=MLP(bias="bias"),
    norm=LayerNorm(),
    schema=ConfigSchema(
        spelling={
            "hidden_act": "activation",
            "intermediate_size": "ffn_hidden_size",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
            "multi_query": True,
            "new_decoder_architecture": False,
            "parallel_attn": True,
        },
        derived={
            "intermediate_size": times("hidden_size", 4),
            "num_key_value_heads": _falcon_kv_heads,
        },
        fixed=(("apply_residual_connection_post_layernorm", (False,)),),
        # said again by ffn_hidden_size; read above
        ignored=("ff_factor", "num_kv_heads"),
    ),
    names=(_FALCON_NAMES, _TWO_NORMS),
    variant=_falcon_variant,
)
