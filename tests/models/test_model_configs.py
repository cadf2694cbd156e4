"""Published config.json files, read strictly, and what must not be read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.config import read_json_strict, resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.models import ARCHITECTURES, Model, load_model, num_parameters

CONFIGS = Path(__file__).parent.parent / "configs"

# file -> parameters as published (a tied embedding counted once)
PUBLISHED = {
    "SmolLM2-135M-Instruct": 134_515_008,
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
}


def published(name: str) -> dict[str, Any]:
    return read_json_strict(CONFIGS / f"{name}.json")


def load(config: dict[str, Any], **more: Any) -> Model:
    return load_model(config, where="config.json", **more)


def test_every_stored_config_is_tested() -> None:
    stored = {path.stem for path in CONFIGS.glob("*.json") if ".refused" not in path.name}
    assert stored == set(PUBLISHED)
    assert {published(name)["model_type"] for name in stored} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_parses(name: str) -> None:
    raw = published(name)
    before = copy.deepcopy(raw)
    model = load(raw)
    assert raw == before == model.config.raw
    assert model.config.model_type == raw["model_type"]
    assert num_parameters(model) == PUBLISHED[name]
    assert resolve_compile_config(model.config).kv_tokens == 4096


def test_values_that_need_a_rule() -> None:
    smol = load(published("SmolLM2-135M-Instruct")).config
    assert (smol.head_dim, smol.rope.theta, smol.tie_word_embeddings) == (64, 1e5, True)
    assert load(published("Mistral-7B-v0.1")).config.sliding_window == 4096
    assert load(published("Mistral-7B-Instruct-v0.3")).config.sliding_window is None
    # use_sliding_window is false there, so the number counts for nothing.
    assert load(published("Qwen2.5-0.5B-Instruct")).config.sliding_window is None
    qwen3 = load(published("Qwen3-0.6B"))
    assert qwen3.config.head_dim == 128 != qwen3.config.hidden_size // 16
    llama3 = load(published("Llama-3.2-1B-Instruct")).config.rope
    assert (llama3.kind, dict(llama3.params)["factor"]) == ("llama3", 32.0)


def test_mistral_with_a_longer_context_slides() -> None:
    config = load(published("Mistral-7B-v0.1")).config
    plan = resolve_compile_config(config, context_window_size=32768)
    assert (plan.context_window_size, plan.sliding_window_size) == (-1, 4096)


def test_dual_chunk_attention_is_refused() -> None:
    with pytest.raises(InputError, match=r"dual_chunk_attention_config is \{.*dual chunk atten"):
        load(published("Qwen2.5-7B-Instruct-1M.refused"))


# ---------------------------------------------------------------------------------------------
# Refusals

LLAMA, MISTRAL = "Llama-3.2-1B-Instruct", "Mistral-7B-v0.1"
QWEN2, QWEN3 = "Qwen2.5-0.5B-Instruct", "Qwen3-0.6B"
ABSENT = object()

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # unknown keys and classes
    (LLAMA, {"final_logit_softcapping": 30.0}, "unknown key final_logit_softcapping = 30.0"),
    (LLAMA, {"num_local_experts": 8}, "unknown key num_local_experts = 8"),
    (MISTRAL, {"attention_bias": False}, "unknown key attention_bias = false"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
    (LLAMA, {"architectures": "LlamaForCausalLM"}, "must be a list of strings"),
    (LLAMA, {"model_type": 3}, "model_type must be a string"),
    (LLAMA, {"model_type": ABSENT}, "model_type is missing"),
    # values that would change the maths
    (LLAMA, {"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu" is supported'),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved is true"),
    (LLAMA, {"pretraining_tp": 2}, "pretraining_tp is 2; only 1"),
    (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "the unquantised checkpoint"),
    (LLAMA, {"is_encoder_decoder": True}, "only decoders are built"),
    (LLAMA, {"per_layer_config": {"0": {"hidden_size": 1}}}, "per_layer_config is"),
    (LLAMA, {"sliding_window": 4096}, "this model type has no window"),
    (LLAMA, {"layer_types": ["sliding_attention"] * 16}, "contradict each other"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias must be true or false"),
    (LLAMA, {"mlp_bias": 1}, "mlp_bias must be true or false"),
    (QWEN2, {"use_mrope": True}, "use_mrope is true"),
    (QWEN2, {"use_sliding_window": True}, "max_window_layers is 21: layers below"),
    (QWEN2, {"use_sliding_window": 1}, "use_sliding_window must be true or false"),
    (QWEN3, {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "mixes"),
    (QWEN3, {"layer_types": ["full_attention"] * 27}, "27 entries for num_hidden_layers = 28"),
    (QWEN3, {"layer_types": ["linear_attention"] * 28}, "holds 'linear_attention'"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "but the window is None"),
    (MISTRAL, {"layer_types": ["full_attention"] * 32}, "but the window is 4096"),
    # impossible sizes
    (LLAMA, {"hidden_size": ABSENT}, "hidden_size is missing"),
    (LLAMA, {"hidden_size": 0}, "hidden_size is 0, outside"),
    (LLAMA, {"hidden_size": -2048}, "hidden_size is -2048, outside"),
    (LLAMA, {"hidden_size": 2048.0}, "must be an integer, not a fractional number (2048.0)"),
    (LLAMA, {"hidden_size": "2048"}, 'must be an integer, not a string ("2048")'),
    (LLAMA, {"hidden_size": None}, "must be an integer, not null"),
    (LLAMA, {"num_hidden_layers": True}, "must be an integer, not true/false"),
    (LLAMA, {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, outside"),
    (LLAMA, {"vocab_size": 10**12}, "vocab_size is 1000000000000, outside"),
    (LLAMA, {"intermediate_size": 0}, "intermediate_size is 0"),
    (LLAMA, {"max_position_embeddings": 2**31}, "max_position_embeddings is 2147483648"),
    (LLAMA, {"head_dim": None, "num_attention_heads": 24}, "is no multiple of num_attention_heads"),
    (LLAMA, {"head_dim": 63}, "head_dim is 63; rotary positions need an even size"),
    (LLAMA, {"head_dim": 10**6}, "head_dim is 1000000, outside"),
    (LLAMA, {"num_key_value_heads": 5}, "(5) does not divide num_attention_heads (32)"),
    (LLAMA, {"num_key_value_heads": 64}, "(64) does not divide num_attention_heads (32)"),
    (LLAMA, {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    (QWEN3, {"head_dim": None}, "head_dim must be an integer, not null"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
    (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    (LLAMA, {"rms_norm_eps": 2.0}, "rms_norm_eps is 2.0"),
    (LLAMA, {"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    (LLAMA, {"tie_word_embeddings": None}, "tie_word_embeddings must be true or false"),
]


@pytest.mark.parametrize(
    ("name", "changes", "message"), REFUSED, ids=[f"{c[0][:7]}-{c[2][:40]}" for c in REFUSED]
)
def test_refused(name: str, changes: dict[str, Any], message: str) -> None:
    merged = {**published(name), **changes}
    config = {key: value for key, value in merged.items() if value is not ABSENT}
    with pytest.raises(InputError) as caught:
        load(config)
    assert message in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


ACCEPTED: list[tuple[str, dict[str, Any], str, object]] = [
    (LLAMA, {"num_key_value_heads": None}, "num_key_value_heads", 32),
    (LLAMA, {"num_key_value_heads": ABSENT}, "num_key_value_heads", 32),
    (LLAMA, {"head_dim": None}, "head_dim", 64),
    (LLAMA, {"head_dim": 128}, "head_dim", 128),
    (LLAMA, {"tie_word_embeddings": ABSENT}, "tie_word_embeddings", False),
    (LLAMA, {"sliding_window": None, "quantization_config": None}, "sliding_window", None),
    (LLAMA, {"layer_types": ["full_attention"] * 16}, "sliding_window", None),
    (LLAMA, {"architectures": None, "dtype": "float16"}, "vocab_size", 128256),
    (MISTRAL, {"num_key_value_heads": ABSENT}, "num_key_value_heads", 8),
    (MISTRAL, {"sliding_window": ABSENT}, "sliding_window", 4096),
    (MISTRAL, {"layer_types": ["sliding_attention"] * 32}, "sliding_window", 4096),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": 24}, "sliding_window", None),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": 0}, "sliding_window", 32768),
    (QWEN2, {"use_sliding_window": True, "sliding_window": None}, "sliding_window", None),
    (QWEN3, {"head_dim": ABSENT}, "head_dim", 128),
    (
        QWEN3,
        {
            "use_sliding_window": True,
            "sliding_window": 512,
            "layer_types": ["sliding_attention"] * 28,
        },
        "sliding_window",
        512,
    ),
    (
        QWEN3,
        {"use_sliding_window": True, "sliding_window": 512, "layer_types": ["full_attention"] * 28},
        "sliding_window",
        None,
    ),
]


@pytest.mark.parametrize(("name", "changes", "key", "expected"), ACCEPTED)
def test_accepted(name: str, changes: dict[str, Any], key: str, expected: object) -> None:
    merged = {**published(name), **changes}
    config = {k: value for k, value in merged.items() if value is not ABSENT}
    assert getattr(load(config).config, key) == expected


@pytest.mark.parametrize(
    ("wrong", "close"),
    [("lama", "llama"), ("mistrall", "mistral"), ("qwen", "qwen2"), ("QWEN3", "qwen3")],
)
def test_unknown_type_names_the_closest(wrong: str, close: str) -> None:
    with pytest.raises(InputError) as caught:
        load({**published(LLAMA), "model_type": wrong})
    message = str(caught.value)
    assert f"unknown model_type {wrong!r}" in message
    assert close in message.split("closest: ")[1].split(")")[0]


def test_unknown_type_without_a_likeness_lists_all() -> None:
    with pytest.raises(InputError, match="none is close") as caught:
        load({**published(LLAMA), "model_type": "xyz"})
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_forced_type_reads_a_file_of_another_name() -> None:
    config = {**published(LLAMA), "model_type": "my-llama", "architectures": ["MyLlama"]}
    model = load(config, model_type="llama")
    assert model == load(published(LLAMA))
    with pytest.raises(InputError, match=r"^--model-type: unknown model_type 'lama'"):
        load(config, model_type="lama")


def test_forced_type_is_no_way_around_the_checks() -> None:
    with pytest.raises(InputError, match="sliding_window is 32768"):
        load(published(QWEN2), model_type="llama")
    with pytest.raises(InputError, match="unknown keys attention_bias = false, mlp_bias"):
        load(published(LLAMA), model_type="qwen2")
    # Naming the type that the file has anyway checks the class as ever.
    with pytest.raises(InputError, match="architectures is Other"):
        load({**published(LLAMA), "architectures": ["Other"]}, model_type="llama")


def test_raw_survives_json() -> None:
    raw = load(published(LLAMA)).config.raw
    assert json.loads(json.dumps(raw)) == published(LLAMA)
