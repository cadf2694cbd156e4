"""Published config.json files, read strictly, and what must not be read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.compiler.memory import estimate_plan
from mlc_compile.config import read_json_strict, resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.models import ARCHITECTURES, Model, load_model, num_parameters
from mlc_compile.quantization.scheme import get_scheme
from mlc_compile.targets.profile import get_target

CONFIGS = Path(__file__).parent.parent / "configs"

# file -> parameters as published, a tied embedding counted once (as our own count gives them where
# only a rounded number is published)
PUBLISHED = {
    "AFM-4.5B": 4_619_184_640,
    "Baichuan-13B-Base": 13_264_901_120,
    "Baichuan-7B": 7_000_559_616,
    "Baichuan2-13B-Base": 13_896_668_160,
    "Baichuan2-7B-Base": 7_505_973_248,
    "ERNIE-4.5-0.3B-PT": 360_748_032,
    "EXAONE-3.0-7.8B-Instruct": 7_818_448_896,
    "EXAONE-3.5-2.4B-Instruct": 2_405_327_360,
    "EXAONE-4.0-1.2B": 1_279_391_488,
    "EXAONE-4.0-32B": 32_003_216_384,
    "GLM-4-9B-0414": 9_400_279_040,
    "Llama-2-7b-hf": 6_738_415_616,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Llama-3.2-1B-Instruct": 1_235_814_400,
    "MiniCPM-2B-sft-bf16": 2_724_880_896,
    "Ministral-8B-Instruct-2410": 8_019_808_256,
    "Ministral-8B-interleaved": 8_019_808_256,
    "Minitron-4B-Base": 4_190_509_056,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Mistral-7B-v0.1": 7_241_732_096,
    "Mixtral-8x7B-v0.1": 46_702_792_704,
    "OLMo-1.7-7B-hf": 6_888_095_744,
    "OLMo-1B-hf": 1_176_764_416,
    "OLMo-2-1124-7B-Instruct": 7_298_617_344,
    "OLMoE-1B-7B-0924": 6_919_161_856,
    "Olmo-3-7B-Instruct": 7_298_011_136,
    "Orion-14B-Base": 14_498_703_360,
    "Phi-3-mini-4k-instruct": 3_821_079_552,
    "Phi-3.5-mini-instruct": 3_821_079_552,
    "Phi-4-mini-instruct": 3_836_021_760,
    "Qwen-1_8B": 1_836_828_672,
    "Qwen1.5-MoE-A2.7B-Chat": 14_315_784_192,
    "Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Seed-OSS-36B-Instruct": 36_151_104_512,
    "SmolLM2-135M-Instruct": 134_515_008,
    "SmolLM3-3B": 3_075_098_624,
    "aya-23-8B": 8_028_033_024,
    "bloom-1b7": 1_722_408_960,
    "c4ai-command-r-plus": 103_810_674_688,
    "c4ai-command-r-v01": 34_980_831_232,
    "c4ai-command-r7b-12-2024": 8_028_033_024,
    "chatglm3-6b": 6_243_584_000,
    "codegen-350M-mono": 356_712_448,
    "deepseek-moe-16b-base": 16_375_728_128,
    "falcon-11B": 11_102_822_400,
    "falcon-40b": 41_303_293_952,
    "falcon-7b": 6_921_720_704,
    "falcon-rw-1b": 1_311_625_216,
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b-it": 2_506_172_416,
    "gemma-3-1b-it": 999_885_952,
    "gemma-7b-it": 8_537_680_896,
    "glm-4-9b-chat-hf": 9_399_951_360,
    "glm-4-9b-chat": 9_399_951_360,
    "gpt-j-6b": 6_050_882_784,
    "gpt-neo-1.3B": 1_315_575_808,
    "gpt-neox-20b": 20_554_567_680,
    "gpt2": 124_439_808,
    "granite-3.0-1b-a400m-base": 1_334_628_352,
    "granite-3.1-2b-instruct": 2_533_531_648,
    "granitemoeshared-rebuilt": 6_370_899_456,
    "helium-1-preview-2b": 2_172_643_840,
    "internlm-chat-7b": 7_321_948_160,
    "internlm2_5-7b-chat": 7_737_708_544,
    "internlm3-8b-instruct": 8_804_241_408,
    "mpt-7b": 6_649_286_656,
    "opt-1.3b": 1_315_758_080,
    "persimmon-8b-base": 9_397_175_296,
    "phi-1_5": 1_418_270_720,
    "phi-2": 2_779_683_840,
    "phi-4": 14_659_507_200,
    "pythia-1.4b": 1_414_647_808,
    "stablelm-2-12b": 12_143_185_920,
    "stablelm-2-1_6b": 1_644_515_328,
    "stablelm-base-alpha-3b": 3_637_321_728,
    "starcoder": 15_517_456_384,
    "starcoder2-3b": 3_030_371_328,
}


def published(name: str) -> dict[str, Any]:
    return read_json_strict(CONFIGS / f"{name}.json")


def load(config: dict[str, Any], **more: Any) -> Model:
    return load_model(config, where="config.json", **more)


def test_every_stored_config_is_tested() -> None:
    stored = {path.stem for path in CONFIGS.glob("*.json") if ".refused" not in path.name}
    assert stored == set(PUBLISHED)
    assert {load(published(name)).arch.name for name in stored} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_config_parses_and_plans(name: str) -> None:
    """At full size, without weights."""
    raw = published(name)
    before = copy.deepcopy(raw)
    model = load(raw)
    assert raw == before == model.config.raw
    assert model.label == "stable"
    assert model.config.model_type == raw.get("model_type", model.arch.name)
    assert num_parameters(model) == PUBLISHED[name]
    config = resolve_compile_config(model.config)
    window = model.config.sliding_window or 4096
    assert config.kv_tokens >= min(4096, window, model.config.max_position_embeddings)
    profile, _ = get_target("cpu")
    for scheme in ("q0f16", "q4f16_1"):
        plan = estimate_plan(model, get_scheme(scheme), config, profile)
        assert plan.weights > 0 and plan.workspace > 0
        if scheme == "q0f16":
            assert plan.weights == 2 * PUBLISHED[name]


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


def test_layers_may_differ() -> None:
    upper = load({**published(QWEN2), "use_sliding_window": True}).config
    assert (upper.sliding_window, upper.layer_window, upper.can_slide) == (None, 32768, False)
    assert [kind.window is None for kind in upper.layers] == [True] * 21 + [False] * 3
    gemma = load(published("gemma-3-1b-it")).config
    assert [i for i, kind in enumerate(gemma.layers) if kind.window is None] == [5, 11, 17, 23]
    assert {kind.rope.theta for kind in gemma.layers if kind.rope} == {1e4, 1e6}
    assert gemma.layer_window == 512 and not gemma.cache_rotates
    smol = load(published("SmolLM3-3B")).config
    assert [i for i, kind in enumerate(smol.layers) if kind.rope is None] == [*range(3, 36, 4)]


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
    (LLAMA, {"model_type": 3}, "model_type is missing or no string"),
    (LLAMA, {"model_type": ABSENT, "architectures": ABSENT}, "model_type is missing"),
    # values that would change the maths
    (LLAMA, {"hidden_act": "xielu"}, 'hidden_act is "xielu"; only "silu" or'),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved is true"),
    (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "the unquantised checkpoint"),
    (LLAMA, {"is_encoder_decoder": True}, "only decoders are built"),
    (LLAMA, {"per_layer_config": {"0": {"hidden_size": 1}}}, "per_layer_config is"),
    (LLAMA, {"sliding_window": 4096}, "this model type has no window"),
    (LLAMA, {"layer_types": ["sliding_attention"] * 16}, "contradict each other"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor makes 32; this model type"),
    (LLAMA, {"attention_bias": "yes"}, "attention_bias must be true or false"),
    (LLAMA, {"mlp_bias": 1}, "mlp_bias must be true or false"),
    (QWEN2, {"use_mrope": True}, "use_mrope is true"),
    (QWEN2, {"use_sliding_window": 1}, "use_sliding_window must be true or false"),
    (QWEN3, {"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "says otherwise"),
    (QWEN3, {"layer_types": ["full_attention"] * 27}, "27 entries for num_hidden_layers = 28"),
    (QWEN3, {"layer_types": ["linear_attention"] * 28}, "holds 'linear_attention'"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "all layers have full_attention"),
    (MISTRAL, {"layer_types": ["full_attention"] * 32}, "all layers have sliding_attention"),
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
    [("lama", "llama"), ("mistrall", "mistral"), ("qwen4", "qwen2"), ("QWEN3", "qwen3")],
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
    with pytest.raises(InputError, match="architectures is Other"):
        load({**published(LLAMA), "architectures": ["Other"]})


def test_class_alone_names_the_type() -> None:
    config = published(LLAMA)
    del config["model_type"]
    assert (load(config), load(config).label) == (load(published(LLAMA)), "stable")


def test_forced_type_is_the_users_word() -> None:
    assert load(published(LLAMA), model_type="llama").label == "stable"
    for changes in ({"model_type": "mine"}, {"architectures": ["Other"]}):
        model = load({**published(LLAMA), **changes}, model_type="llama")
        assert model.label == "structural-only"
        assert model.identity()["basis"] == "named"


def test_raw_survives_json() -> None:
    raw = load(published(LLAMA)).config.raw
    assert json.loads(json.dumps(raw)) == published(LLAMA)
