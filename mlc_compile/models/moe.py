"""Llama-likes with sparse experts: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, the first DeepSeek-MoE and
Granite's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mlc_compile.config import ConfigReader
from mlc_compile.models.kin import GRANITE
from mlc_compile.models.names import HF_DECODER, NameTable
from mlc_compile.models.options import GroupedQuery, HeadNorm, SparseMLP
from mlc_compile.models.schema import (
    FULL,
    SLIDING,
    ConfigSchema,
    Kinds,
    Numbers,
    gated_window,
    key,
    windowed,
)
from mlc_compile.models.spec import Architecture

_EXPERTS = {
    "count": "num_experts",
    "per_token": "num_experts_per_tok",
    "intermediate_size": "moe_intermediate_size",
}
_INNER = {**_EXPERTS, "intermediate_size": "intermediate_size"}


def _styles(*tables: NameTable) -> tuple[NameTable, ...]:
    """With the head and without it."""
    return (*tables, *(table.without("model.") for table in tables))


_STACKED = replace(
    HF_DECODER,
    experts_gate_up=("mlp.experts.gate_up_proj",),
    experts_down="mlp.experts.down_proj",
)
"""As transformers 5 holds experts in memory, which it can be told to save as well."""

_SPLIT = _styles(HF_DECODER, _STACKED)


def _qwen_sparse(reader: ConfigReader, kinds: Kinds) -> tuple[bool, ...]:
    """Each n-th layer, n being `decoder_sparse_step`, less those in `mlp_only_layers`."""
    step = reader.integer("decoder_sparse_step", default=1)
    dense = reader.integers("mlp_only_layers")
    return tuple((i + 1) % step == 0 and i not in dense for i in range(len(kinds)))


def _switched_window(reader: ConfigReader, layers: int) -> Kinds:
    """Qwen3-MoE: a window over every layer where `use_sliding_window` says so."""
    kind = SLIDING if reader.flag("use_sliding_window") else FULL
    return (kind if reader.take("sliding_window") else FULL,) * layers


def _deepseek_sparse(reader: ConfigReader, kinds: Kinds) -> tuple[bool, ...]:
    """Each n-th layer, n being `moe_layer_freq`, from `first_k_dense_replace` on."""
    first = reader.integer("first_k_dense_replace", default=0, low=0)
    step = reader.integer("moe_layer_freq", default=1)
    return tuple(i >= first and i % step == 0 for i in range(len(kinds)))


def _deepseek_shared(keys: Mapping[str, Any]) -> int:
    return int(keys.get("n_shared_experts") or 0) * int(keys["moe_intermediate_size"])


MIXTRAL = Architecture(
    name="mixtral",
    hf_classes=("MixtralForCausalLM",),
    mlp=SparseMLP(),
    schema=ConfigSchema(
        spelling={"num_experts": "num_local_experts"},
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "sliding_window": None},
        kinds=windowed,
        experts=_INNER,
    ),
    names=_styles(
        replace(
            HF_DECODER,
            router="block_sparse_moe.gate",
            experts_gate_up=(
                "block_sparse_moe.experts.{e}.w1",
                "block_sparse_moe.experts.{e}.w3",
            ),
            experts_down="block_sparse_moe.experts.{e}.w2",
        ),
        _STACKED,
    ),
)

QWEN2_MOE = Architecture(
    name="qwen2_moe",
    hf_classes=("Qwen2MoeForCausalLM",),
    attention=GroupedQuery(qkv_bias="qkv_bias"),
    mlp=SparseMLP(renormalize="norm_topk_prob", shared="gated"),
    schema=ConfigSchema(
        defaults={
            "num_key_value_heads": 16,
            "qkv_bias": True,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 4096,
        },
        # Versions of the class disagree on which layers would have the window.
        fixed=(("use_sliding_window", (False, None)),),
        kinds=gated_window,
        sparse=_qwen_sparse,
        experts={
            **_EXPERTS,
            "shared_intermediate_size": "shared_expert_intermediate_size",
        },
    ),
    names=_SPLIT,
)

QWEN3_MOE = Architecture(
    name="qwen3_moe",
    hf_classes=("Qwen3MoeForCausalLM",),
    attention=GroupedQuery(
        qkv_bias="attention_bias", out_bias="attention_bias", qk_norm=HeadNorm()
    ),
    mlp=SparseMLP(renormalize="norm_topk_prob"),
    schema=ConfigSchema(
        spelling={"num_experts": "num_local_experts"},
        defaults={"num_key_value_heads": 4, "sliding_window": 4096},
        ignored=("max_window_layers",),
        kinds=_switched_window,
        sparse=_qwen_sparse,
        experts=_EXPERTS,
    ),
    names=_SPLIT,
)

OLMOE = Architecture(
    name="olmoe",
    hf_classes=("OlmoeForCausalLM",),
    attention=GroupedQuery(
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        qk_norm=HeadNorm(over="projection"),
    ),
    mlp=SparseMLP(renormalize="norm_topk_prob"),
    schema=ConfigSchema(
        spelling={"num_experts": "num_local_experts"},
        numbers=Numbers(clip_qkv=key("clip_qkv")),
        experts=_INNER,
    ),
    names=_SPLIT,
)

DEEPSEEK = Architecture(
    name="deepseek",
    hf_classes=("DeepseekForCausalLM",),
    attention=GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias"),
    mlp=SparseMLP(renormalize="norm_topk_prob", shared="plain"),
    schema=ConfigSchema(
        derived={"shared_expert_intermediate_size": _deepseek_shared},
        fixed=(("scoring_func", ("softmax",)), ("ep_size", (1,))),
        ignored=("aux_loss_alpha", "seq_aux", "n_shared_experts"),
        sparse=_deepseek_sparse,
        experts={
            **_EXPERTS,
            "count": "n_routed_experts",
            "shared_intermediate_size": "shared_expert_intermediate_size",
        },
    ),
    names=_styles(
        replace(
            HF_DECODER,
            shared_gate_up=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
            shared_down="mlp.shared_experts.down_proj",
        )
    ),
)

_GRANITE = replace(
    HF_DECODER,
    router="block_sparse_moe.router.layer",
    experts_gate_up=("block_sparse_moe.input_linear.weight",),
    experts_down="block_sparse_moe.output_linear.weight",
    shared_gate_up=("shared_mlp.input_linear",),
    shared_down="shared_mlp.output_linear",
)

GRANITE_MOE = replace(
    GRANITE,
    name="granitemoe",
    hf_classes=("GraniteMoeForCausalLM",),
    mlp=SparseMLP(shared="plain"),
    schema=replace(GRANITE.schema, spelling={"num_experts": "num_local_experts"}, experts=_INNER),
    names=_styles(
        _GRANITE,
        replace(
            _GRANITE,
            router="block_sparse_moe.router",
            experts_gate_up=("block_sparse_moe.experts.gate_up_proj",),
            experts_down="block_sparse_moe.experts.down_proj",
        ),
    ),
)

GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    name="granitemoeshared",
    hf_classes=("GraniteMoeSharedForCausalLM",),
    schema=replace(
        GRANITE_MOE.schema,
        defaults={**GRANITE.schema.defaults, "shared_intermediate_size": 0},
        experts={**_INNER, "shared_intermediate_size": "shared_intermediate_size"},
    ),
)
