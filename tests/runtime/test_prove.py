"""Architectures that fit by structure, compared with the checkpoint's own class."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from foreign_classes import register
from tiny_models import save_checkpoint

from mlc_compile.config import read_json_strict
from mlc_compile.errors import EnvironmentLacksError, InputError
from mlc_compile.models import load_model
from mlc_compile.models.params import expected_shapes
from mlc_compile.models.structure import Detection, identify
from mlc_compile.runtime import prove as prover
from mlc_compile.runtime.prove import BOUND, prove, shrink
from mlc_compile.weights.checkpoint import open_checkpoint

CONFIGS = Path(__file__).parent.parent / "configs"
HELIUM = {"head_dim": 24, "mlp_bias": False, "attention_bias": False}


def proved(path: Path, model_type: str, *, named: str = "auto", **changes: Any) -> Detection:
    """A tiny checkpoint of a class of ours, detected and compared. Dropped keys are `...`."""
    register()
    given = {key: value for key, value in changes.items() if value is not ...}
    save_checkpoint(path, model_type, **{"num_hidden_layers": 8, **given})
    file = path / "config.json"
    config = read_json_strict(file)
    kept = {k: v for k, v in config.items() if changes.get(k) is not ...}
    file.write_text(json.dumps(kept))
    checkpoint = open_checkpoint(path)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    detection = identify(checkpoint.config, shapes, model_type=named, where="model")
    assert detection.basis in ("structure", "named")
    return prove(detection, checkpoint.config)


def verdicts(detection: Detection) -> Mapping[str, bool]:
    return {proof.name: proof.passed for proof in detection.proofs}


def test_renamed_class_is_proved(tmp_path: Path) -> None:
    found = proved(tmp_path, "my_llama")
    model = found.chosen()
    assert (model.arch.name, model.label) == ("llama", "experimental")
    assert sum(verdicts(found).values()) == 1 < len(found.proofs)
    for proof in found.proofs:
        runs = proof.runs
        assert len({run.seed for run in runs}) == 3 and len({run.tokens for run in runs}) == 2
        # The right one is equal, the others far from it; nothing lies between.
        assert (proof.worst.nmse < BOUND / 100) if proof.passed else (proof.worst.nmse > 1e-3)
    assert "MyLlamaForCausalLM (transformers" in model.identity()["evidence"]


def test_interleaved_rotation_is_not_llama(tmp_path: Path) -> None:
    found = proved(tmp_path / "a", "my_helium", **HELIUM)
    assert verdicts(found)["llama"] is False
    model = found.chosen()
    assert (model.arch.name, model.label) == ("helium", "experimental")
    forced = proved(tmp_path / "b", "my_helium", named="llama", **HELIUM)
    with pytest.raises(InputError, match=r"not what MyHeliumForCausalLM .* computes: llama: NMSE"):
        forced.chosen(allow_experimental=True)


@pytest.mark.parametrize("model_type", ["my_offset", "my_capped", "my_sixth"])
def test_other_maths_in_the_same_tensors_is_refused(model_type: str, tmp_path: Path) -> None:
    found = proved(tmp_path, model_type)
    assert "llama" in verdicts(found)
    assert not any(verdicts(found).values())
    assert found.outcome is None
    with pytest.raises(InputError, match="its maths differ: it is not supported"):
        found.chosen(allow_experimental=True)


def test_what_the_class_takes_for_absent_keys_counts(tmp_path: Path) -> None:
    """A window of 4096 that config.json leaves out is longer than any text of the proof."""
    found = proved(tmp_path, "my_mistral", sliding_window=..., max_position_embeddings=8192)
    faults = {proof.name: proof.fault for proof in found.proofs}
    assert "sliding_window is 4096" in faults["llama"]
    model = found.chosen()
    assert (model.arch.name, model.config.sliding_window) == ("mistral", 4096)


def test_soft_cap_by_a_key_fits_nothing(tmp_path: Path) -> None:
    found = proved(tmp_path, "my_llama", final_logit_softcapping=30.0)
    assert found.candidates == found.proofs == ()
    reasons = {rejected.name: rejected.reason for rejected in found.rejected}
    assert reasons["llama"] == "unknown key final_logit_softcapping = 30.0"


def test_no_class_no_proof(tmp_path: Path) -> None:
    register()
    save_checkpoint(tmp_path, "my_llama")
    checkpoint = open_checkpoint(tmp_path)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}

    def of(**changes: Any) -> Detection:
        config = {**checkpoint.config, **changes}
        return prove(identify(config, shapes, model_type="llama", where="model"), config)

    remote = of(model_type="nobodys", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    assert remote.proofs == ()
    assert "transformers has no model_type 'nobodys'" in remote.unproved
    with pytest.raises(InputError, match="cannot be proved to be llama"):
        remote.chosen()
    assert remote.chosen(allow_experimental=True).label == "structural-only"
    other = of(architectures=["OtherForCausalLM"])
    assert "is MyLlamaForCausalLM, and the checkpoint's OtherForCausalLM" in other.unproved


def test_needs_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prover, "transformers_missing", lambda: ["torch"])
    save_checkpoint(tmp_path, "llama")
    checkpoint = open_checkpoint(tmp_path)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    found = identify(checkpoint.config, shapes, where="model")
    with pytest.raises(EnvironmentLacksError, match="a proof needs torch"):
        prove(found, checkpoint.config)


STORED = sorted(path.name for path in CONFIGS.glob("*.json") if ".refused." not in path.name)


@pytest.mark.parametrize("file", STORED)
def test_published_configs_become_small(file: str) -> None:
    config = read_json_strict(CONFIGS / file)
    before = json.dumps(config)
    model = load_model(config, where=file)
    try:
        small = shrink(model, config, 8, where=file)
    except InputError as error:
        # Baichuan's kind follows from its sizes; it has no class in transformers either.
        assert model.arch.name == "baichuan" and "cannot be made small" in error.message
        return
    assert json.dumps(config) == before
    assert small.model.arch == model.arch
    assert small.model.config.hidden_size <= 384
    assert small.model.config.num_hidden_layers <= 8
    kept = ("tie_word_embeddings", "norm_eps", "attention_softcap", "logits_softcap", "clip_qkv")
    for name in kept:
        assert getattr(small.model.config, name) == getattr(model.config, name)
    assert small.model.config.rope.kind == model.config.rope.kind
    windows = {kind.window for kind in small.model.config.layers}
    assert windows <= {None, 21}
    assert small.model.config.sliding_window in (None, 21)


# One of each mechanism; every one is proved with `-m slow`.
QUICK = ("Phi-3.5-mini-instruct.json", "gemma-2-2b.json", "Qwen3-30B-A3B.json")


# Checkpoints that bring their own code, and one that transformers reads as Llama. The parity tests
# compare them with twins.
UNPROVABLE = {
    *("baichuan", "chatglm", "deepseek", "exaone", "internlm", "internlm2", "internlm3"),
    *("minicpm", "orion", "qwen"),
}


@pytest.mark.parametrize(
    "file", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in STORED]
)
def test_published_classes_are_proved(file: str) -> None:
    """The declarations of known classes, by the same proof, from the published configuration."""
    config = read_json_strict(CONFIGS / file)
    model = load_model(config, where=file)
    shapes = {n: s for spec in model.parameters() for n, s in expected_shapes(spec).items()}
    found = prove(identify(config, shapes, where=file), config)
    if model.arch.name in UNPROVABLE:
        assert found.unproved and not found.proofs
        return
    assert not found.unproved
    assert verdicts(found) == {model.arch.name: True}
    assert found.proofs[0].worst.nmse < BOUND / 100
