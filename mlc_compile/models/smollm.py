"""SmolLM3: Llama in which every fourth layer does not rotate. SmolLM 1 and 2 are Llama itself."""

from __future__ import annotations

from dataclasses import replace

from mlc_compile.config import ConfigReader
from mlc_compile.models.llama import LLAMA
from mlc_compile.models.schema import (
    FULL,
    SLIDING,
    ConfigSchema,
    Kinds,
    layer_types,
    listed_layers,
    no_window,
)

# 1 says that a layer rotates.
_ROTATES = listed_layers("no_rope_layers", "no_rope_layer_interval")


def _kinds(reader: ConfigReader, layers: int) -> Kinds:
    """A window, where it is switched on, in the layers that do not rotate."""
    if not reader.flag("use_sliding_window") or reader.take("sliding_window") is None:
        return no_window(reader, layers)
    rotates = _ROTATES(reader, (FULL,) * layers)
    return layer_types(reader, layers) or tuple(FULL if turns else SLIDING for turns in rotates)


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    hf_classes=("SmolLM3ForCausalLM",),
    schema=ConfigSchema(
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        ignored=("max_window_layers",),
        kinds=_kinds,
        rotates=_ROTATES,
    ),
)
