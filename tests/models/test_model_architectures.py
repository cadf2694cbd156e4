"""Every registered architecture against the real class in transformers: names, shapes, order."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from every_model import CASES, FIRST, HUGGING_FACE
from numpy.typing import NDArray
from tiny_models import save_checkpoint

from mlc_compile.config import read_json_strict
from mlc_compile.models import (
    ARCHITECTURES,
    BARE_DECODER,
    HF_DECODER,
    Architecture,
    Model,
    NameTable,
    Source,
    load_model,
    num_parameters,
)
from mlc_compile.models.options import GatedMLP, GroupedQuery, HeadNorm
from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.weights.checkpoint import open_checkpoint
from mlc_compile.weights.convert import plan_conversion
from mlc_compile.weights.parts import parts_in

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is an optional extra"
)

LLAMA_LIKES = ("llama", "mistral", "qwen2", "qwen3")
"""Types whose config.json is spelled as Llama's."""
llama_likes = pytest.mark.parametrize(
    "architecture", [ARCHITECTURES[name] for name in LLAMA_LIKES], ids=LLAMA_LIKES
)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not 48 / 6, so that no rule can hide behind the division
    "vocab_size": 97,
    "max_position_embeddings": 128,
}


def config_of(architecture: Architecture, **more: Any) -> dict[str, Any]:
    """A config.json without transformers; the keys every type has."""
    return {"model_type": architecture.name, "rms_norm_eps": 1e-5, **SIZES, **more}


def bias_keys(architecture: Architecture) -> list[str]:
    assert isinstance(architecture.mlp, GatedMLP)
    options = (
        architecture.attention.qkv_bias,
        architecture.attention.out_bias,
        architecture.mlp.bias,
    )
    return sorted({option for option in options if isinstance(option, str)})


@needs_transformers
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_parameters_cover_the_real_checkpoint(name: str, tmp_path: Path) -> None:
    """What save_pretrained writes fits, and every value of it is used exactly once."""
    import torch
    import transformers

    case = CASES[name]
    checkpoint = open_checkpoint(save_checkpoint(tmp_path, case.model_type, config=case.config))
    model = load_model(checkpoint.config, where=name)
    plan = plan_conversion(checkpoint, model, SCHEMES["q0f32"])
    used: dict[str, list[NDArray[np.int64]]] = {}
    for spec in plan.model.parameters():
        shapes = {source: checkpoint.tensors[source].shape for source in spec.sources}
        for part in parts_in(spec, shapes):
            rows = np.arange(part.num_rows)
            taken = rows if part.source.rows is None else part.source.rows.indices()
            used.setdefault(part.source.name, []).append(taken)
    assert used.keys() == checkpoint.tensors.keys() - set(plan.ignored)
    for source, taken in used.items():
        found, shape = np.sort(np.concatenate(taken)), checkpoint.tensors[source].shape
        assert np.array_equal(found, np.arange(len(found))), source
        rows = (math.prod(shape), math.prod(shape[:-1]), shape[-1])  # vector, matrix, Conv1D
        assert len(found) in rows, source
    config = transformers.AutoConfig.for_model(case.model_type, **case.config)
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
    assert type(network).__name__ in model.arch.hf_classes
    assert num_parameters(model) == sum(p.numel() for p in network.parameters())


@needs_transformers
@pytest.mark.parametrize("name", [n for n in FIRST.values() if n in HUGGING_FACE])
def test_absent_keys_mean_what_transformers_takes(name: str) -> None:
    """A config.json may leave these out; the class's own default then counts."""
    import transformers

    case = CASES[name]
    optional = ("num_key_value_heads", "head_dim", "sliding_window", "tie_word_embeddings")
    keys = {key: value for key, value in case.config.items() if key not in optional}
    if keys.keys() >= {"hidden_size", "num_attention_heads"} and name != "phi3":
        keys |= {"hidden_size": 2560, "num_attention_heads": 160}  # every default divides these
    reference = transformers.AutoConfig.for_model(case.model_type, **keys)
    spelling = ARCHITECTURES[case.model_type].schema.spelling
    eps = spelling.get("rms_norm_eps", "rms_norm_eps")
    if hasattr(reference, eps):
        keys[eps] = getattr(reference, eps)  # most types must have it
    config = load_model({"model_type": case.model_type, **keys}, where="test").config
    for key in ("num_key_value_heads", "tie_word_embeddings", "head_dim"):
        theirs = getattr(reference, key, None)
        assert theirs is None or getattr(config, key) == theirs, key
    assert config.norm_eps == getattr(reference, eps, 1e-5)
    rope = getattr(reference, "rope_parameters", None) or {}
    if "rope_theta" in rope and config.rope.rotary_dim:
        assert config.rope.theta == rope["rope_theta"]


ROPE_SETTINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
    {
        "rope_type": "llama3",
        "factor": 2.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 64,
    },
]


@needs_transformers
@pytest.mark.parametrize("settings", ROPE_SETTINGS, ids=lambda s: str(s["rope_type"]))
@llama_likes
def test_saved_rope_settings_are_read(
    architecture: Architecture, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What transformers 5 writes, given either spelling, reads as the old spelling does."""
    import transformers

    old = {"rope_theta": 5e5, "rope_scaling": dict(settings)}
    new = {"rope_parameters": {**settings, "rope_theta": 5e5}}
    expected = load_model(config_of(architecture, **old), where="test").config.rope
    assert (expected.kind, expected.theta) == (settings["rope_type"], 5e5)
    for number, spelling in enumerate((old, new)):
        folder = tmp_path / str(number)
        transformers.AutoConfig.for_model(
            architecture.name, **SIZES, **copy.deepcopy(spelling)
        ).save_pretrained(folder)
        raw = read_json_strict(folder / "config.json")
        assert load_model(raw, where="test").config.rope == expected


@needs_transformers
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(("first", "window"), [(0, 32), (2, None)])
def test_saved_windows_are_read(name: str, first: int, window: int | None, tmp_path: Path) -> None:
    import transformers

    transformers.AutoConfig.for_model(
        name, **SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=first
    ).save_pretrained(tmp_path)
    raw = read_json_strict(tmp_path / "config.json")
    assert load_model(raw, where="test").config.sliding_window == window


@llama_likes
def test_order_and_names_are_the_contract(architecture: Architecture) -> None:
    keys = bias_keys(architecture)
    model = load_model(config_of(architecture, **dict.fromkeys(keys, True)), where="test")
    attention, mlp = model.arch.attention, model.arch.mlp
    layer = [
        "input_layernorm.weight",
        "self_attn.qkv_proj.weight",
        *(["self_attn.qkv_proj.bias"] if attention.qkv_bias else []),
        *(["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if attention.qk_norm else []),
        "self_attn.o_proj.weight",
        *(["self_attn.o_proj.bias"] if attention.out_bias else []),
        "post_attention_layernorm.weight",
        "mlp.gate_up_proj.weight",
        *(["mlp.gate_up_proj.bias"] if mlp.bias else []),
        "mlp.down_proj.weight",
        *(["mlp.down_proj.bias"] if mlp.bias else []),
    ]
    assert [spec.name for spec in model.parameters()] == [
        "model.embed_tokens.weight",
        *(f"model.layers.{i}.{name}" for i in range(2) for name in layer),
        "model.norm.weight",
        "lm_head.weight",
    ]
    assert len({spec.name for spec in model.parameters()}) == len(model.parameters())


@llama_likes
def test_shapes_and_roles(architecture: Architecture) -> None:
    model = load_model(config_of(architecture), where="test")
    specs = {spec.name: spec for spec in model.parameters()}
    qkv = specs["model.layers.1.self_attn.qkv_proj.weight"]
    assert (qkv.shape, qkv.role) == (((6 + 2 * 2) * 16, 48), "linear")
    scope = "model.layers.1.self_attn"
    assert qkv.sources == tuple(f"{scope}.{x}_proj.weight" for x in "qkv")
    gate_up = specs["model.layers.0.mlp.gate_up_proj.weight"]
    assert gate_up.shape == (160, 48)
    assert [source.split(".")[-2] for source in gate_up.sources] == ["gate_proj", "up_proj"]
    assert specs["model.layers.0.self_attn.o_proj.weight"].shape == (48, 96)
    assert specs["model.layers.0.mlp.down_proj.weight"].shape == (48, 80)
    assert specs["model.embed_tokens.weight"].role == "embedding"
    assert specs["lm_head.weight"].role == "lm_head"
    for spec in specs.values():
        assert spec.name.endswith(".bias") == (spec.role == "bias")
        assert ("norm" in spec.name) == (spec.role == "norm")


@llama_likes
def test_names_without_prefix(architecture: Architecture) -> None:
    model = load_model(config_of(architecture, tie_word_embeddings=True), where="test")
    bare = model.for_tensors({"embed_tokens.weight": None, "layers.0.input_layernorm.weight": None})
    assert bare.names == BARE_DECODER
    for before, after in zip(model.parameters(), bare.parameters(), strict=True):
        assert after.sources == tuple(s.removeprefix("model.") for s in before.sources)
        bare_parts = [dataclasses.replace(part, name="") for part in after.parts]
        assert bare_parts == [dataclasses.replace(part, name="") for part in before.parts]
        assert dataclasses.replace(after, parts=before.parts) == before
    assert bare.for_tensors(["model.embed_tokens.weight"]).names == HF_DECODER
    assert bare.for_tensors([]).names == HF_DECODER, "nothing fits: the usual one"


def test_a_name_table_is_data() -> None:
    """A checkpoint with fused projections needs a table and no code."""
    fused = NameTable(qkv=("self_attn.qkv_proj",), gate_up=("mlp.gate_up_proj",))
    model = load_model(config_of(ARCHITECTURES["llama"]), where="test")
    fused_model = dataclasses.replace(model, names=fused)
    specs = {spec.name: spec for spec in fused_model.parameters()}
    for name in (
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_proj.weight",
    ):
        assert specs[name].parts == (Source(name),)
    assert num_parameters(fused_model) == num_parameters(model)


@pytest.mark.parametrize(
    ("tensor", "tied", "ignorable"),
    [
        ("model.layers.3.self_attn.rotary_emb.inv_freq", False, True),
        ("model.rotary_emb.inv_freq", False, True),
        ("rotary_emb.inv_freq", False, True),
        ("lm_head.weight", True, True),
        ("lm_head.weight", False, False),
        ("lm_head.bias", True, False),
        ("model.layers.0.self_attn.q_proj.weight", True, False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq.weight", False, False),
        ("my_rotary_emb.inv_freq", False, False),
    ],
)
def test_ignorable_tensors(tensor: str, tied: bool, ignorable: bool) -> None:
    config = config_of(ARCHITECTURES["llama"], tie_word_embeddings=tied)
    patterns = load_model(config, where="test").ignorable_tensors()
    assert any(pattern.fullmatch(tensor) for pattern in patterns) == ignorable


def test_a_declaration_can_be_replaced() -> None:
    """New architectures are data: a changed option changes the parameters, and nothing else."""
    model = load_model(config_of(ARCHITECTURES["llama"]), where="test")
    variant = dataclasses.replace(
        model.arch, name="variant", attention=GroupedQuery(qkv_bias=True, qk_norm=HeadNorm())
    )
    names = {spec.name for spec in model.parameters()}
    changed = {spec.name for spec in dataclasses.replace(model, arch=variant).parameters()}
    assert names < changed
    assert {name.split(".", 3)[3] for name in changed - names} == {
        "self_attn.qkv_proj.bias",
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    }
    assert variant != model.arch
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant.name = "other"  # type: ignore[misc]


def test_declared_options_name_keys_and_resolved_ones_do_not() -> None:
    llama = ARCHITECTURES["llama"]
    assert llama.attention.qkv_bias == "attention_bias"
    model = load_model(config_of(llama, attention_bias=True), where="test")
    assert model.arch.attention == GroupedQuery(qkv_bias=True, out_bias=True)
    assert model.arch.mlp == GatedMLP("silu")
    unresolved = Model(arch=llama, config=model.config)
    with pytest.raises(ValueError, match="'attention_bias' is not resolved"):
        unresolved.parameters()


def test_registry() -> None:
    assert set(ARCHITECTURES) == set(FIRST)
    for name, architecture in ARCHITECTURES.items():
        assert architecture.name == name
        summary = architecture.summary()
        assert name in summary and architecture.label in summary and "\n" not in summary
        assert all(cls in summary for cls in architecture.hf_classes)
    with pytest.raises(TypeError):
        ARCHITECTURES["x"] = ARCHITECTURES["llama"]  # type: ignore[index]
