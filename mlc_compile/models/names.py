"""Checkpoint name tables: what each part of a decoder is called in published tensors.

A table is data. An architecture lists the tables its checkpoints come in, the usual one first;
`Model.for_tensors` picks by the names a checkpoint really has. Several names in a tuple mean that
the tensors are stored apart, one name that they are one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

SLICES = 4
"""The slices of CodeGen's q, k and v: one for each device that it was trained on."""


@dataclass(frozen=True)
class NameTable:
    """Module names of one checkpoint style; `.weight` and `.bias` are added by the reader.

    `{i}` in `layer` is the layer's index and `{e}` in an expert's name the expert's; names inside a
    layer are relative to it.

    Attributes:
        qkv_layout: how one fused tensor's rows lie: "concat" is all of q, then k, then v;
            "grouped" is, for each KV head, its query heads, its k and its v; "sliced" is, for each
            of SLICES slices, its share of q, then of v, then of k (CodeGen).
        up: the first projection of an MLP without a gate.
        transposed: linear weights are stored [in, out] (GPT-2's Conv1D).
    """

    embed: str = "model.embed_tokens"
    positions: str = "model.embed_positions"
    embed_norm: str = "model.embed_layernorm"
    layer: str = "model.layers.{i}"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_layout: Literal["concat", "grouped", "sliced"] = "concat"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attention_out: str = "self_attn.o_proj"
    attention_output_norm: str = "post_attention_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    mlp_output_norm: str = "post_feedforward_layernorm"
    router: str = "mlp.gate"
    experts_gate_up: tuple[str, ...] = ("mlp.experts.{e}.gate_proj", "mlp.experts.{e}.up_proj")
    experts_down: str = "mlp.experts.{e}.down_proj"
    shared_gate_up: tuple[str, ...] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"
    transposed: bool = False

    def without(self, prefix: str) -> NameTable:
        """The same for checkpoints of the decoder without its head, which lack `prefix`."""
        outer = ("embed", "positions", "embed_norm", "layer", "final_norm")
        return replace(self, **{f: getattr(self, f).removeprefix(prefix) for f in outer})


HF_DECODER = NameTable()
"""What `save_pretrained` of a `...ForCausalLM` writes."""

BARE_DECODER = HF_DECODER.without("model.")
"""What `save_pretrained` of the decoder without its head writes."""

SANDWICH_DECODER = replace(HF_DECODER, mlp_norm="pre_feedforward_layernorm")
"""With norms before and after attention and MLP, as Gemma 2 names them."""

GPT2_DECODER = NameTable(
    embed="transformer.wte",
    positions="transformer.wpe",
    layer="transformer.h.{i}",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    attention_out="attn.c_proj",
    mlp_norm="ln_2",
    up="mlp.c_fc",
    down="mlp.c_proj",
    final_norm="transformer.ln_f",
)
"""GPT-2's names, which many keep; its weights also lie `transposed`."""
