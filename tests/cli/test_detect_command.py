"""`detect`, and the label's way from a checkpoint into every artefact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

pytest.importorskip("transformers")

from foreign_classes import register
from tiny_models import save_checkpoint

from mlc_compile.chat_config import ChatConfig
from mlc_compile.errors import InputError

Invoke = Callable[..., Result]
SCHEME = ("--quantization", "q0f32")
SIZES = ("--context-window-size", "64", "--prefill-chunk-size", "16", "--max-batch-size", "1")


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Llama under another name."""
    register()
    return save_checkpoint(tmp_path / "model", "my_llama")


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """Of an unknown name, and only one architecture fits."""
    path = save_checkpoint(tmp_path / "model", "qwen2")
    edit(path / "config.json", model_type="mine", architectures=["MineForCausalLM"])
    return path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def make(invoke: Invoke, model: Path, out: Path, *more: str) -> tuple[Result, Result]:
    """convert_weight and gen_config."""
    words = (str(model), *SCHEME, "-o", str(out), *more)
    return (
        invoke("convert_weight", *words),
        invoke("gen_config", *words, *SIZES, "--conv-template", "raw"),
    )


def test_known_checkpoint(tmp_path: Path, invoke: Invoke) -> None:
    path = save_checkpoint(tmp_path, "llama")
    result = invoke("detect", str(path), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["basis"] == "registered"
    assert found["architecture"] == {"name": "llama", "label": "stable"}
    assert (found["rejected"], found["proofs"]) == ([], [])


def test_several_fit_until_one_is_proved(foreign: Path, invoke: Invoke) -> None:
    result = invoke("detect", str(foreign))
    assert result.exit_code == 1
    for text in ("my_llama", "MyLlamaForCausalLM (not known)", "told apart by", "--prove"):
        assert text in result.stdout
    assert "unknown model_type 'my_llama'" in result.stderr
    result = invoke("detect", str(foreign), "--prove", "--json", "-q")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["architecture"]["name"] == "llama"
    assert found["architecture"]["label"] == "experimental"
    assert [proof["name"] for proof in found["proofs"] if proof["passed"]] == ["llama"]


def test_damaged_and_foreign_checkpoints(tmp_path: Path, invoke: Invoke) -> None:
    path = save_checkpoint(tmp_path, "llama")
    edit(path / "config.json", strange_scale=2.0)
    result = invoke("detect", str(path))
    assert result.exit_code == 1
    assert "unknown key strange_scale = 2.0" in result.stderr
    edit(path / "config.json", model_type="mine")
    result = invoke("detect", str(path), "--prove")  # there is nothing to prove
    assert result.exit_code == 1
    assert "no other fits" in result.stderr
    assert invoke("detect", str(path), "--model-type", "lama").exit_code == 2


def test_nothing_is_made_unasked(foreign: Path, tmp_path: Path, invoke: Invoke) -> None:
    for result in make(invoke, foreign, tmp_path / "out", "--allow-experimental"):
        assert result.exit_code == 2
        assert "llama, granite" in result.stderr and "all fit" in result.stderr
    assert not (tmp_path / "out").exists()
    plan = ("plan", str(foreign), *SCHEME, "--model-type")
    assert invoke(*plan, "auto").exit_code == 2
    assert invoke(*plan, "llama").exit_code == 0
    assert (
        invoke("plan", str(foreign), "--fit", "--budget", "1GB", *plan[-1:], "llama").exit_code == 2
    )


def test_structure_alone_must_be_allowed(alone: Path, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "out"
    for result in make(invoke, alone, out):
        assert result.exit_code == 2
        assert "qwen2 is structural-only" in result.stderr and "--allow-exp" in result.stderr
    assert not out.exists()
    for result in make(invoke, alone, out, "--prove"):
        assert result.exit_code == 2
        assert "transformers has no model_type 'mine'" in result.stderr
    for result in make(invoke, alone, out, "--allow-experimental"):
        assert result.exit_code == 0, result.output
    result = invoke("compile", str(out), "-o", str(out / "model.so"))
    assert result.exit_code == 2
    assert "qwen2 is structural-only" in result.stderr
    # What plans makes nothing.
    assert invoke("plan", str(out)).exit_code == 0
    assert invoke("plan", str(alone), *SCHEME).exit_code == 0


def test_a_named_type_needs_no_other_word(alone: Path, tmp_path: Path, invoke: Invoke) -> None:
    out = tmp_path / "out"
    for result in make(invoke, alone, out, "--model-type", "qwen2"):
        assert result.exit_code == 0, result.output
    standing = ChatConfig.read(out).model().standing
    assert standing is not None
    assert (standing.basis, standing.label, standing.asked) == ("named", "structural-only", False)
    edit(out / "mlc-chat-config.json", architecture={"label": "stable", "basis": "hope"})
    with pytest.raises(InputError, match=r"architecture\.basis is 'hope'"):
        ChatConfig.read(out)


def test_the_label_travels(foreign: Path, tmp_path: Path, invoke: Invoke) -> None:
    """Into parameters, configuration, library and reports."""
    out = tmp_path / "out"
    converted, configured = make(invoke, foreign, out, "--prove")
    assert converted.exit_code == configured.exit_code == 0, converted.output + configured.output
    assert "llama (experimental)" in converted.stdout
    manifest = json.loads((out / "manifest.json").read_text())
    known = manifest["architecture"]
    assert (known["name"], known["label"], known["basis"]) == ("llama", "experimental", "proof")
    assert "MyLlamaForCausalLM (transformers" in known["evidence"]
    config = json.loads((out / "mlc-chat-config.json").read_text())
    assert config["architecture"] == known
    assert config["model_type"] == config["model_config"]["model_type"] == "llama"

    library = out / "model.so"
    compiled = invoke("compile", str(out), "-o", str(library), "--json", "-q")
    assert compiled.exit_code == 0, compiled.output
    assert json.loads(compiled.stdout)["architecture"] == known
    shown = json.loads(invoke("inspect", str(library), "--json").stdout)
    ours = shown["metadata"]["mlc_compile"]
    assert (ours["architecture_label"], ours["architecture"]) == ("experimental", known)
    for path in (out, library):
        assert "(experimental: NMSE at most 1e-06" in invoke("inspect", str(path)).stdout
    words = ("--lib", str(library), "--reference", str(foreign), "--decode-steps", "4")
    verified = invoke("verify", str(out), *words, "-q")
    assert verified.exit_code == 0, verified.output
    assert "architecture  llama (experimental)" in verified.stdout
