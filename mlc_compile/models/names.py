"""Checkpoint name tables: what each part of a decoder is called in published tensors.

A table is data. An architecture lists the tables its checkpoints come in, the usual one first;
`Model.for_tensors` picks by the names a checkpoint really has. A tuple of several names means
that the tensors are stored apart and are concatenated along axis 0.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class NameTable:
    """Module names of one checkpoint style; `.weight` and `.bias` are added by the reader.

    `{i}` in `layer` is the layer's index; names inside a layer are relative to it.
    """

    embed: str = "model.embed_tokens"
    layer: str = "model.layers.{i}"
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    attention_out: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    lm_head: str = "lm_head"

    def fits(self, tensors: Container[str]) -> bool:
        """Whether a checkpoint with these tensor names is written in this style."""
        return f"{self.embed}.weight" in tensors


HF_DECODER = NameTable()
"""What `save_pretrained` of a `...ForCausalLM` writes."""

BARE_DECODER = replace(HF_DECODER, embed="embed_tokens", layer="layers.{i}", final_norm="norm")
"""What `save_pretrained` of the decoder without its head writes (no `model.` prefix)."""
