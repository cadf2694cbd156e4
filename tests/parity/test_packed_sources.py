"""Models quantised in each published format, through compiled libraries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tiny_models import SIZES, build, save_tokenizer

from mlc_compile.runtime.verify import verify

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "weights"))
from packed_files import write_model

# One kind of each format: a scheme that keeps its codes, columns of a group, and how far the
# embedding and the head, which the scheme quantises or not, may move the source's own numbers.
KEPT = {
    "awq": ("q4f16_awq", 128, 1e-3),
    "gptq": ("q4f16_1", 32, 0.3),
    "ct-int8": ("q8f16_pc", 32, 0.01),
    "fp8-blocks": ("e4m3f32_1", 32, 0.03),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KEPT)
def test_library_equals_the_dequantised_source(kind: str, tmp_path: Path) -> None:
    name, size, loss = KEPT[kind]
    source = tmp_path / "source"
    write_model(source, kind, size)
    save_tokenizer(source)
    built = build(source, name, tmp_path / "out", SIZES)
    report = verify(built.directory, built.library, source, original=True)
    print(report.to_text())
    assert report.failures == []
    worst = max(s.worst("nmse") for s in report.scenarios)
    assert worst < (1e-9 if "f32" in name else 1e-3)
    assert report.quantization_loss is not None
    assert report.quantization_loss.mean("kl") < loss
