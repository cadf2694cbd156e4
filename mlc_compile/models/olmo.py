"""OLMo 1: LayerNorm without parameters. OLMo 2: RMS norms after attention and MLP instead of before
them, and over all heads of q and of k together. OLMo 3: three of four layers have a window, and
only the others scale their RoPE."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.models.options import Block, GroupedQuery, HeadNorm, LayerNorm
from mlc_compile.models.schema import ConfigSchema, Numbers, every, key
from mlc_compile.models.spec import Architecture

_ATTENTION = GroupedQuery(qkv_bias="attention_bias", out_bias="attention_bias")

OLMO = Architecture(
    name="olmo",
    hf_classes=("OlmoForCausalLM",),
    attention=_ATTENTION,
    norm=LayerNorm(weight=False, bias=False),
    schema=ConfigSchema(
        defaults={"rms_norm_eps": 1e-5},
        fixed=(("rms_norm_eps", (1e-5,)),),
        numbers=Numbers(clip_qkv=key("clip_qkv")),
    ),
)

OLMO2 = Architecture(
    name="olmo2",
    hf_classes=("Olmo2ForCausalLM",),
    attention=replace(_ATTENTION, qk_norm=HeadNorm(over="projection")),
    block=Block(input_norms=False, output_norms=True),
)

OLMO3 = replace(
    OLMO2,
    name="olmo3",
    hf_classes=("Olmo3ForCausalLM",),
    schema=ConfigSchema(
        defaults={"rope_theta": 5e5, "sliding_window": 4096},
        # Releases of the class differ in which layers another base would be for.
        fixed=(("rope_theta", (500_000,)),),
        kinds=every(None, 4),
        local_theta="rope_theta",
    ),
)
