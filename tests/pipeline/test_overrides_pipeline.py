"""Overrides from conversion to the compiled library: carried, exact in the plan, and refused where
parts don't fit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import SIZES, save_checkpoint

from mlc_compile.chat_config import FILE_NAME, ChatConfig, gen_config
from mlc_compile.compiler.build import check_inputs, compile_library
from mlc_compile.compiler.fit import what_fits
from mlc_compile.compiler.inputs import CompileInputs, load_inputs, load_plan_inputs
from mlc_compile.compiler.memory import weight_bytes
from mlc_compile.compiler.metadata import config_fingerprint
from mlc_compile.config import resolve_compile_config
from mlc_compile.errors import InputError
from mlc_compile.models.detect import load_model
from mlc_compile.quantization.policy import with_overrides
from mlc_compile.quantization.scheme import SCHEMES, get_scheme
from mlc_compile.runtime.engine import Engine
from mlc_compile.runtime.reference import check_parameters
from mlc_compile.runtime.verify import verify
from mlc_compile.targets.profile import TARGETS
from mlc_compile.weights.checkpoint import Checkpoint, open_checkpoint
from mlc_compile.weights.convert import convert_weight
from mlc_compile.weights.tensor_cache import open_tensor_cache

# Every kind of codes in one model, and one projection that nothing packs.
MIXED = (
    "lm_head=q8f16_pc,embed_tokens=q8f16_1,layers.0.self_attn.o_proj=q0f16,"
    "layers.0.mlp.*=q4f16_awq,layers.1.mlp.*=e4m3f16_1,layers.1.self_attn.qkv_proj=q3f16_0"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    pytest.importorskip("torch")
    path = save_checkpoint(tmp_path_factory.mktemp("tiny") / "source", "llama")
    yield open_checkpoint(path)


def make(source: Checkpoint, out: Path, text: str, base: str = "q4f16_1", **how: object) -> None:
    model = load_model(source.config, where="config.json")
    scheme = with_overrides(get_scheme(base), text, model)
    if how.pop("weights", True):
        convert_weight(source, model, scheme, out, **how)  # type: ignore[arg-type]
    sizes = resolve_compile_config(model.config, **SIZES)
    gen_config(source, model, scheme, sizes, out, conv_template="raw", overwrite=True)


@pytest.fixture(scope="module")
def mixed(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "out"
    make(source, out, MIXED, scales="mse")
    return out


def inputs_of(directory: Path) -> CompileInputs:
    return load_inputs(directory, TARGETS["cpu"], {})


def test_every_artefact_says_it(mixed: Path) -> None:
    pairs = [pair.split("=") for pair in MIXED.split(",")]
    config = json.loads((mixed / FILE_NAME).read_text())
    assert (config["quantization"], config["quantization_overrides"]) == ("q4f16_1", pairs)
    manifest = json.loads((mixed / "manifest.json").read_text())
    assert manifest["quantization"]["overrides"] == pairs
    assert manifest["quantization"]["name"] == "q4f16_1"
    inputs = inputs_of(mixed)
    assert inputs.scheme.overrides_json() == pairs
    plain = get_scheme("q4f16_1")
    assert config_fingerprint(inputs.model, inputs.scheme) != config_fingerprint(
        inputs.model, plain
    )


def test_planned_bytes_are_the_stored_ones(mixed: Path) -> None:
    inputs = inputs_of(mixed)
    manifest = json.loads((mixed / "manifest.json").read_text())
    stored = sum(tensor["nbytes"] for tensor in manifest["tensors"])
    assert weight_bytes(inputs.model, inputs.scheme) == stored == manifest["parameter_bytes"]
    assert stored != weight_bytes(inputs.model, get_scheme("q4f16_1"))
    bits = 8 * stored / manifest["parameters"]
    assert manifest["effective_bits_per_weight"] == pytest.approx(bits, abs=1e-6)
    # A plan that does not fit names the scheme as it is.
    assert "lm_head=q8f16_pc" in what_fits(inputs, TARGETS["cpu"], 1 << 40)


def test_plan_takes_overrides_for_a_checkpoint_and_for_a_configuration(
    source: Checkpoint, mixed: Path
) -> None:
    cpu, held = TARGETS["cpu"], inputs_of(mixed)
    first = load_plan_inputs(source.path, cpu, "q4f16_1", {}, held_otherwise=MIXED)
    assert first.scheme == held.scheme
    assert load_plan_inputs(mixed, cpu, None, {}).scheme == held.scheme
    other = load_plan_inputs(mixed, cpu, None, {}, held_otherwise="lm_head=q0f16")
    assert other.scheme.overrides_json() == [["lm_head", "q0f16"]]
    assert load_plan_inputs(mixed, cpu, "q4f16_1", {}).scheme == SCHEMES["q4f16_1"]


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("lm_head=q8f16_1", "quantization_overrides is 'lm_head=q8f16_1', not a list"),
        ([["lm_head", "q8f32_1"]], "lm_head=q8f32_1 computes in float32"),
        ([["layers.7.*", "q8f16_1"]], "matches no parameter"),
        ([["lm_head"]], "is not PATTERN=SCHEME"),
        ([5], "is not PATTERN=SCHEME"),
    ],
)
def test_a_configuration_with_wrong_overrides_is_refused(
    mixed: Path, tmp_path: Path, damaged: object, message: str
) -> None:
    config = json.loads((mixed / FILE_NAME).read_text())
    (tmp_path / FILE_NAME).write_text(json.dumps({**config, "quantization_overrides": damaged}))
    chat = ChatConfig.read(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        chat.scheme(chat.model())
    assert str(tmp_path / FILE_NAME) in str(caught.value)


def test_a_kind_that_a_target_cannot_read_is_refused_early(mixed: Path) -> None:
    profile = dataclasses.replace(TARGETS["cpu"], weight_kinds=("plain", "symmetric", "affine"))
    with pytest.raises(InputError, match=r"down_proj\.weight is held by e4m3f16_1, .*cpu cannot"):
        only = with_overrides(
            get_scheme("q4f16_1"), "layers.1.mlp.down_proj=e4m3f16_1", inputs_of(mixed).model
        )
        check_inputs(dataclasses.replace(inputs_of(mixed), scheme=only), profile)


@pytest.mark.slow
def test_the_library_is_verified_and_other_parameters_are_refused(
    source: Checkpoint, mixed: Path, tmp_path: Path
) -> None:
    library = mixed / "model.so"
    compile_library(mixed, "cpu", library, overrides=SIZES)
    report = verify(mixed, library, source.path, engine="numpy", original=True)
    assert report.failures == []
    assert report.parameters is not None and not report.parameters.faults
    # Norms, and the projection that is kept.
    assert report.parameters.exact == 6
    for text in ("", MIXED.replace("lm_head=q8f16_pc", "lm_head=q8f16_1")):
        other = tmp_path / f"other{len(text)}"
        make(source, other, text)
        with pytest.raises(InputError, match=r"do not belong together.*sha256:.*sha256:"):
            Engine.load(library, other)
        with pytest.raises(InputError, match="do not belong together"):
            verify(other, library, source.path, engine="numpy")
    # The configuration alone may be another's too.
    make(source, mixed, "lm_head=q0f16", weights=False)
    with pytest.raises(InputError, match="do not belong together"):
        verify(mixed, library, source.path, engine="numpy")


def test_all_scale_rules_are_a_conversion_of_the_checkpoint(
    source: Checkpoint, tmp_path: Path
) -> None:
    """What verify compares holds for every rule, and finds a code or a scale that is changed."""
    model = load_model(source.config, where="config.json")
    scheme = with_overrides(get_scheme("q4f16_1"), MIXED, model)
    for rule in ("absmax", "signed", "mse"):
        out = tmp_path / rule
        convert_weight(source, model, scheme, out, scales=rule)  # type: ignore[arg-type]
        assert check_parameters(model, scheme, out, source).faults == ()
    for name in ("self_attn.qkv_proj.q_weight", "mlp.gate_up_proj.q_scale"):
        record = open_tensor_cache(out).records[f"model.layers.0.{name}"]
        with (out / "params_shard_0.bin").open("r+b") as shard:
            shard.seek(record.offset + 1)
            byte = shard.read(1)[0]
            shard.seek(record.offset + 1)
            shard.write(bytes([byte ^ 0x04]))
        faults = check_parameters(model, scheme, out, source).faults
        assert faults and name.rpartition(".")[0] in faults[-1]
    assert len(faults) == 2
