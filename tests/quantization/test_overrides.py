"""Overrides: patterns of names, and the scheme that each parameter then has."""

from __future__ import annotations

import dataclasses

import pytest

from mlc_compile.errors import InputError
from mlc_compile.models.detect import load_model
from mlc_compile.models.spec import Model
from mlc_compile.quantization.overrides import EXAMPLE, Override, parse_overrides
from mlc_compile.quantization.policy import (
    is_quantized,
    stored_layout,
    stored_params,
    with_overrides,
)
from mlc_compile.quantization.scheme import SCHEMES, get_scheme

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 96,
}


def model(tied: bool = False) -> Model:
    return load_model({**CONFIG, "tie_word_embeddings": tied}, where="config.json")


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("lm_head", ["lm_head.weight"], ["model.lm_head.x.weight", "lm_head2.weight"]),
        ("model.embed_tokens.weight", ["model.embed_tokens.weight"], ["embed.weight"]),
        (
            "layers.0-2.*",
            ["model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.o_proj.weight"],
            ["model.layers.3.mlp.down_proj.weight", "model.layers.10.mlp.down_proj.weight"],
        ),
        (
            "layers.9-11.mlp.down_proj",
            ["model.layers.9.mlp.down_proj.weight", "model.layers.11.mlp.down_proj.weight"],
            ["model.layers.1.mlp.down_proj.weight", "model.layers.9.mlp.gate_up_proj.weight"],
        ),
        (
            "layers.*.mlp.*_proj",
            ["model.layers.7.mlp.down_proj.weight"],
            ["model.layers.7.self_attn.o_proj.weight", "model.layers.7.mlp.down.weight"],
        ),
        (
            "layers.1*.self_attn.*",
            ["model.layers.10.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"],
            ["model.layers.2.self_attn.o_proj.weight"],
        ),
        ("*", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight"], []),
        ("layers.*", ["model.layers.0.mlp.down_proj.weight"], ["model.layers.weight"]),
        ("layers.0", [], ["model.layers.0.mlp.down_proj.weight"]),  # no prefix without *
        ("a-b.c", ["a-b.c.weight"], ["a.c.weight"]),  # no range
    ],
)
def test_patterns(pattern: str, matching: list[str], others: list[str]) -> None:
    override = Override(pattern, "q8f16_1")
    assert [override.matches(name) for name in matching] == [True] * len(matching)
    assert [override.matches(name) for name in others] == [False] * len(others)


def test_three_ways_to_write_them() -> None:
    expected = (Override("lm_head", "q8f16_1"), Override("layers.0-1.*", "q8f16_1"))
    assert (
        parse_overrides(EXAMPLE) == parse_overrides(f" {EXAMPLE.replace(',', ' , ')},") == expected
    )
    assert parse_overrides({o.pattern: o.scheme for o in expected}) == expected
    assert parse_overrides([[o.pattern, o.scheme] for o in expected]) == expected
    assert parse_overrides("") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_head", "'lm_head' is not PATTERN=SCHEME"),
        ("lm_head=", "'lm_head=' is not PATTERN=SCHEME"),
        ("a=b=c", "'a=b=c' is not PATTERN=SCHEME"),
        ("a..b=q8f16_1", "'a..b' is not a dotted name"),
        ("a/../b=q8f16_1", "is not a dotted name"),
        ("layers.3-1.*=q8f16_1", "has the empty range 3-1; write 1-3"),
        ("lm_head=q8f16_1,lm_head=q0f16", "'lm_head' is given twice"),
        ("lm_head=q9", "unknown quantisation scheme 'q9'"),
        ("lm_head=q8f32_1", r"lm_head=q8f32_1 computes in float32 and q4f16_1 in float16"),
        ("layers.12.*=q8f16_1", r"layers\.12\.\*=q8f16_1 matches no parameter .* like layers\."),
        ("norm=q8f16_1", "norm=q8f16_1 matches no parameter that a scheme may pack"),
        ("layers.*.input_layernorm=q8f16_1", "matches no parameter that a scheme may pack"),
        ("layers.*=q8f16_1,layers.1.*=q0f16", r"layers\.1\.\*=q0f16 changes nothing: earlier"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_overrides(get_scheme("q4f16_1"), text, model())


@pytest.mark.parametrize("given", [[1], [["a"]], [["a", 2]], [["a", "b", "c"]], ["ab"], [None]])
def test_json_of_another_form_is_refused(given: list[object]) -> None:
    with pytest.raises(InputError, match="is not PATTERN=SCHEME"):
        parse_overrides(given)  # type: ignore[arg-type]


def test_a_tied_head_is_the_embeddings() -> None:
    with pytest.raises(InputError, match=r"is its embedding .* write embed_tokens=q8f16_1"):
        with_overrides(get_scheme("q4f16_1"), "lm_head=q8f16_1", model(tied=True))
    scheme = with_overrides(get_scheme("q4f16_1"), "embed_tokens=q8f16_1", model(tied=True))
    (embedding, *_) = model(tied=True).parameters()
    assert scheme.of(embedding) is SCHEMES["q8f16_1"]


def test_the_first_match_is_the_parameters_scheme() -> None:
    base = get_scheme("q4f16_0")
    text = "lm_head=q8f16_1,layers.0.mlp.*=q0f16,layers.0-1.*=q4f16_awq"
    scheme = with_overrides(base, text, model())
    assert scheme.overrides_json() == [pair.split("=") for pair in text.split(",")]
    assert (scheme.name, str(scheme)) == ("q4f16_0", f"q4f16_0 ({text.replace(',', ', ')})")
    specs = {spec.name: spec for spec in model().parameters()}
    expected = {
        "lm_head.weight": ("q8f16_1", True, "NK"),
        "model.layers.0.mlp.down_proj.weight": ("q0f16", False, "NK"),
        "model.layers.0.self_attn.o_proj.weight": ("q4f16_awq", True, "NK"),
        "model.layers.1.mlp.down_proj.weight": ("q4f16_awq", True, "NK"),
        "model.layers.2.mlp.down_proj.weight": ("q4f16_0", True, "KN"),
        "model.embed_tokens.weight": ("q4f16_0", True, "NK"),
        "model.layers.0.input_layernorm.weight": ("q4f16_awq", False, "NK"),
    }
    for name, (held, packed, layout) in expected.items():
        found = scheme.of(specs[name])
        assert found == SCHEMES[held] and found.overrides == ()
        assert is_quantized(specs[name], scheme) == packed
        assert stored_params(specs[name], scheme) == stored_params(specs[name], SCHEMES[held])
        if packed:
            assert stored_layout(specs[name], scheme) == layout
    again = with_overrides(scheme, scheme.overrides_json(), model())
    assert again == scheme and dataclasses.replace(again, overrides=()) == base
    assert with_overrides(scheme, "", model()) == base
