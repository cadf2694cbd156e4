"""Every quantisation scheme: a compiled library against transformers on the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_architectures import CASES
from tiny_models import SIZES, build, save_checkpoint

from mlc_compile.quantization.scheme import SCHEMES
from mlc_compile.runtime import cuda_emulator
from mlc_compile.runtime.verify import verify

QUICK = ("q4f16_1",)  # .ci/run does all of them


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCHEMES],
)
def test_library_equals_transformers(
    name: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, scheme = checkpoint(), SCHEMES[name]
    built = build(source, name, tmp_path / "out", SIZES)
    report = verify(built.directory, built.library, source, original=True)
    print(report.to_text())
    assert report.failures == []
    assert report.model_dtype == scheme.model_dtype
    assert {s.name for s in report.scenarios if s.skipped} == {"window_wrap"}
    worst = max(s.worst("nmse") for s in report.scenarios)
    # A narrower type would show here: float32 arithmetic is far better than float16 allows.
    assert worst < {"float32": 1e-9, "float16": 1e-3, "bfloat16": 5e-2}[scheme.model_dtype]
    assert report.parameters is not None and report.quantization_loss is not None
    loss = report.quantization_loss.mean("kl")
    if name == "q0f32":
        assert loss < 1e-12
    else:
        assert loss > 0 and (scheme.is_plain or report.parameters.worst_steps > 0.4)
    if scheme.is_plain:
        assert report.parameters.exact == report.parameters.compared
        assert loss < 1e-3


MIXED = (
    "lm_head=q8f16_pc,embed_tokens=e4m3f16_1,layers.0.self_attn.*=q4f16_awq,"
    "layers.0.mlp.gate_up_proj=q3f16_1,layers.0.mlp.down_proj=q4f16_0,layers.1.self_attn.o_proj=q0f16,"
    "layers.1.mlp.*=e4m3f16_1"
)
"""Every kind of code in one model, whose base holds what is left."""


def check_mixed(
    target: str, override: str, out: Path, model_type: str = "llama", **changes: Any
) -> None:
    """A library of one model with several schemes and "mse" scales (which use every code, and
    negative scales) against the reference on the dequantised weights."""
    config = {**CASES[model_type].config, **changes}
    source = save_checkpoint(out / "source", model_type, config=config)
    built = build(
        source, "q4f16_1", out / "out", SIZES, target=target, override=override, scales="mse"
    )
    report = verify(built.directory, built.library, source, decode_steps=8)
    print(report.to_text())
    assert report.failures == []
    if model_type == "llama":  # a router's tie may move single positions further: verify knows
        assert max(s.worst("nmse") for s in report.scenarios) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "webgpu", "macos"])
def test_schemes_mixed_in_one_model(
    target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if target == "webgpu":
        request.getfixturevalue("webgpu")
    check_mixed(target, MIXED, tmp_path)


@pytest.mark.slow
def test_schemes_mixed_on_cuda(tmp_path: Path) -> None:
    """Kernels by hand and portable ones in one library."""
    mixed = "lm_head=q8f16_pc,layers.0.self_attn.*=q4f16_awq,layers.0.mlp.down_proj=e4m3f16_1"
    with cuda_emulator.emulated(arch=80):
        check_mixed("cuda:sm_80", mixed, tmp_path, num_hidden_layers=1)


@pytest.mark.slow
def test_experts_of_other_schemes(tmp_path: Path) -> None:
    override = "layers.1.mlp.experts.*=q4f16_awq,layers.2.mlp.experts.*=e4m3f16_1,lm_head=q8f16_pc"
    check_mixed("cpu", override, tmp_path, "qwen2_moe")


@pytest.mark.slow
@pytest.mark.parametrize("name", ("gemma2", "gpt2", "qwen2_moe", "granitemoe"))
def test_mechanisms_in_four_bits(name: str, tmp_path: Path) -> None:
    """Against the reference on the dequantised weights, with the bounds of float16."""
    case = CASES[name]
    source = save_checkpoint(tmp_path / "source", case.model_type, config=case.config)
    built = build(source, "q4f16_1", tmp_path / "out", case.sizes)
    report = verify(built.directory, built.library, source)
    print(report.to_text())
    # verify's own bounds: a router's tie may move single positions further, which it knows
    assert report.failures == []
