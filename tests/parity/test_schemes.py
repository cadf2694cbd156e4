"""Every quantisation scheme: a compiled library against transformers on the dequantised weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from architecture_cases import MECHANISMS
from test_architectures import CASES
from tiny_models import SIZES, build, save_checkpoint

from mlc_compile.quantization.scheme import SCHEMES
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


@pytest.mark.slow
@pytest.mark.parametrize("name", MECHANISMS)
def test_mechanisms_in_four_bits(name: str, tmp_path: Path) -> None:
    """Against the reference on the dequantised weights, with the bounds of float16."""
    case = CASES[name]
    source = save_checkpoint(tmp_path / "source", case.model_type, config=case.config)
    built = build(source, "q4f16_1", tmp_path / "out", case.sizes)
    report = verify(built.directory, built.library, source)
    print(report.to_text())
    # verify's own bounds: a router's tie may move single positions further, which it knows
    assert report.failures == []
