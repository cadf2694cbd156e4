"""EXAONE 3: Llama under other names. EXAONE 4: norms after attention and MLP instead of before
them, norms of each head's q and k; the large models have a window in three of four layers, and
only those rotate."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.config import ConfigReader
from mlc_compile.models.names import GPT2_DECODER
from mlc_compile.models.options import Block, GroupedQuery, HeadNorm
from mlc_compile.models.schema import (
    ConfigSchema,
    Kinds,
    all_layers,
    every,
    no_window,
    windowed_layers,
)
from mlc_compile.models.spec import Architecture

EXAONE = Architecture(
    name="exaone",
    hf_classes=("ExaoneForCausalLM",),
    schema=ConfigSchema(
        spelling={
            "hidden_act": "activation_function",
            "num_hidden_layers": "num_layers",
            "rms_norm_eps": "layer_norm_epsilon",
        },
        defaults={"tie_word_embeddings": True},
        ignored=("embed_dropout",),
    ),
    names=(
        replace(
            GPT2_DECODER,
            qkv=tuple(f"attn.attention.{which}_proj" for which in "qkv"),
            attention_out="attn.attention.out_proj",
            gate_up=("mlp.c_fc_0", "mlp.c_fc_1"),
        ),
    ),
)


def _kinds(reader: ConfigReader, layers: int) -> Kinds:
    if reader.take("sliding_window") is None:
        reader.take("sliding_window_pattern")
        return no_window(reader, layers)
    if reader.has("layer_types"):  # the pattern may then be text, "LLLG"
        reader.take("sliding_window_pattern")
        return every(None, 4)(reader, layers)
    return every("sliding_window_pattern", 4)(reader, layers)


def _rotates(reader: ConfigReader, kinds: Kinds) -> tuple[bool, ...]:
    choose = all_layers if reader.take("sliding_window") is None else windowed_layers
    return choose(reader, kinds)


EXAONE4 = Architecture(
    name="exaone4",
    hf_classes=("Exaone4ForCausalLM",),
    attention=GroupedQuery(qk_norm=HeadNorm()),
    block=Block(input_norms=False, output_norms=True),
    schema=ConfigSchema(
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},
        kinds=_kinds,
        rotates=_rotates,
    ),
)
