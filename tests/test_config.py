"""Strict JSON, strict keys, and the plan's defaults and checks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.config import (
    COMPILE_DEFAULTS,
    CompileConfig,
    ConfigReader,
    LayerKind,
    ModelConfig,
    RopeConfig,
    parse_json_strict,
    read_json_strict,
    resolve_compile_config,
    rope_context,
)
from mlc_compile.errors import InputError
from mlc_compile.rope import freeze_params

# ---------------------------------------------------------------------------------------------
# JSON


def test_reads_an_object(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "b": [1.5, null, true], "ü": {"a": "x"}}', encoding="utf-8")
    assert read_json_strict(path) == {"a": 1, "b": [1.5, None, True], "ü": {"a": "x"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('{"x": {"a": 1, "b": 2, "a": 1}}', "key 'a' appears twice"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": -Infinity}', "-Infinity is not JSON"),
        ('{"a": 1e999}', "1e999 is out of range"),
        ("[1]", "expected a JSON object, found a list"),
        ("null", "expected a JSON object, found null"),
        ('"x"', "expected a JSON object, found a string"),
        ('{"a": 1,\n "b"', "not valid JSON at line 2"),
        ("", "not valid JSON at line 1"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "not usable JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not usable JSON"),
    ],
)
def test_refuses_what_is_not_strict_json(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_json_strict(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_json_strict(tmp_path / "absent.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json_strict(tmp_path)
    (tmp_path / "binary.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 7\)"):
        read_json_strict(tmp_path / "binary.json")


def test_text_names_its_origin() -> None:
    with pytest.raises(InputError, match=r"^metadata of x\.gguf: "):
        parse_json_strict("{", where="metadata of x.gguf")


# ---------------------------------------------------------------------------------------------
# Keys


def reader(**raw: Any) -> ConfigReader:
    return ConfigReader(raw, where="config.json")


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, [1], {}, 0, -5, 2**31])
def test_integer_takes_positive_integers_only(value: object) -> None:
    with pytest.raises(InputError, match=r"^config\.json: size "):
        reader(size=value).integer("size")


def test_integer_absent_and_default() -> None:
    with pytest.raises(InputError, match="size is missing"):
        reader().integer("size")
    assert reader().integer("size", default=7) == 7
    assert reader(size=3).integer("size", default=7) == 3
    assert reader(size=None).optional_integer("size") is None
    with pytest.raises(InputError, match="not true/false"):
        reader(size=True).optional_integer("size")


@pytest.mark.parametrize("value", [True, "1e-5", None, 0, -1.0, float("nan"), float("inf")])
def test_number_takes_finite_positive_numbers_only(value: object) -> None:
    with pytest.raises(InputError, match=r"^config\.json: eps "):
        reader(eps=value).number("eps")


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_flag_takes_true_and_false_only(value: object) -> None:
    with pytest.raises(InputError, match="must be true or false"):
        reader(bias=value).flag("bias")


@pytest.mark.parametrize(
    ("allowed", "value"), [((False,), 0), ((1,), True), ((None,), False), (("silu",), "gelu")]
)
def test_only_compares_types_too(allowed: tuple[object, ...], value: object) -> None:
    with pytest.raises(InputError, match=r"only .* is supported"):
        reader(key=value).only("key", allowed)
    reader(key=allowed[0]).only("key", allowed)
    reader().only("key", allowed)


def test_finish_names_keys_nobody_took() -> None:
    config = reader(a=1, b=2, c="x" * 100)
    config.integer("a")
    with pytest.raises(InputError, match="unknown keys b = 2, c = ") as caught:
        config.finish()
    assert len(str(caught.value)) < 300
    config.finish(ignorable=("b", "c"))


def test_finish_counts_the_rest_of_many() -> None:
    with pytest.raises(InputError, match="and 15 more"):
        reader(**{f"key{i}": i for i in range(20)}).finish()


# ---------------------------------------------------------------------------------------------
# The plan


def model(**changes: Any) -> ModelConfig:
    rope = changes.get("rope", RopeConfig(theta=1e4, rotary_dim=32))
    base = ModelConfig(
        model_type="llama",
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        vocab_size=1000,
        norm_eps=1e-5,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
        sliding_window=None,
        rope=rope,
        layers=(LayerKind(window=None, rope=rope),) * 2,
    )
    return dataclasses.replace(base, **changes)


def note(plan: CompileConfig, start: str) -> str:
    found = [text for text in plan.notes if text.startswith(start)]
    assert len(found) == 1, plan.notes
    return found[0]


def test_defaults_fit_a_laptop_and_say_so() -> None:
    plan = resolve_compile_config(model(num_hidden_layers=32, num_key_value_heads=8, head_dim=128))
    assert plan == CompileConfig(4096, -1, -1, 1024, 4, 1)
    text = note(plan, "context_window_size")
    # 2 (K and V) x 32 layers x 8 heads x 128 x 2 bytes = 128 KiB a token
    assert "4096 of the checkpoint's 131072" in text
    assert "512 MiB instead of 16.0 GiB" in text and "--context-window-size" in text
    note(plan, "prefill_chunk_size is 1024")
    note(plan, "max_batch_size is 4")
    assert plan.kv_tokens == 4096


def test_small_checkpoint_gives_its_own_length() -> None:
    plan = resolve_compile_config(model(max_position_embeddings=512))
    assert (plan.context_window_size, plan.prefill_chunk_size) == (512, 512)
    assert "all positions" in note(plan, "context_window_size")
    assert "all of context_window_size" in note(plan, "prefill_chunk_size")


def test_explicit_values_are_kept_without_notes() -> None:
    plan = resolve_compile_config(
        model(),
        context_window_size=131072,
        prefill_chunk_size=77,
        max_batch_size=9,
        tensor_parallel_shards=2,
        attention_sink_size=0,
        sliding_window_size=-1,
    )
    assert plan == CompileConfig(131072, -1, -1, 77, 9, 2)
    assert plan.notes == ()


def test_target_defaults_override_ours() -> None:
    plan = resolve_compile_config(
        model(), target_defaults={"context_window_size": 2048, "max_batch_size": 1}
    )
    assert (plan.context_window_size, plan.max_batch_size) == (2048, 1)
    assert plan.prefill_chunk_size == COMPILE_DEFAULTS["prefill_chunk_size"]
    with pytest.raises(ValueError, match="unknown sizes"):
        resolve_compile_config(model(), target_defaults={"context": 1})


def test_window_of_the_checkpoint_is_taken_when_below_the_context() -> None:
    plan = resolve_compile_config(model(sliding_window=1000))
    assert plan == CompileConfig(-1, 1000, 0, 1000, 4, 1)
    assert "the checkpoint's own window" in note(plan, "sliding_window_size is 1000")
    # 1000 + 1000 - 1: the chunk is written before its first query reads the window
    assert plan.kv_tokens == 1999
    sunk = resolve_compile_config(
        model(sliding_window=1000), attention_sink_size=4, prefill_chunk_size=100
    )
    assert sunk.kv_tokens == 1000 + 100 - 1 + 4
    assert "differ from the reference" in note(sunk, "attention_sink_size 4")


@pytest.mark.parametrize("context", [None, 4096, 100])
def test_window_that_covers_the_context_is_full_attention(context: int | None) -> None:
    plan = resolve_compile_config(model(sliding_window=4096), context_window_size=context)
    assert (plan.context_window_size, plan.sliding_window_size) == (context or 4096, -1)


def test_context_above_the_window_slides() -> None:
    plan = resolve_compile_config(model(sliding_window=4096), context_window_size=8192)
    assert (plan.context_window_size, plan.sliding_window_size) == (-1, 4096)


def test_context_of_minus_one_takes_the_window() -> None:
    plan = resolve_compile_config(model(sliding_window=4096), context_window_size=-1)
    assert (plan.context_window_size, plan.sliding_window_size) == (-1, 4096)


def test_window_on_a_full_attention_checkpoint_is_called_an_approximation() -> None:
    plan = resolve_compile_config(model(), sliding_window_size=512, attention_sink_size=4)
    assert plan == CompileConfig(-1, 512, 4, 512, 4, 1)
    assert "all earlier tokens" in note(plan, "sliding_window_size 512 is an approximation")


def test_rope_reach_beyond_the_trained_length_is_allowed_and_noted() -> None:
    params = freeze_params({"factor": 4.0})
    linear = RopeConfig(theta=1e4, rotary_dim=32, kind="linear", params=params)
    scaled = model(max_position_embeddings=2048, rope=linear)
    plan = resolve_compile_config(scaled, context_window_size=8192)
    assert "linear RoPE scaling reaches 8192" in note(plan, "context_window_size 8192 exceeds")
    with pytest.raises(InputError, match="exceeds the 8192 positions"):
        resolve_compile_config(scaled, context_window_size=8193)


def dynamic() -> RopeConfig:
    params = freeze_params({"factor": 2.0, "max_position_embeddings": 2048})
    return RopeConfig(theta=1e4, rotary_dim=32, kind="dynamic", params=params)


def test_dynamic_rope_is_noted_and_compiled_for_the_window() -> None:
    config = model(max_position_embeddings=2048, rope=dynamic())
    plan = resolve_compile_config(config, context_window_size=4096)
    assert "scaled for the full window of 4096" in note(plan, "RoPE (dynamic NTK)")
    assert rope_context(config, plan) == 4096


def test_rope_of_a_sliding_plan_is_for_all_positions() -> None:
    config = model(sliding_window=512)
    plan = resolve_compile_config(config)
    assert plan.context_window_size == -1
    assert rope_context(config, plan) == config.max_position_embeddings


ASKED_WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"context_window_size": 0}, "context_window_size is 0"),
    ({}, {"context_window_size": -2}, "context_window_size is -2"),
    ({}, {"context_window_size": True}, "must be an integer, not true/false"),
    ({}, {"context_window_size": 4096.0}, "must be an integer, not a fractional number"),
    ({}, {"context_window_size": "4096"}, "must be an integer, not a string"),
    ({}, {"context_window_size": 2**31}, "it must be 1 to 2147483647"),
    ({}, {"context_window_size": 131073}, "exceeds the 131072 positions"),
    ({}, {"context_window_size": -1}, "the checkpoint has no sliding window"),
    ({}, {"context_window_size": -1, "sliding_window_size": -1}, "are both -1"),
    ({}, {"context_window_size": 99, "sliding_window_size": 99}, "exclude each other"),
    ({}, {"sliding_window_size": 131073}, "exceeds the checkpoint's 131072 positions"),
    ({"sliding_window": 64}, {"sliding_window_size": 65}, "exceeds the checkpoint's own window"),
    (
        {"sliding_window": 64},
        {"sliding_window_size": -1, "context_window_size": 65},
        "the checkpoint attends to 64 tokens",
    ),
    ({"rope": dynamic()}, {"sliding_window_size": 64}, "does not go with dynamic RoPE"),
    ({}, {"attention_sink_size": 4}, "there is no sliding window"),
    ({}, {"attention_sink_size": -2}, "attention_sink_size is -2"),
    ({}, {"sliding_window_size": 64, "attention_sink_size": 64}, "must be below"),
    ({}, {"prefill_chunk_size": 0}, "prefill_chunk_size is 0"),
    ({}, {"prefill_chunk_size": -1}, "prefill_chunk_size is -1"),
    ({}, {"prefill_chunk_size": 4097}, "exceeds context_window_size 4096"),
    (
        {"sliding_window": 64},
        {"prefill_chunk_size": 65},
        "prefill_chunk_size 65 exceeds sliding_window_size 64",
    ),
    ({}, {"max_batch_size": 0}, "max_batch_size is 0"),
    ({}, {"max_batch_size": 100_000}, "max_batch_size is 100000"),
    ({}, {"tensor_parallel_shards": 0}, "tensor_parallel_shards is 0"),
    ({}, {"tensor_parallel_shards": 3}, "does not divide num_attention_heads (8)"),
    ({}, {"tensor_parallel_shards": 8}, "does not divide num_key_value_heads (4)"),
    ({"intermediate_size": 510}, {"tensor_parallel_shards": 4}, "intermediate_size (510)"),
]


@pytest.mark.parametrize(
    ("changes", "asked", "message"), ASKED_WRONG, ids=[str(case[1:]) for case in ASKED_WRONG]
)
def test_impossible_plans_are_refused(
    changes: dict[str, Any], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError) as caught:
        resolve_compile_config(model(**changes), **asked)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_shard_hint_lists_what_is_possible() -> None:
    with pytest.raises(InputError, match=r"possible: 1, 2, 4$"):
        resolve_compile_config(model(), tensor_parallel_shards=3)


def test_notes_are_sentences_and_no_part_of_equality() -> None:
    plan = resolve_compile_config(model(sliding_window=64))
    assert plan.notes and all(text.endswith(".") and "\n" not in text for text in plan.notes)
    assert plan == dataclasses.replace(plan, notes=())


def test_raw_is_no_part_of_equality() -> None:
    assert model(raw={"a": 1}) == model(raw={"b": 2})
    assert hash(model(raw={"a": 1})) == hash(model())
