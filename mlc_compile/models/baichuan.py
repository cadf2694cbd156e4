"""Baichuan and Baichuan 2: Llama with q, k and v in one tensor; the 13B ones count distances
instead of rotating, and Baichuan 2's head has rows of length one."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.config import ConfigReader
from mlc_compile.models.names import HF_DECODER
from mlc_compile.models.options import Alibi
from mlc_compile.models.schema import ConfigSchema
from mlc_compile.models.spec import Architecture

_NAMES = replace(HF_DECODER, qkv=("self_attn.W_pack",))

# Nothing else in config.json says which of the two classes of that name wrote it.
_VOCABULARY = {64000: False, 125696: True}


def _variant(reader: ConfigReader, arch: Architecture) -> Architecture:
    """Only the classes that rotate have max_position_embeddings."""
    vocab = reader.integer("vocab_size")
    if vocab not in _VOCABULARY:
        raise reader.fail(
            "vocab_size",
            f"is {vocab}; 64000 (Baichuan) and 125696 (Baichuan 2, whose head is normalised) are "
            "known",
            hint="which head it has cannot be seen from the files",
        )
    positions = arch.positions if "max_position_embeddings" in reader.source else Alibi()
    return replace(arch, positions=positions, unit_head=_VOCABULARY[vocab])


BAICHUAN = Architecture(
    name="baichuan",
    hf_classes=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    schema=ConfigSchema(
        derived={"max_position_embeddings": lambda keys: keys["model_max_length"]},
        ignored=("z_loss_weight",),
    ),
    names=(_NAMES, _NAMES.without("model.")),
    variant=_variant,
)
