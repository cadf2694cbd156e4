"""Gemma, Cohere, OLMo, SmolLM3, EXAONE, Ministral, Phi and GLM: what published files say, and what
they may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.models import load_model

CONFIGS = Path(__file__).parent.parent / "configs"
PUBLISHED = (
    "gemma-7b-it",
    "gemma-2-2b",
    "gemma-3-1b-it",
    "c4ai-command-r-plus",
    "c4ai-command-r7b-12-2024",
    "OLMo-1.7-7B-hf",
    "OLMo-2-1124-7B-Instruct",
    "Olmo-3-7B-Instruct",
    "SmolLM3-3B",
    "EXAONE-4.0-1.2B",
    "EXAONE-4.0-32B",
    "Ministral-8B-interleaved",
    "phi-2",
    "Phi-3-mini-4k-instruct",
    "Phi-3.5-mini-instruct",
    "Phi-4-mini-instruct",
    "glm-4-9b-chat-hf",
    "GLM-4-9B-0414",
)


def published(name: str, **changes: Any) -> dict[str, Any]:
    return {**read_json_strict(CONFIGS / f"{name}.json"), **changes}


@pytest.mark.parametrize("name", PUBLISHED)
def test_windows_and_rotation_are_those_of_transformers(name: str) -> None:
    """Of files as published, in the spelling of transformers 4; parity tests write version 5's."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    raw = published(name)
    model = load_model(raw, where=name)
    keys = {k: v for k, v in raw.items() if k not in ("auto_map", "torch_dtype", "model_type")}
    config = transformers.AutoConfig.for_model(raw["model_type"], **keys)
    with torch.device("meta"):
        whole = transformers.AutoModelForCausalLM.from_config(config)
    assert model.sources() <= whole.state_dict().keys()
    rotary = type(whole.model.rotary_emb)(config)
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    for i, (layer, kind) in enumerate(zip(model.config.layers, kinds, strict=True)):
        windowed = kind in (None, "sliding_attention")
        window = getattr(config, "sliding_window", None) if windowed else None
        assert (layer.window or model.config.sliding_window) == window, i
        if layer.rope is None:
            continue
        own = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        found, factor = layer.rope.table(2048)
        expected = getattr(rotary, f"{own}inv_freq").numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        assert factor == pytest.approx(getattr(rotary, f"{own}attention_scaling"))


@pytest.mark.parametrize(
    ("name", "rotating"),
    [
        ("c4ai-command-r7b-12-2024", "1110" * 8),
        ("SmolLM3-3B", "1110" * 9),
        ("EXAONE-4.0-1.2B", "1" * 30),
        ("EXAONE-4.0-32B", "1110" * 16),
        ("Olmo-3-7B-Instruct", "1" * 32),
    ],
)
def test_which_layers_rotate(name: str, rotating: str) -> None:
    layers = load_model(published(name), where=name).config.layers
    assert "".join("01"[layer.rope is not None] for layer in layers) == rotating


def test_numbers_that_scale() -> None:
    gemma = load_model(published("gemma-2-2b"), where="").config
    assert (gemma.embedding_scale, gemma.attention_scale) == (48.0, 256**-0.5)
    assert (gemma.attention_softcap, gemma.logits_softcap) == (50.0, 30.0)
    absent = published("gemma-2-2b")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"):
        del absent[key]
    assert load_model(absent, where="").config == gemma
    uncapped = published("gemma-2-2b", attn_logit_softcapping=None, final_logit_softcapping=None)
    without = load_model(uncapped, where="").config
    assert (without.attention_softcap, without.logits_softcap) == (None, None)
    assert load_model(published("c4ai-command-r7b-12-2024"), where="").config.logits_scale == 0.25
    assert load_model(published("OLMo-1.7-7B-hf"), where="").config.clip_qkv == 8.0
    assert load_model(published("phi-2"), where="").config.rope.rotary_dim == 32


SLIDING = ["sliding_attention"]
REFUSED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("gemma-7b-it", {"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
    ("gemma-7b-it", {"hidden_activation": "gelu"}, 'hidden_activation is "gelu"'),
    ("gemma-7b-it", {"hidden_act": "silu"}, 'hidden_act is "silu"'),
    ("gemma-2-2b", {"hidden_act": "silu"}, 'hidden_act is "silu"'),
    ("gemma-2-2b", {"sliding_window": None}, "sliding_window is not given"),
    ("gemma-2-9b", {"sliding_window_size": 3}, "sliding_window_size is 3 but"),
    ("gemma-2-2b", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar must be a number"),
    ("gemma-3-1b-it", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    (
        "gemma-3-1b-it",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "rope_parameters has no settings of its own for sliding_attention",
    ),
    ("c4ai-command-r-v01", {"logit_scale": None}, "logit_scale must be a number"),
    ("c4ai-command-r7b-12-2024", {"use_qk_norm": True}, "use_qk_norm is true"),
    ("c4ai-command-r7b-12-2024", {"rotary_pct": 0.5}, "rotary_pct is 0.5"),
    ("OLMo-1B-hf", {"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
    ("OLMo-2-1124-7B-Instruct", {"clip_qkv": 3.0}, "unknown key clip_qkv"),
    ("Olmo-3-7B-Instruct", {"rope_theta": 10_000}, "rope_theta is 10000"),
    ("SmolLM3-3B", {"layer_types": SLIDING * 36}, "layer_types says otherwise"),
    ("SmolLM3-3B", {"no_rope_layers": [1] * 35}, "no_rope_layers has 35 entries"),
    ("EXAONE-4.0-32B", {"layer_types": None}, "sliding_window_pattern must be an integer"),
    ("EXAONE-4.0-32B", {"sliding_window": None}, "layer_types says otherwise"),
    ("phi-2", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    ("phi-4", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "is of kind yarn"),
    ("Phi-4-mini-instruct", {"lm_head_bias": True}, "lm_head_bias is true"),
    ("Phi-4-mini-instruct", {"partial_rotary_factor": 0.5}, "short_factor has 48 numbers"),
    ("GLM-4-9B-0414", {"attention_bias": None}, "attention_bias must be true or false"),
    ("Ministral-8B-interleaved", {"attention_bias": True}, "unknown key attention_bias"),
)


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_is_not_built_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^config.json: .*{message}"):
        load_model(published(name, **changes), where="config.json")
