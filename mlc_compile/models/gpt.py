"""GPT-2 and what was written like it: LayerNorm, biases, a plain MLP.

GPT-2, GPT-BigCode (StarCoder) and GPT-Neo have learned positions; in GPT-J and CodeGen neighbours
rotate together, and the MLP stands beside attention.
"""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.config import ConfigReader
from mlc_compile.models.names import GPT2_DECODER
from mlc_compile.models.options import MLP, Block, GroupedQuery, LayerNorm, Learned, Rotary
from mlc_compile.models.schema import (
    FULL,
    SLIDING,
    ConfigSchema,
    Kinds,
    Numbers,
    constant,
    times,
)
from mlc_compile.models.spec import Architecture

# GPT-2 itself was published without a prefix.
_NAMES = replace(GPT2_DECODER, transposed=True)
_BIGCODE_NAMES = replace(GPT2_DECODER, qkv_layout="grouped")
_NEO_NAMES = replace(
    GPT2_DECODER,
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    attention_out="attn.attention.out_proj",
)
_GPTJ_NAMES = replace(
    GPT2_DECODER,
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    attention_out="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
)
_CODEGEN_NAMES = replace(_GPTJ_NAMES, qkv=("attn.qkv_proj",), qkv_layout="sliced")


def _score_scale(reader: ConfigReader) -> float | None:
    """Scores may go without their usual scale."""
    return None if reader.flag("scale_attn_weights", default=True) else 1.0


_SCHEMA = ConfigSchema(
    spelling={
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    defaults={"hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
    derived={"intermediate_size": times("hidden_size", 4)},
    fixed=(("scale_attn_by_inverse_layer_idx", (False,)),),
    # the same maths in another order
    ignored=("n_ctx", "reorder_and_upcast_attn"),
    numbers=Numbers(attention_scale=_score_scale),
)

GPT2 = Architecture(
    name="gpt2",
    hf_classes=("GPT2LMHeadModel",),
    attention=GroupedQuery(qkv_bias=True, out_bias=True),
    mlp=MLP(),
    norm=LayerNorm(),
    positions=Learned(),
    schema=_SCHEMA,
    names=(_NAMES, _NAMES.without("transformer.")),
)

GPT_BIGCODE = replace(
    GPT2,
    name="gpt_bigcode",
    hf_classes=("GPTBigCodeForCausalLM",),
    schema=replace(
        _SCHEMA,
        defaults={**_SCHEMA.defaults, "hidden_act": "gelu_pytorch_tanh", "multi_query": True},
        derived={
            **_SCHEMA.derived,
            "num_key_value_heads": lambda raw: 1 if raw["multi_query"] is True else None,
        },
        fixed=(("multi_query", (True, False)),),
        # precision and buffers of an inference runner
        ignored=(
            "attention_softmax_in_fp32",
            "scale_attention_softmax_in_fp32",
            "inference_runner",
            "max_batch_size",
            "max_sequence_length",
            "pad_key_length",
            "pre_allocate_kv_cache",
            "validate_runner_input",
        ),
    ),
    names=(_BIGCODE_NAMES, _BIGCODE_NAMES.without("transformer.")),
)


def _neo_layers(reader: ConfigReader, layers: int) -> Kinds:
    """[[["global", "local"], 12]]: those two kinds in turn, twelve times."""
    kinds = {"global": FULL, "local": SLIDING}
    found: list[str] = []
    try:
        for names, count in reader.take("attention_types"):
            found += [kinds[name] for name in names] * int(count)
    except (KeyError, TypeError, ValueError) as error:
        raise reader.fail(
            "attention_types", "must be [[['global' or 'local', ...], n], ...]"
        ) from error
    listed = reader.optional_texts("attention_layers")
    if listed is not None and [kinds.get(name) for name in listed] != found:
        raise reader.fail("attention_layers", "and attention_types differ")
    if len(found) != layers:
        raise reader.fail("attention_types", f"makes {len(found)} layers of {layers}")
    return tuple(found)


GPT_NEO = replace(
    GPT2,
    name="gpt_neo",
    hf_classes=("GPTNeoForCausalLM",),
    attention=GroupedQuery(out_bias=True),
    schema=ConfigSchema(
        spelling={
            "num_hidden_layers": "num_layers",
            "num_attention_heads": "num_heads",
            "hidden_act": "activation_function",
            "rms_norm_eps": "layer_norm_epsilon",
            "sliding_window": "window_size",
        },
        defaults={**_SCHEMA.defaults, "sliding_window": 256},
        derived=_SCHEMA.derived,
        numbers=Numbers(attention_scale=constant(1.0)),
        kinds=_neo_layers,
    ),
    names=(_NEO_NAMES, _NEO_NAMES.without("transformer.")),
)

GPTJ = Architecture(
    name="gptj",
    hf_classes=("GPTJForCausalLM",),
    mlp=MLP(),
    norm=LayerNorm(),
    positions=Rotary(interleaved=True),
    block=Block(parallel=True, shared_norm=True),
    head_bias=True,
    schema=replace(
        _SCHEMA,
        defaults={"hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "rotary_dim": 64},
        # a tied head would keep a bias of its own
        fixed=(
            ("rotary", (True,)),
            ("scale_attn_weights", (True,)),
            ("tie_word_embeddings", (False,)),
        ),
        ignored=("n_ctx",),
        numbers=Numbers(),
        partial_rotary=True,
    ),
    names=(_GPTJ_NAMES,),
)

CODEGEN = replace(GPTJ, name="codegen", hf_classes=("CodeGenForCausalLM",), names=(_CODEGEN_NAMES,))
