"""What a checkpoint of an unknown name is found to be, from keys and shapes alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlc_compile.config import read_json_strict
from mlc_compile.errors import InputError
from mlc_compile.models import ARCHITECTURES, load_model
from mlc_compile.models.params import expected_shapes
from mlc_compile.models.structure import (
    Detection,
    Proof,
    Run,
    Shapes,
    declared_model,
    equal_models,
    identify,
    match_tensors,
)

CONFIGS = Path(__file__).parent.parent / "configs"
STORED = sorted(path.name for path in CONFIGS.glob("*.json") if ".refused." not in path.name)
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **SMALL,
    "head_dim": 16,
    "rope_theta": 1e4,
    "attention_bias": False,
    "mlp_bias": False,
}
RENAMED = {"model_type": "mine", "architectures": ["MineForCausalLM"]}


def shapes_of(config: dict[str, Any]) -> Shapes:
    model = load_model(config, where="config.json")
    return {n: s for spec in model.parameters() for n, s in expected_shapes(spec).items()}


def find(config: dict[str, Any], shapes: Shapes | None = None, **more: Any) -> Detection:
    given = shapes_of(LLAMA) if shapes is None else shapes
    return identify(config, given, where="model", **more)


@pytest.mark.parametrize("file", STORED)
def test_renamed_published_config_is_found(file: str) -> None:
    config = read_json_strict(CONFIGS / file)
    own = load_model(config, where=file)
    shapes = shapes_of(config)
    known = find(config, shapes)
    assert (known.basis, known.outcome, known.outcome and known.outcome.label) == (
        "registered",
        own,
        own.arch.label,
    )
    renamed = find({**config, **RENAMED}, shapes)
    equal = [c for c in renamed.candidates if equal_models(c.model, own)]
    assert len(equal) == 1
    assert own.arch.name in (equal[0].name, *equal[0].equal)
    assert equal[0].model.label == "structural-only"
    assert len(renamed.candidates) == 1 or renamed.apart()
    tried = [name for c in renamed.candidates for name in (c.name, *c.equal)]
    assert sorted([*tried, *(r.name for r in renamed.rejected)]) == sorted(ARCHITECTURES)


def test_candidates_that_shapes_do_not_tell_apart_are_listed() -> None:
    found = find({**LLAMA, **RENAMED})
    names = [candidate.name for candidate in found.candidates]
    assert names[0] == "llama" and "helium" in names
    assert found.outcome is None
    assert found.apart()["positions.interleaved"]["helium"] == "True"
    with pytest.raises(InputError, match="unknown model_type 'mine'") as caught:
        found.chosen(allow_experimental=True)
    assert "positions.interleaved: False (llama" in caught.value.message
    assert "--model-type" in str(caught.value.hint) and "--prove" in str(caught.value.hint)
    text = found.to_text()
    assert "told apart by" in text and "several fit" in text
    data = found.to_json()
    assert data["architecture"] is None and data["candidates"][0]["name"] == "llama"


def test_keys_tell_apart() -> None:
    """`use_bias` is ERNIE's word, and its heads rotate in neighbouring pairs."""
    config = {k: v for k, v in LLAMA.items() if k not in ("attention_bias", "mlp_bias")}
    config |= {"use_bias": False, **RENAMED}
    found = find(config)
    assert [candidate.name for candidate in found.candidates] == ["ernie4_5"]


def test_one_that_fits_must_be_allowed() -> None:
    config = {
        **SMALL,
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
        "max_window_layers": 8,
        "rope_theta": 1e6,
    }
    found = find({**config, **RENAMED}, shapes_of(config))
    assert [candidate.name for candidate in found.candidates] == ["qwen2"]
    with pytest.raises(InputError, match="qwen2 is structural-only") as caught:
        found.chosen()
    assert "--allow-experimental" in str(caught.value.hint)
    model = found.chosen(allow_experimental=True)
    assert model.identity()["basis"] == "structure"
    assert model == load_model(config, where="x"), "the standing takes no part in equality"


@pytest.mark.parametrize("key", ["final_logit_softcapping", "attn_scale_thing", "qk_norm_type"])
def test_unknown_key_is_refused_by_every_candidate(key: str) -> None:
    found = find({**LLAMA, **RENAMED, key: 30.0})
    assert found.candidates == () and found.outcome is None
    llama = next(rejected for rejected in found.rejected if rejected.name == "llama")
    assert llama.reason == f"unknown key {key} = 30.0"
    with pytest.raises(InputError, match="no other fits"):
        found.chosen(allow_experimental=True)
    assert "none fits" in found.to_text()


def test_missing_extra_and_misshapen_tensors_are_shown() -> None:
    shapes = dict(shapes_of(LLAMA))
    del shapes["model.layers.1.mlp.down_proj.weight"]
    shapes["model.layers.0.self_attn.sinks"] = (4,)
    shapes["model.norm.weight"] = (65,)
    shapes["model.rotary_emb.inv_freq"] = (8,)
    found = find({**LLAMA, **RENAMED}, shapes)
    assert found.candidates == ()
    nearest = found.rejected[0]
    assert nearest.faults == 3
    assert nearest.reason == (
        "tensors: 1 missing (model.layers.1.mlp.down_proj.weight) and 1 unused "
        "(model.layers.0.self_attn.sinks) and 1 of another shape "
        "(model.norm.weight is [65], not [64])"
    )
    known = find(LLAMA, shapes)
    assert (known.basis, known.outcome, len(known.rejected)) == ("registered", None, 1)
    assert "is not llama: tensors: 1 missing" in known.problem().message


def test_matching_ignores_what_changes_nothing() -> None:
    model = load_model({**LLAMA, "tie_word_embeddings": True}, where="x")
    shapes = {**shapes_of(LLAMA), "model.layers.0.self_attn.rotary_emb.inv_freq": (8,)}
    match = match_tensors(model, shapes)
    assert match.faults == 0
    assert match.ignored == (
        "lm_head.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    )
    # a vector's elements may stand in any rank
    shaped = {**shapes, "model.norm.weight": (1, 1, 64)}
    assert match_tensors(model, shaped).faults == 0


def test_known_names_decide() -> None:
    found = find(LLAMA)
    assert found.chosen().label == "stable"
    assert found.chosen().identity() == {"name": "llama", "label": "stable"}
    assert "stable (llama)" in found.to_text()
    # a type without its class, and a class without its type, are not known
    for name in ("model_type", "architectures"):
        half = find({**LLAMA, name: RENAMED[name]})
        assert half.basis == "structure"
        assert half.candidates[0].name == "llama", "what a name speaks for comes first"
    alone = {key: value for key, value in LLAMA.items() if key != "model_type"}
    assert find(alone).basis == "registered"
    with pytest.raises(InputError, match="model_type is missing"):
        find(SMALL)


def test_a_named_type_is_the_users_word() -> None:
    found = find({**LLAMA, **RENAMED}, model_type="helium")
    assert found.basis == "named"
    model = found.chosen()
    assert (model.arch.name, model.label) == ("helium", "structural-only")
    assert model.identity()["evidence"] == "--model-type helium, while config.json says mine"
    with pytest.raises(InputError, match="tensors: "):
        find({**LLAMA, **RENAMED}, {"x": (1,)}, model_type="llama").chosen()
    with pytest.raises(InputError, match="closest: llama"):
        find({**LLAMA, **RENAMED}, model_type="lama")


def test_declared_model() -> None:
    assert declared_model(LLAMA, where="x") == load_model(LLAMA, where="x")
    assert declared_model({**LLAMA, **RENAMED}, where="x") is None
    named = declared_model({**LLAMA, **RENAMED}, model_type="llama", where="x")
    assert named is not None and named.label == "structural-only"
    with pytest.raises(InputError, match="model_type is missing"):
        declared_model(SMALL, where="x")


def proved(found: Detection, **nmse: float) -> Detection:
    proofs = tuple(
        Proof(name, "Mine (transformers 0)", 1e-6, tuple(Run(s, 9, value) for s in range(3)))
        for name, value in nmse.items()
    )
    return replace(found, proofs=proofs)


def test_a_proof_decides() -> None:
    found = find({**LLAMA, **RENAMED})
    rest = {candidate.name: 0.3 for candidate in found.candidates}
    model = proved(found, **{**rest, "llama": 1e-12}).chosen()
    assert (model.arch.name, model.label) == ("llama", "experimental")
    assert (
        model.identity()["evidence"]
        == "NMSE at most 1e-06 against Mine (transformers 0) on 3 seeds"
    )
    for bad in (1e-5, float("nan"), float("inf")):
        failed = proved(found, **{**rest, "llama": bad})
        assert failed.outcome is None
        with pytest.raises(InputError, match=r"not what Mine .* computes: llama: NMSE"):
            failed.chosen(allow_experimental=True)
        assert failed.to_json()["proofs"][0]["passed"] is False
    both = proved(found, **{**rest, "llama": 1e-12, "helium": 1e-12})
    with pytest.raises(InputError, match="compute the same"):
        both.chosen(allow_experimental=True)
    # what is known stays what it is, and is refused when it turns out to be something else
    assert proved(find(LLAMA), llama=1e-12).chosen().label == "stable"
    assert proved(find(LLAMA), llama=1.0).outcome is None
